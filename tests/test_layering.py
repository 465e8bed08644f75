"""What must never depend on what, read from the sources."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
IMPORT = re.compile(r"^\s*(?:from|import)\s+([\w.]+)", re.MULTILINE)

# But for build_info.h, which needs no torch.
API_HEADERS = tuple(f"simpo_ext/{name}" for name in ("detail/", "options", "simpo_ext", "vocab"))


def sources(folder: str, *suffixes: str) -> list[Path]:
    found = [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    assert found, f"nothing to read in {folder}"
    return found


def includes(folder: str) -> dict[Path, list[str]]:
    suffixes = (".h", ".cpp", ".cu", ".cuh", ".c", ".inl")
    return {path: INCLUDE.findall(path.read_text()) for path in sources(folder, *suffixes)}


@pytest.mark.parametrize("folder", ["csrc/core", "csrc/cpu", "csrc/cuda"])
def test_kernels_include_neither_torch_nor_python(folder: str) -> None:
    foreign = re.compile(r"^(torch|ATen|c10|pybind11)/|^Python\.h$")
    for path, names in includes(folder).items():
        assert not [name for name in names if foreign.match(name)], path


@pytest.mark.parametrize(
    ("folder", "others"),
    [
        ("csrc/core", ("cpu/", "cuda/", "ops/", "python/", "simpo_ext/")),
        ("csrc/cpu", ("cuda/", "ops/", "python/", "simpo_ext/")),
        ("csrc/cuda", ("cpu/", "ops/", "python/", "simpo_ext/")),
        ("csrc/ops", ("python/", *API_HEADERS)),
        ("csrc/python", ("core/", "cpu/", "cuda/", "ops/ops", "ops/checks")),
        ("csrc/include", ("core/", "cpu/", "cuda/", "ops/", "python/")),
        ("csrc/examples", ("core/", "cpu/", "cuda/", "ops/", "python/", "simpo_ext/detail/")),
    ],
)
def test_kernels_include_only_what_lies_below_them(folder: str, others: tuple[str, ...]) -> None:
    for path, names in includes(folder).items():
        assert not [name for name in names if name.startswith(others)], path


def test_kernels_reach_the_cuda_toolkit_through_the_platform_header_alone() -> None:
    # device.cu, host code, asks the runtime about devices and errors.
    users = {
        path.name
        for path, names in includes("csrc").items()
        if any(name.startswith(("cuda_", "cuda.h", "curand", "cub/")) for name in names)
    }
    assert users == {"platform.h", "device.cu"}


def test_the_op_library_includes_the_stable_abi_alone() -> None:
    allowed = ("torch/csrc/stable/", "torch/headeronly/")
    for path, names in includes("csrc/ops").items():
        foreign = [name for name in names if name.startswith(("torch/", "ATen/", "c10/"))]
        assert all(name.startswith(allowed) for name in foreign), path


def test_the_python_module_includes_no_torch_header() -> None:
    for path, names in includes("csrc/python").items():
        assert not [name for name in names if name.startswith(("torch/", "ATen/", "c10/"))], path


def test_only_ops_py_touches_the_registered_ops() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in sources("simpo_ext", ".py")
        if "torch.ops.simpo_ext" in path.read_text()
    }
    assert users == {"simpo_ext/_ops.py"}


def test_functional_imports_neither_modules_nor_integrations() -> None:
    for name in ("functional.py", "_ops.py", "_checks.py", "_options.py"):
        text = (ROOT / "simpo_ext" / name).read_text()
        above = r"^\s*(from|import)\b.*\b(modules|integrations|demo|check|info)\b"
        assert not re.search(above, text, re.MULTILINE), name


def test_the_oracle_never_imports_the_package_and_bench_never_the_tests() -> None:
    oracle = IMPORT.findall((ROOT / "tests" / "oracle.py").read_text())
    assert not [name for name in oracle if name.split(".")[0] in ("simpo_ext", "torch")]
    for path in (ROOT / "bench").rglob("*.py"):
        names = {name.split(".")[0] for name in IMPORT.findall(path.read_text())}
        assert not names & {"tests", "oracle", "batches"}, path
