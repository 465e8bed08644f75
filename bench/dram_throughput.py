"""How much of the peak DRAM throughput the two streaming kernels reach, by Nsight Compute.

    python -m bench.dram_throughput FILE.json [--size NxV]

Runs itself under ncu, with the clocks as they are, and writes what ncu read, or why it read
nothing. Exit status 0 also where ncu is missing or not allowed to read the counters.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ("token_logps_kernel", "token_logps_backward_kernel")
PERCENT = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
DURATION = "gpu__time_duration.sum"
NANOSECONDS = {"ns": 1.0, "nsecond": 1.0, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6}
SIZE = "16384x128256"


def run_kernels(size: str) -> None:
    """One forward and one backward: the process that is profiled."""
    import torch

    import simpo_ext
    from bench.workload import Size, make_workload

    workload = make_workload(Size.parse(size), 1.0, torch.device("cuda"))
    logits = workload.logits.requires_grad_()
    logps = simpo_ext.token_logps(logits, workload.labels, shift=False)
    torch.autograd.grad(logps, logits, workload.upstream)
    torch.cuda.synchronize()


def parse_ncu(output: str) -> list[dict[str, Any]]:
    """The kernels in what ``ncu --csv`` printed: one row for each kernel and metric."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[start:]):
        kernel = next((k for k in KERNELS if f"{k}<" in row["Kernel Name"] + "<"), None)
        if kernel is None:
            continue
        found = kernels.setdefault(row["ID"], {"kernel": kernel})
        value = float(row["Metric Value"].replace(",", ""))
        if row["Metric Name"] == PERCENT:
            found["dram_percent"] = value
        elif row["Metric Name"] == DURATION:
            found["milliseconds"] = value * NANOSECONDS[row["Metric Unit"]] / 1e6
    return [kernel for kernel in kernels.values() if len(kernel) == 3]


def measure(size: str) -> dict[str, Any]:
    """What ncu read of both kernels, or the reason why not."""
    if shutil.which("ncu") is None:
        return {"available": False, "reason": "there is no ncu"}
    command = ["ncu", "--clock-control", "none", "--metrics", f"{PERCENT},{DURATION}", "--csv"]
    command += ["--kernel-name", "regex:token_logps", "--launch-count", "2"]
    command += [sys.executable, "-m", "bench.dram_throughput", "--run-kernels", "--size", size]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
        )
    except (OSError, subprocess.SubprocessError) as error:
        return {"available": False, "reason": f"{type(error).__name__}: {error}"}
    kernels = parse_ncu(result.stdout)
    if {kernel["kernel"] for kernel in kernels} != set(KERNELS):
        output = (result.stdout + result.stderr).strip().splitlines()
        said = [line for line in output if "==ERROR==" in line] or output[-1:]
        return {"available": False, "reason": " ".join(said) or f"ncu: {result.returncode}"}
    return {"available": True, "size": size, "kernels": kernels}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes, or is what is measured.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description="DRAM throughput of the streaming kernels.")
    parser.add_argument("json", type=Path, nargs="?", metavar="FILE.json")
    parser.add_argument("--size", default=SIZE, metavar="NxV")
    parser.add_argument("--run-kernels", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run_kernels:
        run_kernels(options.size)
        return 0
    if options.json is None:
        parser.error("FILE.json: expected where to write the result")
    result = measure(options.size)
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
