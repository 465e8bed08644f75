"""Building and running C++ programs from tests."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

# TorchConfig.cmake of a CUDA build of torch fails without a toolkit.
needs_libtorch = pytest.mark.skipif(
    torch.version.cuda is not None and shutil.which("nvcc") is None,
    reason="find_package(Torch) of a CUDA build of torch needs a CUDA toolkit",
)

# Compiling a file that includes libtorch is most of what a test of a program takes.
WITHOUT_DEBUG_INFO = ("-DCMAKE_CXX_FLAGS_DEBUG=-O0",)


def run(*command: str | Path, **options: object) -> str:
    """The command's output; a failure shows all of it."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """While inside, no other process is inside with the same path."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(source: Path, folder: Path, *definitions: str, target: str = "all") -> None:
    options = ("-G", "Ninja", "-DCMAKE_BUILD_TYPE=Debug")
    run("cmake", "-S", source, "-B", folder, *options, *definitions)
    run("cmake", "--build", folder, "--target", target)


def skip_unless_sanitizer_works(sanitizer: str, folder: Path) -> None:
    """Its runtime may be missing, or at odds with the kernel's address space layout."""
    (folder / "probe.cpp").write_text("int main() {}")
    flags = [f"-fsanitize={sanitizer}", "-o", "probe"]
    compiled = subprocess.run(["c++", "probe.cpp", *flags], cwd=folder, check=False)
    if compiled.returncode or subprocess.run(["./probe"], cwd=folder, check=False).returncode:
        pytest.skip(f"-fsanitize={sanitizer} does not work on this machine")
