"""The steps of a run, the most valuable first.

The budgets add up to 480 seconds: 200 for the first five steps, 280 for the others. The docstring
of each step estimates its time on an H200 (copies at 4.3 TB/s, products at 790 TFlop/s).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench.gpu.runner import FailedError, Run, SkippedError, Step

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ROOT / "tests"
CARRIED = ROOT / ".gpu"
SITE = "site"  # in the work folder: the unpacked wheels
SOURCES = "sources.sha256"  # in the carried folder: hash of the wheel's sources
HEADERS = "include"  # in the carried folder: torch's headers, for a build on the machine
PEER_CASES = "8x2048x128256 bfloat16, 100%"


# ---- install and import ----------------------------------------------------------------------

INSTALL = "install and import"


def install(run: Run, carried: Path) -> None:
    """Unpacks the wheels ahead of the machine's packages. Takes seconds, mostly to import torch."""
    site = run.work / SITE
    site.mkdir(exist_ok=True)
    run.environment["PYTHONPATH"] = os.pathsep.join([str(site), str(ROOT)])
    sys.path.append(str(site))  # for the report, which this process writes
    for wheel in _wheels(carried):
        zipfile.ZipFile(wheel).extractall(site)
    _import(run)
    packed = carried / SOURCES
    if packed.exists() and packed.read_text() != source_hash():
        raise FailedError(f"{carried}: packed from other sources than these; run --pack again")


def build_step(carried: Path) -> Step:
    """The step that replaces a wheel that does not load. It takes time from the last steps."""
    return Step("build from source", 150, partial(build_from_source, carried=carried))


def build_from_source(run: Run, carried: Path) -> None:
    """Builds the package for the first GPU only, with the tools of the machine."""
    capability = run.program(
        run.find_tool("nvidia-smi"), "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0"
    )
    shutil.rmtree(run.work / SITE / "simpo_ext", ignore_errors=True)
    settings = {
        "SIMPO_CUDA": "ON",
        "SIMPO_CUDA_ARCHS": capability.strip().replace(".", ""),
        "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count()),
    }
    if (carried / HEADERS).is_dir():
        settings["SKBUILD_CMAKE_DEFINE"] = f"SIMPO_TORCH_INCLUDE={carried / HEADERS}"
    run.module(
        "pip",
        *("install", "--no-index", "--no-deps", "--no-build-isolation", "--target"),
        *(run.work / SITE, ROOT),
        environment=settings,
    )
    _import(run)


def _wheels(carried: Path) -> Sequence[Path]:
    """The carried wheels for this Python."""
    tag = f"-cp{sys.version_info.major}{sys.version_info.minor}-"
    wheels = sorted(carried.glob("*.whl"))
    fitting = [wheel for wheel in wheels if tag in wheel.name or "-none-any" in wheel.name]
    if not any(wheel.name.startswith("simpo_ext-") for wheel in fitting):
        names = ", ".join(wheel.name for wheel in wheels) or "none"
        raise FailedError(f"{carried}: expected a wheel simpo_ext-*{tag}*, got {names}")
    return fitting


def _import(run: Run) -> None:
    run.module("bench.common.machine", "--record", run.cases, "--expect-in", run.work / SITE)
    run.is_installed = True


def source_hash() -> str:
    """The hash of all files that are compiled or packed into the wheel."""
    digest = hashlib.sha256()
    files = [ROOT / "CMakeLists.txt", ROOT / "pyproject.toml"]
    for folder in ("csrc", "simpo_ext"):
        files += (
            path
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
        )
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


# ---- correctness and speed -------------------------------------------------------------------


def first_light(run: Run) -> None:
    """Runs about 250 cases of a few launches each: less than 10 s after the import of torch."""
    arguments = ("--select", "sanitizer") if run.is_dry else ()
    run.module("bench.first_light", "--device", run.device, "--record", run.cases, *arguments)


def logits(run: Run) -> None:
    """Times a copy, ours and F.cross_entropy on eight batches, and ours with a softcap on one.

    A round of the largest batch takes about 60 ms, and 9 rounds half a second. To compare a
    candidate with float64 moves 300 GB, which takes no longer.
    """
    _measure(run, "logits", "--candidates", "simpo_ext", "simpo_ext in place", "F.cross_entropy")


def linear(run: Run) -> None:
    """Times three budgets and the bare products, with all and with 40 % of the tokens scored.

    The products are 52 TFlop, which take 65 ms. A round takes about 0.8 s. It runs the forward, and
    the forward with backward, of three candidates, and three forms of the bare products.
    """
    candidates = ("simpo_ext", "simpo_ext, budget 0", "simpo_ext, unlimited")
    _measure(run, "linear", "--rounds", "3", "--candidates", *candidates)


def _measure(run: Run, kind: str, *options: str | Path, **environment: str) -> None:
    """Runs a benchmark, in a dry run on tiny cases."""
    quick = ("--quick", "--rounds", "1") if run.is_dry else ()
    run.module(
        "bench.gpu.measure",
        *(kind, "--device", run.device, "--record", run.cases, *options, *quick),
        environment=environment,
    )


