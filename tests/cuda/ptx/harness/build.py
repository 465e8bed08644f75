"""Builds csrc/cuda with nvcc: PTX to interpret, and host code linked with the fake runtime."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from support.builds import locked
from support.paths import ROOT

from .layouts import write_layouts

CSRC = ROOT / "csrc"
# nvcc has one compiler for architectures before 100, and another from there on. The library holds
# the PTX of 90, for GPUs that it has no machine code for.
ARCHITECTURES = ("90", "100")
FAKE_RUNTIME = Path(__file__).with_name("fake_cudart.cpp")
FLAGS = ("-O3", "-DNDEBUG", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC")

_OPTIONS_OF_SOURCES = re.compile(
    r"set_source_files_properties\(\s*([^)]*?)\s*PROPERTIES\s+COMPILE_OPTIONS\s+([^)]*?)\s*\)"
)


class Built(NamedTuple):
    """The folder that holds the build for one architecture."""

    folder: Path

    @property
    def library(self) -> Path:
        """The host code as a shared library."""
        return self.folder / "kernels.so"

    @property
    def layouts(self) -> Path:
        """The layouts of the structs that the host code takes."""
        return self.folder / "layouts.json"

    def ptx(self) -> dict[str, str]:
        """The PTX of each source by its name without .cu."""
        return {path.stem: path.read_text() for path in sorted(self.folder.glob("*.ptx"))}


def build(cache: Path, architecture: str) -> Built:
    """Builds for compute_<architecture>, once for all processes and until a source changes."""
    name = f"compute_{architecture}"
    folder = cache / f"{name}-{_hash_of_sources()}"
    with locked(cache / f"{name}.lock"):
        if not folder.exists():
            for stale in cache.glob(f"{name}-*"):
                shutil.rmtree(stale)
            unfinished = cache / f"{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            _compile_all(unfinished, name)
            write_layouts(CSRC, unfinished)
            unfinished.rename(folder)
    return Built(folder)


def _hash_of_sources() -> str:
    found = hashlib.sha256()
    sources = [path for name in ("core", "cuda") for path in (CSRC / name).iterdir()]
    harness = Path(__file__).parent.iterdir()
    of_build = (ROOT / "CMakeLists.txt", *(path for path in harness if path.is_file()))
    for path in sorted((*sources, *of_build)):
        found.update(path.name.encode() + path.read_bytes())
    found.update(_run("nvcc", "--version").encode())
    return found.hexdigest()[:16]


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def _options_of_sources() -> dict[str, list[str]]:
    """The compiler options that CMakeLists.txt gives some of the sources."""
    text = (ROOT / "CMakeLists.txt").read_text()
    options: dict[str, list[str]] = {}
    for sources, given in _OPTIONS_OF_SOURCES.findall(text):
        for source in sources.split():
            options.setdefault(source, []).extend(given.strip('"').split(";"))
    return options


def _compile_all(folder: Path, architecture: str) -> None:
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    options = _options_of_sources()
    gencode = f"-gencode=arch={architecture},code={architecture}"

    def compile_one(source: Path) -> Path:
        scratch = folder / source.stem
        scratch.mkdir()
        target = folder / f"{source.stem}.o"
        own = options.get(str(source.relative_to(ROOT)), [])
        flags = (*FLAGS, *own, gencode, "--keep", "--keep-dir", scratch)
        _run("nvcc", *flags, f"-I{CSRC}", "-c", source, "-o", target)
        shutil.move(scratch / f"{source.stem}.ptx", folder)
        shutil.rmtree(scratch)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    fake = folder / "fake_cudart.o"
    _run("nvcc", "-std=c++17", "-Xcompiler=-fPIC", "-c", FAKE_RUNTIME, "-o", fake)
    # Symbolic: in a process that has loaded the real runtime, this library calls the fake one.
    flags = ("-shared", "-cudart=none", "-Xlinker=-Bsymbolic")
    _run("nvcc", *flags, *objects, fake, "-o", folder / "kernels.so")
    for each in (*objects, fake):
        each.unlink()
