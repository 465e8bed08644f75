"""The machine as JSON: GPU, driver, toolkit, torch and the CPU.

python bench/machine.py FILE.json
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PEERS = ("triton", "liger-kernel", "quack-kernels", "trl", "transformers", "cut-cross-entropy")


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """What there is; null where there is none."""
    facts: dict[str, Any] = {
        "gpu": None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks": _output(
            "nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"
        ),
        "nvcc": (_output("nvcc", "--version") or "").rpartition("\n")[2] or None,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "packages": {package: _version(package) for package in PEERS},
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        facts.update(
            gpu=gpu.name,
            compute_capability=f"{gpu.major}.{gpu.minor}",
            multiprocessors=gpu.multi_processor_count,
            memory_gib=gpu.total_memory / 2**30,
            l2_mib=gpu.L2_cache_size / 2**20,
        )
    return facts


def main() -> None:
    """Prints the facts, and writes them."""
    facts = describe()
    Path(sys.argv[1]).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for name, value in facts.items():
        print(f"  {name:20s} {value}")


if __name__ == "__main__":
    main()
