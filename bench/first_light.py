"""First light: every op in every dtype, forward and backward, against float64.

    python -m bench first-light [--device cuda|cpu] [--select sanitizer] [--record FILE.jsonl]

When a case (first_light_cases.py) ends, the program prints one line of JSON: the error of each
output and gradient, and the largest error allowed. The exit status is 0 if all cases are right.

Every tensor that the kernels read ends where its allocation ends, and its rows start at odd
elements. Without torch's caching allocator (PYTORCH_NO_CUDA_MEMORY_CACHING=1), compute-sanitizer's
memcheck sees an access beyond the end. Torch fills new tensors with NaN, so that an element that no
kernel writes is an error.

Where torch shows its cuBLAS, dhidden is added up inside cuBLAS's products: add_partial_kernel and
half of hidden_gradient_kernel do not run then.

An illegal access makes all later CUDA calls of its process fail. The program then replaces itself
with a new process for the remaining cases.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic algorithms need

import torch

from bench import records
from bench.first_light_cases import all_cases
from bench.first_light_checks import Case

ROOT = Path(__file__).resolve().parent.parent


def run_case(case: Case, device: torch.device, kind: str) -> dict[str, Any]:
    """Runs one case and returns its record."""
    began = time.perf_counter()
    record: dict[str, Any] = {
        "kind": kind,
        "name": case.problem.name,
        "dtype": str(case.dtype).removeprefix("torch."),
    }
    try:
        checks = case.checks(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        is_right = all(check.is_right for check in checks)
        record["status"] = "right" if is_right else "wrong"
        record["checks"] = {
            check.name: [records.number(check.error), check.bound] for check in checks
        }
    except Exception as error:
        record["status"] = "failed"
        record["reason"] = f"{type(error).__name__}: {error}"[:500]
        record["traceback"] = traceback.format_exc()[-1500:]
    record["seconds"] = round(time.perf_counter() - began, 4)
    return record


def _is_usable(device: torch.device) -> bool:
    """Whether the device still takes work after a case has failed."""
    try:
        torch.ones(1, device=device).item()
    except RuntimeError:
        return False
    return True


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench first-light", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--select", choices=("all", "sanitizer"), default="all", help="sanitizer: fewer layouts"
    )
    parser.add_argument("--record", type=Path, metavar="FILE.jsonl", help="also append here")
    parser.add_argument("--kind", default="first light", help="kind of the records")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--failures", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a CUDA device, torch finds none")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cases.

    Returns:
        0 if all of them were right, else 1.
    """
    options = _parse(arguments)
    device = torch.device(options.device)
    # This setting also makes torch fill new tensors with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    cases = [case for case in all_cases() if options.select == "all" or case.problem.for_sanitizer]
    failures = options.failures
    for index in range(options.first, len(cases)):
        record = run_case(cases[index], device, options.kind)
        records.write(record, options.record)
        failures += record["status"] != "right"
        if record["status"] == "failed" and not _is_usable(device):
            again = [*sys.argv[1:], "--first", str(index + 1), "--failures", str(failures)]
            os.execv(sys.executable, [sys.executable, "-m", "bench.first_light", *again])
    print(f"{len(cases) - failures} of {len(cases)} cases right on {device.type}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
