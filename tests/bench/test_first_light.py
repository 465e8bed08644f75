"""First light: it launches every CUDA kernel, and it fails where a kernel is wrong."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mutants import Mutant
from mutants.logps import LOGPS_MUTANTS
from mutants.shards import SHARDS_MUTANTS
from support.builds import build
from support.emulation import CSRC
from support.paths import EMULATION, ROOT

CAPACITY = 1000  # more than there are kernels


def kernels_in_sources() -> set[str]:
    """The names of the __global__ functions of csrc/cuda."""
    sources = "".join(path.read_text() for path in sorted((CSRC / "cuda").iterdir()))
    names = re.findall(r"^__global__[^{]*?(\w+)\(\w+ args[,)]", sources, re.MULTILINE)
    assert len(names) == len(re.findall("^__global__", sources, re.MULTILINE)) > 0
    return set(names)


def kernels_in_library(library: Path) -> dict[int, str]:
    """Address and name of each instantiation of a kernel."""
    symbols = subprocess.run(
        ["nm", "--demangle", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    names = "|".join(kernels_in_sources())
    found = re.findall(
        rf"^(\w+) . (.*::(?:{names})(?:<.*>)?\([\w:<>, ]+\))$", symbols, re.MULTILINE
    )
    return {int(address, 16): name for address, name in found if "lambda" not in name}


def launched_kernels(library: Path) -> set[int]:
    """Addresses in the library of the kernels that were launched since the last call."""
    addresses = (ctypes.c_void_p * CAPACITY)()
    count = ctypes.CDLL(str(library)).simpo_emulation_launched_kernels
    count.restype, count.argtypes = ctypes.c_size_t, (ctypes.c_void_p, ctypes.c_size_t)
    number = count(addresses, CAPACITY)
    assert number <= CAPACITY
    maps = Path("/proc/self/maps").read_text()
    base = re.search(rf"^(\w+)-\S+ \S+ 0+ .* {re.escape(str(library))}$", maps, re.MULTILINE)
    assert base is not None
    return {address - int(base[1], 16) for address in addresses[:number]}


@pytest.mark.kernels
@pytest.mark.cuda_only
@pytest.mark.emulation
def test_first_light_launches_every_kernel(load, pytestconfig, capfd) -> None:
    folder = f"{pytestconfig.getoption('--kernels')}_ops"
    library = Path(pytestconfig.cache.mkdir(folder)) / "libemulated_ops.so"
    launched_kernels(library)  # discards launches of other tests
    arguments = ["--device", "cpu", "--select", "sanitizer"]
    set_cublas = ctypes.CDLL(str(library)).emulated_cublas
    # A torch that does not show its cuBLAS has dhidden added up by kernels.
    for has_cublas in (False, True):
        set_cublas(ctypes.c_bool(has_cublas))
        assert load("first_light").main(arguments) == 0, capfd.readouterr().out
    launched, kernels = launched_kernels(library), kernels_in_library(library)
    assert not {kernels[address] for address in kernels.keys() - launched}
    names = {re.search(r"(\w+)(<.*>)?\(", kernels[address])[1] for address in launched}
    assert names == kernels_in_sources()


# ---- planted bugs ----------------------------------------------------------------------------

# One bug in each of two files, and the cases that find it.
PLANTED = {
    "the last batch of loads lost, backward": "token_logps, V 40007",
    "the first shard left out": "hidden in shards",
}
MUTANTS = [each for each in (*LOGPS_MUTANTS, *SHARDS_MUTANTS) if each.name in PLANTED]

ON_EMULATED_KERNELS = """
import sys
import torch
from bench import first_light
torch.ops.load_library(sys.argv[1])
sys.exit(first_light.main(["--device", "cpu", "--select", "sanitizer"]))
"""


def first_light(library: Path) -> tuple[int, list[dict]]:
    """Runs first light on emulated kernels. Returns its exit status and records."""
    command = (sys.executable, "-c", ON_EMULATED_KERNELS, library)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return done.returncode, [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of csrc, to plant bugs in; its builds compile only what has changed."""
    folder = tmp_path_factory.mktemp("first_light")
    shutil.copytree(CSRC, folder / "csrc")
    return folder / "csrc"


@pytest.mark.exhaustive
@pytest.mark.emulation
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_wrong_kernel_fails_first_light(mutant: Mutant, sources: Path) -> None:
    file, folder = sources / mutant.file, sources.parent / "build"
    right = file.read_text()
    assert right.count(mutant.original) == 1
    definitions = {"TORCH_DIR": Path(torch.__file__).parent, "CSRC": sources, "OPTIMIZATION": "-O1"}
    try:
        file.write_text(right.replace(mutant.original, mutant.mutated))
        flags = (f"-D{name}={value}" for name, value in definitions.items())
        build(EMULATION, folder, *flags, "-DWERROR=OFF", target="emulated_ops")
    finally:
        file.write_text(right)
    status, records = first_light(folder / "libemulated_ops.so")
    assert status == 1
    wrong = {each["name"] for each in records if each["status"] != "right"}
    assert any(name.startswith(PLANTED[mutant.name]) for name in wrong), wrong
    assert len(wrong) < len({each["name"] for each in records})


def test_every_planted_bug_is_there() -> None:
    assert {mutant.name for mutant in MUTANTS} == set(PLANTED)
