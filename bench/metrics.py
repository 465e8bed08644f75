"""What the metrics on request cost: the forward of a loss with and without its report.

    python -m bench metrics [--rounds N] [--device cpu|cuda] [--small]

At [2, 512, 128256] in bfloat16 and [4, 512, 32000] in float32, by way of logits, and at the first
from hidden states of 1024. All positions but the first tenth, a prompt, are scored. First the
reported values are compared with those of eager torch in float64; then the forwards take turns, and
medians and their ratios to the forward without a report are printed. With --small the shapes are
small ones, to try the program.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.timing import Subject, interleaved, make_clock
from simpo_ext import SimPOOutput, linear_simpo_loss, simpo_loss

ROUNDS = 9
HIDDEN = 1024
REPORTS: dict[str, tuple[Any, ...]] = {
    "no report": (),
    "logits, entropy": ("logits", "entropy"),
    "all three": ("logits", "logits_all", "entropy"),
}
TOLERANCE = 1e-4  # of float32; what bfloat16 rounds is rounded for both
LINEAR_TOLERANCE = 1e-2  # but for the mean of logits that are never formed, and so never rounded


class Shape(NamedTuple):
    """Of a batch of logits."""

    batch: int
    time: int
    vocabulary: int
    dtype: torch.dtype


SHAPES = (Shape(2, 512, 128256, torch.bfloat16), Shape(4, 512, 32000, torch.float32))
SMALL = (Shape(2, 16, 5003, torch.bfloat16), Shape(4, 16, 3001, torch.float32))


def _labels(shape: Shape, device: torch.device) -> Tensor:
    labels = torch.randint(shape.vocabulary, (shape.batch, shape.time), device=device)
    labels[:, : 1 + shape.time // 10] = -100
    return labels


def _eager_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """By definition, one sequence at a time."""
    sums: dict[str, list[Tensor]] = {}
    pairs = len(labels) // 2
    for row in range(len(labels)):
        z = logits[row].double()
        logps = z.log_softmax(-1)
        scored = F.pad(labels[row, 1:] != -100, (0, 1), value=False)
        side = "chosen" if row < pairs else "rejected"
        for name, values in (
            (f"logits/{side}", z.mean(-1)[scored]),
            (f"logits_all/{side}", z.mean(-1)),
            (f"entropy/{side}", -(logps.exp() * logps).sum(-1)[scored]),
        ):
            sums.setdefault(name, []).append(values)
    return {name: torch.cat(values).mean().item() for name, values in sums.items()}


def _verify(call: Callable[..., SimPOOutput], expected: dict[str, float], tolerance: float) -> None:
    plain, got = call(()), call(REPORTS["all three"])
    if not torch.equal(plain.loss, got.loss):
        raise SystemExit(f"the loss is {plain.loss}, and with a report {got.loss}")
    metrics = got.metrics()
    for name, want in expected.items():
        if not abs(metrics[name] - want) <= tolerance * max(1.0, abs(want)):
            raise SystemExit(f"{name}: expected {want}, got {metrics[name]}")


def _measure(
    what: str, call: Callable[..., SimPOOutput], device: torch.device, rounds: int
) -> None:
    def subject(report: Any) -> Subject:
        return Subject(lambda: None, {"forward": lambda _: call(report)})

    subjects = {name: subject(report) for name, report in REPORTS.items()}
    times = interleaved(subjects, make_clock(device), rounds)
    without = times["no report"]["forward"].median_ms
    print(what)
    for name, phases in times.items():
        each = phases["forward"]
        print(
            f"  {name:16s} {each.median_ms:9.2f} ms  ({each.min_ms:.2f} to {each.max_ms:.2f})"
            f"  x {each.median_ms / without:.3f}"
        )


def main() -> None:
    """Verifies and measures every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    shapes = SMALL if arguments.small else SHAPES
    for shape in shapes:
        labels = _labels(shape, device)
        logits = torch.randn(shape[:3], dtype=shape.dtype, device=device)
        logits *= 3.0

        def from_logits(report: Any, logits: Tensor = logits, labels: Tensor = labels) -> Any:
            return simpo_loss(logits, labels, report=report)

        _verify(from_logits, _eager_metrics(logits, labels), TOLERANCE)
        what = f"simpo_loss of logits {list(shape[:3])} {shape.dtype}"
        _measure(what, from_logits, device, arguments.rounds)
        del from_logits, logits

    shape = shapes[0]
    labels = _labels(shape, device)
    hidden = torch.randn(*shape[:2], HIDDEN, dtype=shape.dtype, device=device)
    weight = torch.randn(shape.vocabulary, HIDDEN, dtype=shape.dtype, device=device) / 16.0

    def from_hidden(report: Any) -> SimPOOutput:
        return linear_simpo_loss(hidden, weight, labels, report=report)

    _verify(from_hidden, _eager_metrics(F.linear(hidden, weight), labels), LINEAR_TOLERANCE)
    what = f"linear_simpo_loss of {list(hidden.shape)} and {list(weight.shape)} {shape.dtype}"
    _measure(what, from_hidden, device, arguments.rounds)


if __name__ == "__main__":
    main()
