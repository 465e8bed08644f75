"""The machine as JSON: GPU, driver, toolkit, torch and the CPU.

python -m bench.common.machine [--record FILE.jsonl] [--expect-in FOLDER]
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench import records
from bench.common.processes import ROOT

PEERS = ("triton", "liger-kernel", "quack-kernels", "trl", "transformers", "cut-cross-entropy")


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def describe_cpu() -> dict[str, Any]:
    """The CPU, its caches and how memory is paged; null where the system does not say."""
    info = _read("/proc/cpuinfo") or ""
    fields = dict(re.findall(r"^([a-z ]+?)\s*: (.+)$", info.partition("\n\n")[0], re.MULTILINE))
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(f"{index}/{name}") for name in ("level", "type", "size"))
        caches[f"L{level}{'' if kind == 'Unified' else ' ' + str(kind).lower()}"] = size
    memory = re.search(r"MemTotal:\s*(\d+) kB", _read("/proc/meminfo") or "")
    pages = _read("/sys/kernel/mm/transparent_hugepage/enabled") or ""
    chosen = re.search(r"\[(\w+)\]", pages)
    return {
        "name": fields.get("model name") or platform.machine(),
        "family": fields.get("cpu family"),
        "model": fields.get("model"),
        "cores": os.cpu_count(),
        "caches": caches,
        "memory_gib": int(memory[1]) / 2**20 if memory else None,
        "kernel": platform.release(),
        "transparent_huge_pages": chosen[1] if chosen else None,
    }


def slug(text: str) -> str:
    """Of a name, what a file can be called."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def commit() -> str | None:
    """The checked out commit, and whether files differ from it; None outside of a checkout."""
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    return head and head + (" with changes" if changed else "")


def describe_software() -> dict[str, Any]:
    """Versions, and how this project was built and runs."""
    import simpo_ext

    info = simpo_ext.build_info()
    return {
        "torch": torch.__version__,
        **{package: version(package) for package in PEERS if version(package)},
        "simpo_ext": str(info["version"]),
        "level": simpo_ext.cpu_capability(),
        "compiler": str(info["compiler"]),
        "threads": torch.get_num_threads(),
    }


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
        "packages": {package: version(package) for package in PEERS},
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


def describe_package(folder: Path | None) -> tuple[dict[str, Any], str]:
    """Facts about simpo_ext, and an error if its import fails or comes from another folder."""
    try:
        import simpo_ext

        library = Path(simpo_ext._C.__file__)
    except Exception as error:  # a library that does not load may raise anything
        return {"simpo_ext": None}, f"{type(error).__name__}: {error}"
    facts = {"simpo_ext": simpo_ext.__version__, "build": simpo_ext.build_info()}
    if folder is not None and folder.resolve() not in library.resolve().parents:
        return facts, f"simpo_ext: expected it in {folder}, got {library}"
    return facts, ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the facts, and records them.

    Returns:
        0 if simpo_ext works and is where it is expected, else 1.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.common.machine")
    parser.add_argument("--record", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--expect-in", type=Path, metavar="FOLDER", help="where simpo_ext must be")
    options = parser.parse_args(arguments)
    package, error = describe_package(options.expect_in)
    facts = {"kind": "machine", **describe(), **package, "error": error}
    for name, value in facts.items():
        print(f"  {name:20s} {value}")
    if options.record is not None:
        records.append(options.record, facts)
    return 1 if error else 0


if __name__ == "__main__":
    sys.exit(main())
