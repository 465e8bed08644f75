"""The test program of the emulated CUDA kernels, built as they are or from a changed copy."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from support.builds import build, locked, run, skip_unless_sanitizer_works
from support.paths import CSRC, EMULATION


class Build(NamedTuple):
    sanitizer: str = ""  # the value of -fsanitize=
    optimization: str = ""  # OPTIMIZATION in tests/cuda/emulation/CMakeLists.txt


# Without optimization, a change compiles in a quarter of the time.
BUILDS = {
    "asan": Build("address,undefined"),
    "tsan": Build("thread"),
    "plain -O0": Build("", "-O0"),
    "asan -O0": Build("address,undefined", "-O0"),
}
ENVIRONMENT = {
    **os.environ,
    # AddressSanitizer cannot move frames away from a fiber's stack.
    "ASAN_OPTIONS": "detect_stack_use_after_return=0",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def build_emulation(folder: Path, target: str, *, contract: bool = False) -> None:
    """Builds a target of tests/cuda/emulation; with ``contract``, products and sums are fused.

    All test processes share the folder, and all targets share the kernels' objects.
    """
    torch_dir = Path(torch.__file__).parent
    definitions = (f"-DTORCH_DIR={torch_dir}", f"-DCONTRACT={'ON' if contract else 'OFF'}")
    with locked(folder / "lock"):
        build(EMULATION, folder, *definitions, target=target)


class EmulatedKernels:
    """A build of tests/cuda/emulation/kernels."""

    def __init__(self, folder: Path) -> None:
        self._build = folder

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs the program."""
        return subprocess.run(
            [self._build / "kernels", *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env=ENVIRONMENT,
        )


class ChangeableKernels(EmulatedKernels):
    """A build of a copy of the sources, which can be changed temporarily."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder / "build")
        sanitizer, optimization = BUILDS[name]
        if sanitizer:
            skip_unless_sanitizer_works(sanitizer, folder)
        self._sources = folder / "csrc"
        self._is_current = True
        shutil.copytree(CSRC, self._sources)
        definitions = {
            "CSRC": self._sources,
            "SANITIZER": sanitizer,
            "OPTIMIZATION": optimization,
            "WERROR": "OFF",
        }
        flags = (f"-D{name}={value}" for name, value in definitions.items())
        build(EMULATION, self._build, *flags, target="kernels")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Compiles changes, and runs the program."""
        if not self._is_current:
            run("cmake", "--build", self._build, "--target", "kernels")
            self._is_current = True
        return super().run(*arguments)

    @contextmanager
    def mutated(self, file: str, original: str, mutated: str) -> Iterator[None]:
        """Replaces a piece of source temporarily. The file must contain it once."""
        path = self._sources / file
        source = path.read_text()
        assert source.count(original) == 1
        try:
            path.write_text(source.replace(original, mutated))
            self._is_current = False
            yield
        finally:
            path.write_text(source)
            self._is_current = False
