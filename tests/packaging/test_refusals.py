"""Errors where the package cannot work.

The causes: torch is missing or too old, the compiled module is missing, a second copy of the
library is loaded, or tensors are on a device without kernels.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import simpo_ext
from simpo_ext import _C, distributed
from simpo_ext._inputs import checks
from simpo_ext._ops import library
from support.builds import run
from support.messages import message
from support.paths import ROOT

SOURCES = Path(simpo_ext.__file__).parent
COMPILED = Path(_C.__file__).parent  # another folder in an editable install


# ---- imports -------------------------------------------------------------------------------------


def python_with(folder: Path, code: str, *, site: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs the code. Packages in the folder come before all others, even editable installs."""
    finders = "sys.meta_path[:] = [BuiltinImporter, FrozenImporter, PathFinder]"
    prelude = f"import sys; from importlib.machinery import *; {finders}; "
    return subprocess.run(
        [sys.executable, *([] if site else ["-S"]), "-c", prelude + code],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr.strip().splitlines()[-1]


def copy_package(folder: Path, *, compiled: bool = True) -> Path:
    """Copies the whole package, or only the files of a source checkout."""
    package = folder / "simpo_ext"
    if compiled:
        shutil.copytree(COMPILED, package)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "lib")
    shutil.copytree(SOURCES, package, ignore=ignored, dirs_exist_ok=True)
    return package


def stand_in_torch(folder: Path, version: str) -> None:
    """Writes a package torch that has only a version."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n")


def test_a_missing_torch_is_an_error(tmp_path: Path) -> None:
    copy_package(tmp_path)
    done = python_with(tmp_path, "import simpo_ext", site=False)
    assert last_line(done) == "ModuleNotFoundError: No module named 'torch'"


def test_an_older_torch_is_refused_before_the_library_is_loaded(tmp_path: Path) -> None:
    copy_package(tmp_path)
    stand_in_torch(tmp_path, "2.9.1")
    code = """
try:
    import simpo_ext
finally:
    print("libsimpo_ext" in open("/proc/self/maps").read(), "simpo_ext._C" in sys.modules)
"""
    done = python_with(tmp_path, code)
    found = f"got torch 2.9.1 from {tmp_path / 'torch'}"
    assert last_line(done) == f"ImportError: simpo_ext: expected torch >= 2.10, {found}"
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("version", ["2.9.1", "2.9.1+cu128", "2.9.0a0+git1234567", "1.13.1", "2.0"])
def test_older_torch_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=message("expected torch >= 2.10, got torch", version)):
        library._check_torch_version()


# A build that does not know its version calls itself main.
@pytest.mark.parametrize(
    "version",
    ["2.10.0", "2.10.0a0+git1234567", "2.13.0+cpu", "2.15.0.dev20260101", "3.0.0", "10.1", "main"],
)
def test_newer_torch_is_accepted(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    library._check_torch_version()


def test_library_package_and_import_name_the_same_oldest_torch() -> None:
    oldest = ".".join(map(str, library.OLDEST_TORCH))
    assert simpo_ext.build_info()["torch_target"] == oldest
    assert f"torch>={oldest}" in (importlib.metadata.requires("simpo_ext") or [])


def test_the_error_of_an_unbuilt_checkout_says_how_to_install_it(tmp_path: Path) -> None:
    package = copy_package(tmp_path, compiled=False)
    stand_in_torch(tmp_path, "2.10.0")
    # site-packages may have the compiled module.
    words = last_line(python_with(tmp_path, "import simpo_ext", site=False))
    expected = f"expected its compiled module _C{EXTENSION_SUFFIXES[0]} in {package}, found none"
    assert re.match(message("ImportError: simpo_ext: ", expected, "pip install ."), words)


def test_the_error_names_a_compiled_module_for_another_python(tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    stand_in_torch(tmp_path, "2.10.0")
    other = package / "_C.cpython-39-s390x-linux-gnu.so"
    (package / f"_C{EXTENSION_SUFFIXES[0]}").rename(other)
    words = last_line(python_with(tmp_path, "import simpo_ext", site=False))
    expected = f"_C{EXTENSION_SUFFIXES[0]} in {package}, found {other}, for another Python or"
    assert re.match(message("ImportError: simpo_ext: ", expected, "pip install ."), words)


def test_the_error_says_why_the_compiled_module_does_not_load(tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    shutil.rmtree(package / "lib")
    words = last_line(python_with(tmp_path, "import simpo_ext"))
    module = package / f"_C{EXTENSION_SUFFIXES[0]}"
    torch_and_reason = f"torch {torch.__version__}: libsimpo_ext.so: cannot open shared object"
    parts = ("ImportError: simpo_ext: ", module, torch_and_reason, "install simpo_ext again")
    assert re.match(message(*parts), words)


def test_a_second_copy_of_the_package_is_refused(tmp_path: Path) -> None:
    first, second = (copy_package(tmp_path / name) for name in ("first", "second"))
    code = f"""