def ncu(run: Run) -> None:
    """Profiles four kernels of 1 to 3 ms in a few passes each. The import of torch takes longer."""
    if run.is_dry:
        run.module("bench.gpu.ncu", "--device", "cpu", "--size", "8x8x1024")
        raise SkippedError("no GPU to profile; the profiled program ran on the CPU")
    run.find_tool("ncu")
    run.module("bench.gpu.ncu", "--record", run.cases)


# ---- tests and sanitizers --------------------------------------------------------------------


def _test_files(mark: str) -> list[Path]:
    """The files with tests of a mark. Imports of the other files cannot stop these tests."""
    marked = re.compile(rf"\bmark\.{mark}\b")
    return [path for path in sorted(TESTS.rglob("test_*.py")) if marked.search(path.read_text())]


def _pytest(run: Run, kind: str, mark: str, *arguments: str | Path, workers: int = 0) -> None:
    xdist = (
        ("-p", "xdist", "-n", str(workers)) if workers and importlib.util.find_spec("xdist") else ()
    )
    run.module(
        "pytest",
        *("-q", "-p", "no:cacheprovider", "--rootdir", ROOT, "-c", ROOT / "pyproject.toml"),
        *("-p", "bench.gpu.pytest_record", "--record", run.cases, "--record-kind", kind),
        *("--continue-on-collection-errors", "-m", mark, *xdist, *arguments, *_test_files(mark)),
        environment={
            "FAIL_WITHOUT_CUDA": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # plugins may warn, and warnings are errors
            "OMP_NUM_THREADS": "1",
        },
    )


def gpu_tests(run: Run) -> None:
    """Runs about 70 tests in one process: small tensors, CUDA graphs and streams."""
    _pytest(run, "gpu tests", "gpu", *(["--collect-only"] if run.is_dry else []))


def kernel_tests(run: Run) -> None:
    """Runs about 5000 tests of the ops, which send their tensors to the GPU and back.

    A test takes about 30 ms, most of it on the CPU. 12 workers first take 20 s for their imports.
    All of this is less than half of the budget.
    """
    arguments = ("-k", "test_pairs") if run.is_dry else ("--kernels=cuda",)
    workers = 1 if run.is_dry else min(12, os.cpu_count() or 1)
    _pytest(run, "kernel tests", "kernels", *arguments, workers=workers)


def _sanitize(run: Run, tool: str) -> None:
    """Runs first light under compute-sanitizer, with an allocation of its own for each tensor."""
    tool_command: tuple[str, ...] = ()
    if not run.is_dry:
        tool_command = (run.find_tool("compute-sanitizer"), "--tool", tool, "--error-exitcode", "9")
    run.module(
        "bench.first_light",
        *("--device", run.device, "--select", "sanitizer"),
        *("--record", run.cases, "--kind", tool),
        under=tool_command,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    if run.is_dry:
        raise SkippedError("no GPU for compute-sanitizer; its program ran on the CPU")


def memcheck(run: Run) -> None:
    """Checks about 1500 launches. The tool makes each about ten times slower."""
    _sanitize(run, "memcheck")


def racecheck(run: Run) -> None:
    """Checks the same launches for races in shared memory."""
    _sanitize(run, "racecheck")


# ---- peers, and the sweep --------------------------------------------------------------------


def peers(run: Run) -> None:
    """Times torch.compile and Liger like the candidates before. Two kernels are compiled first."""
    # On a CPU, compiling would take longer than everything else.
    setting = "TORCH_COMPILE_DISABLE" if run.is_dry else "TORCHINDUCTOR_COMPILE_THREADS"
    cases = () if run.is_dry else ("--cases", PEER_CASES)
    candidates = ("simpo_ext", "torch.compile", "Liger cross entropy")
    _measure(run, "logits", *cases, "--candidates", *candidates, **{setting: "1"})
    candidates = ("simpo_ext", "Liger SimPO", "Liger linear cross entropy")
    _measure(run, "linear", "--rounds", "1", "--candidates", *candidates)


def sweep(run: Run) -> None:
    """Times 12 variants of threads and loads in flight, in 9 rounds of 100 ms.

    Their compilation takes longer.
    """
    source, library = ROOT / "bench" / "cuda" / "sweep.cu", run.work / "sweep.so"
    flags = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-I", ROOT / "csrc")
    flags = (*flags, "-shared", "-Xcompiler", "-fPIC")
    target = "-arch=sm_90" if run.is_dry else "-arch=native"
    run.program(run.find_tool("nvcc"), *flags, target, source, "-o", library)
    if run.is_dry:
        raise SkippedError("no GPU for the sweep; it was compiled")
    _measure(run, "sweep", "--library", library)


def all_steps(carried: Path) -> list[Step]:
    """The steps and their budgets."""
    return [
        Step(INSTALL, 20, partial(install, carried=carried)),
        Step("first light", 40, first_light),
        Step("logits", 50, logits),
        Step("from hidden", 50, linear),
        Step("Nsight Compute", 40, ncu),
        Step("gpu tests", 60, gpu_tests),
        Step("kernel tests", 80, kernel_tests),
        Step("memcheck", 40, memcheck),
        Step("racecheck", 30, racecheck),
        Step("peers", 45, peers),
        Step("sweep", 25, sweep),
    ]
