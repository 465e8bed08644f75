"""The compiled library: linked libraries, symbols, ops, and imports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import simpo_ext
from simpo_ext import _C
from support.paths import ROOT

PACKAGE = Path(_C.__file__).parent
LIBRARY = PACKAGE / "lib" / "libsimpo_ext.so"


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def dynamic_entries(library: Path, tag: str) -> list[str]:
    return re.findall(rf"\({tag}\).*\[(.+)\]", output("readelf", "-d", library))


def test_the_library_links_libtorch_and_no_part_of_it() -> None:
    needed = dynamic_entries(LIBRARY, "NEEDED")
    assert "libtorch.so" in needed
    assert not [name for name in needed if name.startswith(("libc10", "libtorch_", "libcud"))]


def test_the_library_finds_the_torch_beside_it() -> None:
    assert dynamic_entries(LIBRARY, "RUNPATH") == ["$ORIGIN/../../torch/lib"]
    assert dynamic_entries(Path(_C.__file__), "RUNPATH") == ["$ORIGIN/lib"]


def test_the_python_module_does_not_link_torch() -> None:
    needed = dynamic_entries(Path(_C.__file__), "NEEDED")
    assert "libsimpo_ext.so" in needed
    assert not [name for name in needed if name.startswith(("libtorch", "libc10"))]


def test_the_library_exports_only_its_interface() -> None:
    symbols = output("nm", "-DC", "--defined-only", LIBRARY).splitlines()
    ours = {line.split(maxsplit=2)[2] for line in symbols if "simpo_ext" in line}
    assert {re.sub(r"\[abi:\w+\]|\(\)", "", name) for name in ours} == {
        "simpo_ext::cpu_capabilities",
        "simpo_ext::cuda_device_count",
        "simpo_ext_build_info",
        "simpo_ext_load_error",
    }


def test_the_library_uses_only_the_stable_abi_of_torch() -> None:
    undefined = output("nm", "-DC", "--undefined-only", LIBRARY)
    mangled = [line for line in undefined.splitlines() if re.search(r"\b(at|c10|torch)::", line)]
    assert not mangled


def test_the_package_contains_headers_and_cmake_files_but_no_libtorch() -> None:
    for header in ("simpo_ext.h", "vocab_parallel.h"):
        assert (PACKAGE / "include" / "simpo_ext" / header).is_file()
    config = Path(simpo_ext.cmake_prefix_path()) / "simpo_ext"
    assert (config / "simpo_extConfig.cmake").is_file()
    assert (config / "simpo_extConfigVersion.cmake").is_file()
    assert not list(PACKAGE.rglob("libtorch*"))


def test_every_op_has_kernels_for_cpu_and_cuda_tensors() -> None:
    # In a build without nvcc, the CUDA kernels raise an error.
    ops = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("simpo_ext::")]
    assert len(ops) == 20
    for name in ops:
        for key in ("CPU", "CUDA", "Meta"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)


def test_build_info() -> None:
    info = simpo_ext.build_info()
    assert info["version"] == simpo_ext.__version__
    assert info["torch_target"] == "2.10"
    assert info["cpu_capability"] == simpo_ext.cpu_capability()
    capabilities = _C.cpu_capabilities()
    assert info["cpu_capability"] in capabilities
    if not os.environ.get("SIMPO_CPU_CAPABILITY"):
        assert info["cpu_capability"] == capabilities[-1]
    assert re.match(r"(GCC|Clang) \d", str(info["compiler"]))
    if info["cuda_runtime_version"]:
        assert info["cuda_archs"]
    else:
        assert info["cuda_archs"] == ""


def test_importing_the_package_imports_no_optional_packages() -> None:
    code = (
        "import sys, simpo_ext; "
        "print([m for m in ('matplotlib', 'rich', 'tqdm', 'trl', 'transformers') "
        "if m in sys.modules and m not in before])"
    )
    # Modules that torch imports do not count.
    code = f"import sys, torch; before = set(sys.modules); {code}"
    assert output(sys.executable, "-c", code).strip() == "[]"


def test_a_source_checkout_in_the_current_directory_works() -> None:
    command = [sys.executable, "-c", "import simpo_ext; print(simpo_ext.build_info()['version'])"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == simpo_ext.__version__


def test_another_copy_of_the_library_is_refused(
    tmp_path: Path,
) -> None:
    copy = shutil.copy(LIBRARY, tmp_path / "libother.so")
    code = f"import torch, ctypes; ctypes.CDLL({str(copy)!r}); import simpo_ext"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert "another copy is loaded" in done.stderr


def test_the_same_library_may_be_loaded_before() -> None:
    code = f"import torch, ctypes; ctypes.CDLL({str(LIBRARY)!r}); import simpo_ext; print('ok')"
    assert output(sys.executable, "-c", code).strip() == "ok"