import torch, simpo_ext
print(simpo_ext.__file__, simpo_ext._C.__file__)
score = simpo_ext.token_logps
for name in [name for name in sys.modules if name.split(".")[0] == "simpo_ext"]:
    del sys.modules[name]
sys.path[:2] = [{str(second.parent)!r}]
try:
    import simpo_ext
except ImportError as error:
    print(error)
print(score(torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.int64))[0, 0].item())
"""
    done = python_with(first.parent, f"sys.path.insert(1, {str(second.parent)!r}); {code.strip()}")
    assert done.returncode == 0, done.stderr
    files, refusal, result = done.stdout.splitlines()
    assert files.split() == [f"{first}/__init__.py", f"{first}/_C{EXTENSION_SUFFIXES[0]}"]
    library = second / "lib" / "libsimpo_ext.so"
    assert re.match(message("expected to load the only copy", library, "another copy"), refusal)
    assert float(result) == pytest.approx(-math.log(4))


# ---- devices -------------------------------------------------------------------------------------

P, T, V, H = 2, 5, 7, 3
SHARD = distributed.VocabShard(0, V, lambda x: x[None], lambda x: x)


def logits(device: str) -> Tensor:
    return torch.empty(2 * P, T, V, device=device)


def hidden(device: str) -> tuple[Tensor, Tensor]:
    """Hidden states and lm_head."""
    return torch.empty(2 * P, T, H, device=device), torch.empty(V, H, device=device)


def labels(device: str) -> Tensor:
    return torch.zeros(2 * P, T, dtype=torch.int64, device=device)


def token_logps(device: str) -> Tensor:
    return torch.empty(2 * P, T, device=device)


def pair_logps(device: str) -> Tensor:
    return torch.empty(P, device=device)


# All functions that pass tensors to kernels: the argument in the message, and a call.
ENTRIES: dict[str, tuple[str, Callable[[str], object]]] = {
    "token_logps": ("logits", lambda d: simpo_ext.token_logps(logits(d), labels(d))),
    "sequence_logps": ("logits", lambda d: simpo_ext.sequence_logps(logits(d), labels(d))),
    "simpo_loss": ("logits", lambda d: simpo_ext.simpo_loss(logits(d), labels(d))),
    "SimPOLoss": ("logits", lambda d: simpo_ext.SimPOLoss()(logits(d), labels(d))),
    "simpo_loss_from_logps": (
        "chosen_logps",
        lambda d: simpo_ext.simpo_loss_from_logps(pair_logps(d), pair_logps(d)),
    ),
    "simpo_loss_from_token_logps": (
        "token_logps",
        lambda d: simpo_ext.simpo_loss_from_token_logps(token_logps(d), labels(d)),
    ),
    "count_pairs": ("labels", lambda d: simpo_ext.count_pairs(labels(d))),
    "linear_token_logps": (
        "hidden",
        lambda d: simpo_ext.linear_token_logps(*hidden(d), labels(d)),
    ),
    "linear_simpo_loss": ("hidden", lambda d: simpo_ext.linear_simpo_loss(*hidden(d), labels(d))),
    "LinearSimPOLoss": ("hidden", lambda d: simpo_ext.LinearSimPOLoss()(*hidden(d), labels(d))),
    "vocab_parallel_token_logps": (
        "logits",
        lambda d: distributed.vocab_parallel_token_logps(logits(d), labels(d), SHARD),
    ),
    "vocab_parallel_linear_token_logps": (
        "hidden",
        lambda d: distributed.vocab_parallel_linear_token_logps(*hidden(d), labels(d), SHARD),
    ),
}
NO_KERNELS = {"PairCounts", "SimPOOutput", "build_info", "cmake_prefix_path", "cpu_capability"}
NO_KERNELS |= {"VocabShard", "__version__", "distributed", "global_normalizer"}
# The device, parts of the message, the version of HIP, and the version of the CUDA runtime.
DEVICES: dict[str, tuple[str, tuple[str, ...], str | None, int]] = {
    "XPU": ("xpu:0", ("CPU and CUDA tensors", "xpu:0", ".cpu()"), None, 13000),
    "MPS": ("mps:0", ("CPU and CUDA tensors", "mps:0", ".cpu()"), None, 13000),
    "ROCm": ("cuda:0", ("NVIDIA GPUs and for CPUs", "under ROCm", ".cpu()"), "7.0", 13000),
    "ROCm, no CUDA": ("cuda:0", ("NVIDIA GPUs and for CPUs", "under ROCm", ".cpu()"), "7.0", 0),
    "CUDA, without": (
        "cuda:0",
        ("this build", "CPU tensors only", "cuda:0", ".cpu()", "nvcc"),
        None,
        0,
    ),
}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device of fake tensors, and the parts of the message about it."""
    name, parts, hip, runtime = DEVICES[request.param]
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(checks, "_HAS_CUDA_KERNELS", bool(runtime))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield name, parts


