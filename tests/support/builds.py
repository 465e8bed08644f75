"""Building and running C++ programs from tests."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from support.paths import ROOT

needs_libtorch = pytest.mark.skipif(
    torch.version.cuda is not None and shutil.which("nvcc") is None,
    reason="find_package(Torch) of a CUDA build of torch needs a CUDA toolkit",
)

# Tests of programs spend most of their time compiling files that include libtorch.
WITHOUT_DEBUG_INFO = ("-DCMAKE_CXX_FLAGS_DEBUG=-O0",)


def run(*command: str | Path, **options: object) -> str:
    """Returns the command's output. A failure shows all of it."""
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


def build_library(folder: Path, *definitions: str, target: str = "all") -> None:
    """Builds the library as for a wheel, with the same compiler cache if there is one."""
    given = os.environ.get("SKBUILD_CMAKE_DEFINE", "").split(";")
    definitions += tuple(f"-D{definition}" for definition in given if definition)
    build(
        ROOT, folder, "-DCMAKE_BUILD_TYPE=Release", "-DSIMPO_WERROR=ON", *definitions, target=target
    )


def skip_unless_sanitizer_works(sanitizer: str, folder: Path) -> None:
    """Skips the test if the sanitizer's runtime is missing, or fails on this kernel."""
    (folder / "probe.cpp").write_text("int main() {}")
    flags = [f"-fsanitize={sanitizer}", "-o", "probe"]
    compiled = subprocess.run(["c++", "probe.cpp", *flags], cwd=folder, check=False)
    if compiled.returncode or subprocess.run(["./probe"], cwd=folder, check=False).returncode:
        pytest.skip(f"-fsanitize={sanitizer} does not work on this machine")
