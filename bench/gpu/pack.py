"""Packs what a run needs on a GPU machine that can fetch nothing.

bench/gpu.sh --pack [--python PYTHON] [--wheel FILE.whl]

The folder .gpu then holds a wheel of this checkout for that machine's version of Python, wheels of
small packages that it lacks, and torch's headers for a build there. Packing needs nvcc, torch, and
an interpreter of that version, which need not have torch itself.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from bench.gpu.steps import HEADERS, ROOT, SOURCES, source_hash

ARCHS = "90"  # of the wheel's machine code: H100 and H200
BUILD_REQUIREMENTS = ("scikit-build-core>=0.11", "pybind11>=2.13", "cmake>=3.24", "ninja")
# Packages that this project imports and that machine lacks. It has their other requirements, so
# pip does not download these.
PACKAGES = ("liger-kernel>=0.8.5", "trl>=1.16", "datasets", "dill", "multiprocess", "tabulate")
# The versions of these and of their requirements must match, so pip downloads both.
PACKAGES_THAT_MATCH = ("pydantic>=2",)
# Headers of torch's stable ABI. That machine's torch may be too old to compile these sources.
TORCH_HEADERS = ("torch/headeronly", "torch/csrc/stable", "torch/csrc/inductor/aoti_torch")


def _run(*command: str | Path, **environment: str) -> None:
    words = [str(word) for word in command]
    print("+", " ".join(words), flush=True)
    subprocess.run(words, check=True, cwd=ROOT, env={**os.environ, **environment})


def _copy_headers(into: Path) -> None:
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise SystemExit("torch: expected it in this Python, for its headers, found none")
    include = Path(torch.origin).parent / "include"
    for folder in TORCH_HEADERS:
        shutil.copytree(include / folder, into / folder)


def _build(tools: Path, into: Path) -> None:
    """Builds a wheel for the interpreter that the tools belong to."""
    _run(tools / "pip", "install", "--quiet", *BUILD_REQUIREMENTS)
    _run(
        *(tools / "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"),
        *(f"-Ccmake.define.SIMPO_TORCH_INCLUDE={into / HEADERS}", "-w", into, ROOT),
        PATH=f"{tools}{os.pathsep}{os.environ['PATH']}",
        SIMPO_CUDA="ON",
        SIMPO_CUDA_ARCHS=ARCHS,
    )


def pack(into: Path, python: str, wheel: Path | None) -> None:
    """Empties the folder and fills it. Copies the wheel if one is given, else builds one."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    into = into.resolve()
    _copy_headers(into / HEADERS)
    with tempfile.TemporaryDirectory() as folder:
        _run(python, "-m", "venv", folder)
        tools = Path(folder) / "bin"
        if wheel is None:
            _build(tools, into)
        else:
            shutil.copy(wheel, into)
        download = (tools / "pip", "download", "--quiet", "--only-binary=:all:", "-d", into)
        _run(*download, "--no-deps", *PACKAGES)
        _run(*download, *PACKAGES_THAT_MATCH)
    (into / SOURCES).write_text(source_hash())
    size = sum(path.stat().st_size for path in into.rglob("*") if path.is_file())
    print(f"{into}: {size / 2**20:.1f} MiB")
