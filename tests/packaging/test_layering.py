"""Forbidden dependencies between layers, checked in the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.paths import ROOT

INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
IMPORT = re.compile(r"^\s*(?:from|import)\s+([\w.]+)", re.MULTILINE)

# All headers of the API except build_info.h, which needs no torch.
API_HEADERS = tuple(f"simpo_ext/{name}" for name in ("detail/", "options", "simpo_ext", "vocab"))


# The trainers, and packages that they need.
TRAINERS = ("accelerate", "axolotl", "llamafactory", "peft", "pydantic", "transformers", "trl")


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
        ("csrc/python", ("core/", "cpu/", "cuda/", "ops/checks")),
        ("csrc/include", ("core/", "cpu/", "cuda/", "ops/", "python/")),
        ("csrc/examples", ("core/", "cpu/", "cuda/", "ops/", "python/", "simpo_ext/detail/")),
    ],
)
def test_sources_include_only_lower_layers(folder: str, others: tuple[str, ...]) -> None:
    for path, names in includes(folder).items():
        assert not [name for name in names if name.startswith(others)], path


def test_only_the_platform_header_includes_the_cuda_toolkit() -> None:
    # device.cu is host code that calls the runtime.
    users = {
        path.name
        for path, names in includes("csrc").items()
        if any(name.startswith(("cuda_", "cuda.h", "curand", "cub/")) for name in names)
    }
    assert users == {"platform.h", "device.cu"}


def test_the_op_library_includes_only_the_stable_abi() -> None:
    allowed = ("torch/csrc/stable/", "torch/headeronly/")
    for path, names in includes("csrc/ops").items():
        foreign = [name for name in names if name.startswith(("torch/", "ATen/", "c10/"))]
        assert all(name.startswith(allowed) for name in foreign), path


def test_the_python_module_includes_no_torch_header() -> None:
    for path, names in includes("csrc/python").items():
        assert not [name for name in names if name.startswith(("torch/", "ATen/", "c10/"))], path


@pytest.mark.parametrize(("folder", "suffix"), [("simpo_ext", ".py"), ("csrc/include", ".h")])
def test_front_ends_search_errors_for_tags_only(folder: str, suffix: str) -> None:
    reads_text = re.compile(
        r"\b(?:str|repr)\(\w*(?:err|exc)\w*\)|\w*(?:err|exc)\w*\.(?:args|what\()"
    )
    texts = [path.read_text() for path in sources(folder, suffix)]
    [reader] = [text for text in texts if reads_text.search(text)]
    assert "INDEX_ERROR_TAG" in reader or "kIndexErrorTag" in reader
    words = r"(?:labels\[|pairs\[|cu_seqlens\[|num_valid_tokens: |is out of range)"
    assert not re.findall(rf"[\"']{words}[\"']", reader)


def test_only_one_header_creates_errors_with_tags() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for folder in ("csrc/ops", "csrc/cpu", "csrc/cuda", "csrc/core")
        for path in sources(folder, ".h", ".cpp", ".cu", ".cuh")
        if re.search(r"ErrorTag\b|\[simpo_ext:", path.read_text())
    }
    assert users == {"csrc/ops/errors.h"}


def test_only_the_ops_package_uses_the_registered_ops() -> None:
    users = {
        path.parent.relative_to(ROOT).as_posix()
        for path in sources("simpo_ext", ".py")
        if "torch.ops.simpo_ext" in path.read_text()
    }
    assert users == {"simpo_ext/_ops"}


def imported_with(path: Path) -> Iterator[str]:
    """The modules that a file imports at import time, not those in bodies of functions."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*above, *([node.module] if node.module else [])])
            yield from (name, *(f"{name}.{alias.name}" for alias in node.names))
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            pending.extend(ast.iter_child_nodes(node))


# A part of the package imports from itself and from the parts before it. Its __init__ imports
# everything, and only the commands import it.
LEVELS = (
    "_C",
    "_ops",
    "_inputs",
    "_metrics",
    "presets",
    "options",
    "_calls",
    "distributed",
    "linear",
    "functional",
    "modules",
    "integrations",
    "cli",
    "__main__",
)


def package_modules() -> dict[str, Path]:
    """The package's Python modules by name."""
    modules = {}
    for path in sources("simpo_ext", ".py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imports_within(modules: dict[str, Path]) -> dict[str, set[str]]:
    """The modules of the package that each module imports, by full names."""
    return {
        name: {other for other in imported_with(path) if other in modules and other != name}
        for name, path in modules.items()
    }


def test_each_part_of_the_package_imports_only_lower_parts() -> None:
    modules = package_modules()
    assert {name.split(".")[1] for name in modules if "." in name} | {"_C"} == {*LEVELS}
    for name, others in imports_within(modules).items():
        if name == "simpo_ext":
            continue
        level = LEVELS.index(name.split(".")[1])
        for other in others - {"simpo_ext"}:
            assert LEVELS.index(other.split(".")[1]) <= level, f"{name} imports {other}"


def test_imports_have_no_cycles() -> None:
    # Imports of a package's __init__ are ignored: they come with every import from the package.
    modules = package_modules()
    imports = {
        name: {other for other in others if modules[other].name != "__init__.py"}
        for name, others in imports_within(modules).items()
    }
    reached: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in reached:
            for other in imports[name]:
                visit(other, (*trail, name))
            reached.add(name)

    for name in modules:
        visit(name, ())


def test_only_the_trl_integration_imports_a_trainer() -> None:
    users = {
        path.relative_to(ROOT).as_posix(): {name.split(".")[0] for name in imported_with(path)}
        for path in sources("simpo_ext", ".py")
    }
    found = {path: names & {*TRAINERS} for path, names in users.items() if names & {*TRAINERS}}
    assert found == {"simpo_ext/integrations/trl.py": {"trl"}}


def test_only_the_integrations_import_the_integrations() -> None:
    integrations = ROOT / "simpo_ext" / "integrations"
    for path in sources("simpo_ext", ".py"):
        if integrations not in path.parents:
            names = [name for name in imported_with(path) if "integrations" in name]
            assert not names, path


def test_the_integrations_import_no_trainer() -> None:
    script = (
        "import sys\n"
        "import simpo_ext.integrations.axolotl, simpo_ext.integrations.llamafactory\n"
        f"found = {{name.split('.')[0] for name in sys.modules}} & {{*{TRAINERS!r}}}\n"
        "sys.exit(f'imported: {found}' if found else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_oracle_does_not_import_the_package_nor_bench_the_tests() -> None:
    for path in (ROOT / "tests" / "support").glob("*oracle.py"):
        names = {name.split(".")[0] for name in IMPORT.findall(path.read_text())}
        assert not names & {"simpo_ext", "torch"}, path
    for path in (ROOT / "bench").rglob("*.py"):
        names = {name.split(".")[0] for name in IMPORT.findall(path.read_text())}
        assert not names & {"tests", "support"}, path
