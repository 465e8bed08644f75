"""A report of this build and this machine."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch

from .. import build_info
from .._ops.library import _C


def run() -> int:
    """Prints the report.

    Returns:
        0.
    """
    for title, rows in {
        "simpo_ext": _build_rows(),
        "torch": _torch_rows(),
        "machine": _machine_rows(),
    }.items():
        print(title)
        for name, value in rows.items():
            print(f"  {name:16s} {value}")
    return 0


def _build_rows() -> dict[str, str]:
    build = build_info()
    runtime = int(build["cuda_runtime_version"])
    rows = {
        "version": str(build["version"]),
        "location": str(Path(_C.__file__).parent),
        "compiler": str(build["compiler"]),
        "CPU kernels": f"{build['cpu_capability']} of {', '.join(_C.cpu_capabilities())}",
        "torch ABI target": f"{build['torch_target']} and later",
        "pybind11": str(build["pybind11"]),
    }
    if runtime == 0:
        rows["CUDA kernels"] = "none: built without nvcc"
    else:
        version = f"{runtime // 1000}.{runtime % 1000 // 10}"
        count = _C.cuda_device_count()
        devices = f"devices: {count}" if count >= 0 else f"no device (cudaError {-count})"
        rows["CUDA kernels"] = f"runtime {version} for {build['cuda_archs']}; {devices}"
    return rows


def _torch_rows() -> dict[str, str]:
    rows = {
        "version": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "CUDA": str(torch.version.cuda or "none"),
    }
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows[f"cuda:{index}"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    return rows


def _machine_rows() -> dict[str, str]:
    rows = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "CPU": f"{os.cpu_count()} x {_cpu_name()}",
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        rows["memory"] = f"{memory / 2**30:.1f} GiB"
    return rows


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
