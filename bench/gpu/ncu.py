"""Asks Nsight Compute what limits the streaming kernels: DRAM, issue slots, special functions.

    python -m bench.gpu.ncu [--device cuda] [--size BxTxV] [--record FILE.jsonl]

The program runs itself under ncu, which does not lock the clocks, and records the metrics of each
kernel. If ncu does not know all metrics on this GPU, the program asks again for the first ones
only. With --device cpu it runs the same work without a profiler.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import records

SIZE = "8x2048x128256"
SOFTCAPS = (None, 30.0)  # a forward and a backward of each
METRICS = {
    "gpu__time_duration.sum": "ms",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue slots %",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": "special functions %",
}
CERTAIN = 2  # the first so many metrics exist on every GPU
NANOSECONDS = {"ns": 1.0, "nsecond": 1.0, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6}


def run_kernels(size: str, device: str) -> None:
    """Runs forward and backward without and with a softcap, in the process that is profiled."""
    import torch

    import simpo_ext
    from bench.common import cases

    batch = cases.synthetic(*map(int, size.split("x")), "bfloat16")
    labels = cases.make_labels(batch).to(device)
    logits = cases.make_logits(batch, labels).requires_grad_()
    for softcap in SOFTCAPS:
        logps = simpo_ext.token_logps(logits, labels, softcap=softcap)
        torch.autograd.grad(logps.sum(), logits)
    if device == "cuda":
        torch.cuda.synchronize()


def parse(output: str) -> list[dict[str, Any]]:
    """Reads the kernels from ``ncu --csv``, which prints one row for each kernel and metric."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[start:]):
        name = METRICS.get(row["Metric Name"] or "")
        try:
            value = float(row["Metric Value"].replace(",", ""))
        except (AttributeError, ValueError):  # n/a
            continue
        if name is None:
            continue
        if name == "ms":
            if row["Metric Unit"] not in NANOSECONDS:
                continue
            value *= NANOSECONDS[row["Metric Unit"]] / 1e6
        kernel = row["Kernel Name"].removeprefix("void ").rpartition(">(")[0] + ">"
        kernel = kernel.replace("simpo_ext::", "").removeprefix("cuda::")
        kernels.setdefault(row["ID"], {"kernel": kernel, "metrics": {}})["metrics"][name] = value
    return list(kernels.values())


def _profile(size: str, metrics: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = ["ncu", "--clock-control", "none", "--metrics", ",".join(metrics), "--csv"]
    command += ["--kernel-name", "regex:token_logps", sys.executable, "-m", "bench.gpu.ncu"]
    command += ["--run-kernels", "--size", size]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Profiles the kernels and records their metrics, or runs the kernels to be profiled.

    Returns:
        0 if ncu reported metrics of every kernel, else 1.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.ncu", description="What limits the streaming kernels."
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", default=SIZE, metavar="BxTxV")
    parser.add_argument("--record", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--run-kernels", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run_kernels or options.device == "cpu":
        run_kernels(options.size, options.device)
        return 0
    for metrics in (list(METRICS), list(METRICS)[:CERTAIN]):
        done = _profile(options.size, metrics)
        kernels = parse(done.stdout)
        for kernel in kernels:
            records.write({"kind": "ncu", "size": options.size, **kernel}, options.record)
        if len(kernels) >= 2 * len(SOFTCAPS):
            return 0
        print(done.stdout[-2000:], done.stderr[-2000:], sep="\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
