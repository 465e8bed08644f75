"""What surrounds the work: a call on almost no data, and metrics on request.

At [2, 8, 64] on one thread, a call consists of Python, dispatch and autograd. If calls follow one
another, their code and data stay in the caches. Between two steps of a training loop other code
runs, so a call is also timed after a pass over a buffer larger than the caches.

``report=`` is measured on whole batches, all positions of which are scored but the first tenth: the
forward with and without it, from logits and from hidden states. First, the reported values are
compared with those of eager torch in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.common import cases
from bench.common.cases import DTYPES, IGNORE_INDEX, Batch
from bench.common.measure import FORWARD_BACKWARD, verify
from bench.common.peers import OURS, PRINCETON_FLOAT32, Candidate
from bench.common.tables import aligned, digits
from bench.common.timing import CpuClock, Subject, interleaved
from bench.logits import LogitsProblem
from simpo_ext import SimPOOutput, linear_simpo_loss, simpo_loss
from simpo_ext._ops import fast_path
from simpo_ext._ops.fast_path import is_plain_call

ROUNDS, CALLS = 15, 50
REGISTERED_OPS = "simpo_ext without its fast path"
EVICTING_ELEMENTS = 2**25  # of float32: several times any cache

REPORTS: dict[str, tuple[Any, ...]] = {
    "no report": (),
    "logits, entropy": ("logits", "entropy"),
    "logits, logits_all, entropy": ("logits", "logits_all", "entropy"),
}
TOLERANCE = 1e-4  # of float32; bfloat16 inputs are the same for both
LINEAR_TOLERANCE = 1e-2  # the reference rounds the logits to bfloat16, and this project does not

BATCHES = (
    cases.synthetic(2, 512, 128256, "bfloat16", 0.9),
    cases.synthetic(4, 512, 32000, "float32", 0.9),
    cases.synthetic(2, 512, 128256, "bfloat16", 0.9, hidden=1024),
)
QUICK_BATCHES = (
    cases.synthetic(2, 16, 5003, "bfloat16", 0.9),
    cases.synthetic(2, 16, 5003, "bfloat16", 0.9, hidden=64),
)


def _print(title: str, subjects: dict[str, Subject], rounds: int, unit: str, scale: float) -> None:
    """Times the subjects in turns, and prints multiples of the first one's time."""
    times = {name: each["call"] for name, each in interleaved(subjects, CpuClock(), rounds).items()}
    first = next(iter(times.values())).median_ms
    rows = [[title, *(f"{kind} {unit}" for kind in ("median", "min", "max")), "x first"]]
    for name, each in times.items():
        values = (each.median_ms * scale, each.min_ms * scale, each.max_ms * scale)
        rows.append([name, *map(digits, values), f"{each.median_ms / first:.3f}"])
    print("", *aligned(rows), sep="\n", flush=True)


# ---- a call ----------------------------------------------------------------------------------


def _by_registered_ops(candidate: Candidate) -> Candidate:
    """This project's candidate without its fast path."""

    def forward(*inputs: Any) -> Any:
        fast_path.is_plain_call = lambda *_: False
        try:
            return candidate.forward(*inputs)
        finally:
            fast_path.is_plain_call = is_plain_call

    return replace(candidate, name=REGISTERED_OPS, load=lambda: forward)


def measure_calls(rounds: int) -> None:
    """Forward and backward of this project's loss and of the eager formula, on one thread.

    This project's is also measured without its fast path, which calls the kernels directly.
    """
    problem = LogitsProblem(cases.synthetic(2, 8, 64, "float32", 0.5))
    evicting = torch.ones(EVICTING_ELEMENTS)
    in_a_row: dict[str, Subject] = {}
    cold: dict[str, Subject] = {}
    ours, eager = (problem.candidate(name) for name in (OURS, PRINCETON_FLOAT32))
    for candidate in (ours, _by_registered_ops(ours), eager):
        name = candidate.name
        row = verify(problem, candidate)
        if row["status"] != "right":
            raise SystemExit(f"{name}: {row['status']}: {row['reason']}")

        def call(_: Any, times: int, candidate: Candidate = candidate) -> None:
            for _ in range(times):
                problem.lap(candidate, FORWARD_BACKWARD, problem.prepare(candidate))

        in_a_row[name] = Subject(lambda: None, {"call": partial(call, times=CALLS)})
        cold[name] = Subject(lambda: evicting.add_(1.0), {"call": partial(call, times=1)})
    title = "[2, 8, 64], forward and backward"
    _print(f"{title}, calls in a row", in_a_row, rounds, "us", 1e3 / CALLS)
    _print(f"{title}, after other work", cold, rounds, "us", 1e3)


# ---- metrics on request ----------------------------------------------------------------------


def eager_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """By definition, in float64, one sequence at a time."""
    sums: dict[str, list[Tensor]] = {}
    scored = cases.following(labels) != IGNORE_INDEX
    for row in range(len(labels)):
        z = logits[row].double()
        logps = z.log_softmax(-1)
        side = "chosen" if row < len(labels) // 2 else "rejected"
        for name, values in (
            (f"logits/{side}", z.mean(-1)[scored[row]]),
            (f"logits_all/{side}", z.mean(-1)),
            (f"entropy/{side}", -(logps.exp() * logps).sum(-1)[scored[row]]),
        ):
            sums.setdefault(name, []).append(values)
    return {name: torch.cat(values).mean().item() for name, values in sums.items()}


def verify_reports(
    call: Callable[..., SimPOOutput], expected: dict[str, float], tolerance: float
) -> None:
    """Ends the program if a report changes the loss, or if a value of it is wrong."""
    plain, found = call(report=()), call(report=REPORTS["logits, logits_all, entropy"])
    if not torch.equal(plain.loss, found.loss):
        raise SystemExit(f"the loss is {plain.loss}, and with a report {found.loss}")
    metrics = found.metrics()
    for name, value in expected.items():
        if not abs(metrics[name] - value) <= tolerance * max(1.0, abs(value)):
            raise SystemExit(f"{name}: expected {value}, got {metrics[name]}")


def measure_reports(batch: Batch, rounds: int) -> None:
    """The forward with each report."""
    torch.manual_seed(0)
    labels = cases.masked(cases.make_labels(batch), batch)
    shape, dtype = (batch.batch, batch.time), DTYPES[batch.dtype]
    if batch.hidden:
        hidden = torch.randn(*shape, batch.hidden, dtype=dtype)
        weight = torch.randn(batch.vocabulary, batch.hidden, dtype=dtype) / 16.0
        call = partial(linear_simpo_loss, hidden, weight, labels)
        verify_reports(call, eager_metrics(F.linear(hidden, weight), labels), LINEAR_TOLERANCE)
    else:
        logits = torch.randn(*shape, batch.vocabulary, dtype=dtype) * 3.0
        call = partial(simpo_loss, logits, labels)
        verify_reports(call, eager_metrics(logits, labels), TOLERANCE)

    def subject(report: Any) -> Subject:
        return Subject(lambda: None, {"call": lambda _: call(report=report)})

    subjects = {name: subject(report) for name, report in REPORTS.items()}
    _print(f"{batch.name}, forward", subjects, rounds, "ms", 1.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints.

    Returns:
        0. A wrong value ends the program.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench overhead", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="tiny batches, to try the program")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    for batch in QUICK_BATCHES if options.quick else BATCHES:
        measure_reports(batch, options.rounds)
    torch.set_num_threads(1)
    measure_calls(options.rounds)
    return 0