def test_every_public_function_is_tested() -> None:
    assert {*simpo_ext.__all__, *distributed.__all__} == NO_KERNELS | ENTRIES.keys()


@pytest.mark.parametrize("entry", ENTRIES)
def test_tensors_on_a_device_without_kernels_are_refused(
    entry: str, device: tuple[str, tuple[str, ...]]
) -> None:
    argument, call = ENTRIES[entry]
    where, parts = device
    with pytest.raises(RuntimeError, match=message(argument, ": ", *parts)):
        call(where)


@pytest.mark.parametrize("entry", ["simpo_loss", "LinearSimPOLoss"])
@pytest.mark.parametrize("whole", [True, False])
def test_tensors_on_a_device_without_kernels_are_refused_under_compile(
    entry: str, whole: bool, device: tuple[str, tuple[str, ...]]
) -> None:
    argument, call = ENTRIES[entry]
    where, parts = device
    torch.compiler.reset()
    compiled = torch.compile(call, backend="eager", fullgraph=whole)
    with pytest.raises(RuntimeError, match=message(argument, ": ", *parts)):
        compiled(where)


@pytest.fixture(scope="module")
def without_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with only the CUDA ops of a build without nvcc."""
    folder = tmp_path_factory.mktemp("without_cuda")
    torch_folder, csrc = Path(torch.__file__).parent, ROOT / "csrc"
    names = ("library.cpp", "ops_cuda.cpp", "registration.cpp")
    (folder / "no_cpu_ops.cpp").write_text(
        '#include "ops/registration.h"\nvoid simpo_ext::ops::register_cpu_ops(Library&) {}\n'
    )
    sources = [folder / "no_cpu_ops.cpp", *(csrc / "ops" / name for name in names)]
    flags = ["-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{csrc}", f"-I{csrc / 'include'}"]
    flags += ["-isystem", str(torch_folder / "include"), f"-L{torch_folder / 'lib'}"]
    run("c++", *flags, *sources, "-ltorch", "-ltorch_cpu", "-o", folder / "libops.so")
    return folder


def test_every_op_of_a_build_without_cuda_refuses_cuda_tensors(without_cuda: Path) -> None:
    # Without a GPU there are no CUDA tensors, so CPU tensors are dispatched to the CUDA kernels.
    code = """
import torch
torch.ops.load_library("libops.so")
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
values = {"Tensor": torch.zeros(2, 3), "int": 0, "SymInt": 0, "bool": False, "float": 1.0}
for name in torch._C._dispatch_get_all_op_names():
    if name.startswith("simpo_ext::"):
        op = getattr(torch.ops.simpo_ext, name.removeprefix("simpo_ext::")).default
        try:
            op.redispatch(cuda, *[values.get(str(a.type)) for a in op._schema.arguments])
        except RuntimeError as error:
            print(name, error)
"""
    done = python_with(without_cuda, code.strip())
    assert done.returncode == 0, done.stderr
    words = (": this build of simpo_ext has kernels for CPU tensors only", ".cpu()", "nvcc")
    refusals = [line for line in done.stdout.splitlines() if re.search(message(*words), line)]
    ops = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("simpo_ext::")]
    assert len(refusals) == len(done.stdout.splitlines()) == len(ops)
