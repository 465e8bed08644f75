"""Which kernels the tests run on.

``pytest`` tests the installed package as it is. ``pytest --kernels=emulated`` runs the tests marked
``kernels`` again, unchanged and on the same CPU tensors, after the CUDA kernels in the emulator
have taken the place of the CPU kernels. ``pytest --kernels=contracted`` does the same with kernels
whose products and sums the compiler has fused, as NVIDIA's assembler may. ``pytest --kernels=cuda``
runs the suite with CPU ops that send their tensors to the GPU and back. It leaves out the
emulator's own tests, and the tests that compare CUDA tensors with the CPU's.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

# With more threads than cores, threads wait for each other. So each of pytest-xdist's workers gets
# its share of the cores. Torch reads this when it is imported.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import pytest
import torch

# Read when huggingface_hub is imported: no test looks anything up, or reports that it ran.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

import simpo_ext  # noqa: F401  (registers the ops)
from support.emulation import ChangeableKernels, EmulatedKernels, build_emulation
from support.paths import ROOT

if TYPE_CHECKING:
    from ptx.harness.kernels import Kernels

pytest.register_assert_rewrite("support.trl_training")  # whose assertions are about many numbers

CUDA_ROUTING = pytest.StashKey[torch.library.Library]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernels",
        choices=("cpu", "emulated", "contracted", "cuda"),
        default="cpu",
        help="what stands behind the ops on CPU tensors",
    )
    parser.addoption("--exhaustive", action="store_true", help="also run tests that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "kernels: a test of the ops' results, which --kernels=emulated repeats",
        "emulation: a test of the emulator or in it, which a GPU has no part in",
        "cpu_only: holds for the CPU kernels alone, or for any kernels alike",
        "cuda_only: holds for the CUDA kernels alone, emulated or not",
        "gpu: needs a GPU",
        "exhaustive: takes minutes; run with --exhaustive",
    ):
        config.addinivalue_line("markers", line)
    # pytest-xdist hands out files as they come, not by how many tests they have.
    config.option.loadscopereorder = False
    kernels = config.getoption("--kernels")
    if kernels in ("emulated", "contracted"):
        folder = Path(config.cache.mkdir(f"{kernels}_ops"))
        if not hasattr(config, "workerinput"):  # of pytest-xdist, whose workers come after
            build_emulation(folder, "emulated_ops", contract=kernels == "contracted")
        load_emulated_ops(folder)
    elif kernels == "cuda":
        from support.cuda_routing import route_cpu_ops_to_cuda

        config.stash[CUDA_ROUTING] = route_cpu_ops_to_cuda()


def pytest_report_header(config: pytest.Config) -> str:
    return f"kernels behind the ops on CPU tensors: {config.getoption('--kernels')}"


def load_emulated_ops(folder: Path) -> None:
    """Puts the emulated CUDA kernels that were built there in place of the CPU kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the dispatcher's, that a kernel was registered anew
        torch.ops.load_library(folder / "libemulated_ops.so")


@pytest.fixture(scope="session")
def emulated(pytestconfig: pytest.Config) -> Callable[..., EmulatedKernels]:
    """The emulated kernels' test program, built when first asked for."""

    @cache
    def built(*, contract: bool = False) -> EmulatedKernels:
        folder = Path(pytestconfig.cache.mkdir(f"{'contracted' if contract else 'emulated'}_ops"))
        build_emulation(folder, "kernels", contract=contract)
        return EmulatedKernels(folder)

    return built


@pytest.fixture(scope="session")
def changeable(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ChangeableKernels]:
    """A build of a copy of the emulated kernels, made when first asked for."""
    return cache(lambda name: ChangeableKernels(tmp_path_factory.mktemp("kernels"), name))


@pytest.fixture(scope="session")
def ptx_kernels(pytestconfig: pytest.Config) -> Callable[..., Kernels]:
    """The CUDA kernels as PTX, by architecture and rounding. All test processes share a build."""
    from ptx.harness.build import build
    from ptx.harness.kernels import Kernels

    folder = Path(pytestconfig.cache.mkdir("ptx"))
    return lambda architecture, *rounding: Kernels(build(folder, architecture), *rounding)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of bench/, which is found from the root of the repository."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"bench.{name}")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models so small that their work is done before other threads are awake."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kernels = config.getoption("--kernels")

    def is_selected(item: pytest.Item) -> bool:
        marks = {mark.name for mark in item.iter_markers()}
        if "exhaustive" in marks and not config.getoption("--exhaustive"):
            return False
        if kernels == "cpu":
            return "cuda_only" not in marks
        if kernels in ("emulated", "contracted"):
            return "kernels" in marks and "cpu_only" not in marks
        return not marks & {"cpu_only", "emulation", "gpu"}

    selected = [item for item in items if is_selected(item)]
    config.hook.pytest_deselected(items=[item for item in items if not is_selected(item)])
    # The longest come first: left for the end, they would leave all workers but one without work.
    items[:] = sorted(selected, key=lambda item: item.get_closest_marker("emulation") is None)


@pytest.fixture(autouse=True)
def _gpu_tests_need_a_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        if os.environ.get("FAIL_WITHOUT_CUDA"):
            pytest.fail("FAIL_WITHOUT_CUDA is set, and there is no GPU")
        pytest.skip("needs a GPU")
