"""The loss from logits beside its peers and the floor, on this machine's CPU.

One piece of work for all: mean log-probabilities of the completions, SimPO's loss of the pairs, and
the gradient of the logits (common/peers.py). The forward keeps what its backward needs. Each batch
is measured with the default allocator, and again with huge pages for all, without the
smallest share. In float32 the upcast form of the formula is the formula, and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from bench.common import cases, peers, program
from bench.common.cases import Batch, Case
from bench.common.floor import LogitsFloor
from bench.common.measure import FORWARD, FORWARD_BACKWARD, Problem
from bench.common.peers import Candidate
from bench.common.reference import LogitsTruth

CPU = torch.device("cpu")

# Relative errors that are allowed: of the loss, and of a row of the gradient. The rounding of a
# bfloat16, which has 8 bits, is up to 2^-9 of a number.
FLOAT32_ARITHMETIC = 1e-5
OUR_LOSS = 1e-6  # on a CPU, whose exponential is not an approximation
BFLOAT16_ROUNDING = 2.0**-8
# Log-probabilities and their mean rounded to bfloat16, at rewards of about 10.
BFLOAT16_ARITHMETIC = 0.125

SMALL = cases.synthetic(2, 16, 512, "float32")
SMALL_REAL = cases.real(pairs=1, vocabulary=512, shrink=32)


class LogitsProblem(Problem):
    """Logits [B, T, V] and labels [B, T] that are not shifted."""

    baseline = peers.OURS

    def __init__(
        self, batch: Batch, device: torch.device = CPU, softcap: float | None = None
    ) -> None:
        self.batch, self.device, self._softcap = batch, device, softcap
        self.candidates = peers.loss_candidates(softcap)
        labels = cases.make_labels(batch).to(device)
        self._logits = cases.make_logits(batch, labels)
        self._labels = cases.masked(labels, batch)

    @cached_property
    def _truth(self) -> LogitsTruth:
        return LogitsTruth(self._logits, self._labels, self._softcap)

    @cached_property
    def _buffer(self) -> Tensor:
        """A tensor that candidates in place overwrite."""
        return torch.empty_like(self._logits)

    def errors(self, candidate: Candidate) -> dict[str, tuple[float, float]]:
        """See the base class."""
        loss, gradient = self.lap(candidate, FORWARD_BACKWARD, self.prepare(candidate))
        value, row = self._truth.errors(loss, gradient)
        if candidate.is_rounded and self.batch.dtype == "bfloat16":
            return {"value": (value, BFLOAT16_ARITHMETIC), "gradient": (row, BFLOAT16_ARITHMETIC)}
        rounding = FLOAT32_ARITHMETIC if self.batch.dtype == "float32" else BFLOAT16_ROUNDING
        is_exact = candidate.is_ours and self.device == CPU
        arithmetic = OUR_LOSS if is_exact else FLOAT32_ARITHMETIC
        return {"value": (value, arithmetic), "gradient": (row, rounding)}

    def prepare(self, candidate: Candidate) -> Tensor:
        """Logits as a model hands them over."""
        if candidate.is_inplace:
            return cases.as_model_output(self._buffer.copy_(self._logits))
        return cases.as_model_output(self._logits)

    def lap(
        self, candidate: Candidate, phase: str, prepared: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The loss, and the gradient of the logits."""
        loss = candidate.forward(prepared, self._labels)
        if phase == FORWARD:
            return loss, None
        (gradient,) = torch.autograd.grad(loss, prepared)
        return loss.detach(), gradient

    def make_floor(self) -> LogitsFloor:
        """See the base class."""
        return LogitsFloor(self.batch)


def make_problem(case: Case) -> LogitsProblem:
    """For a process of its own."""
    return LogitsProblem(case.batch)


def small(case: Case) -> Case:
    """Loads the same code, with enough logits for every thread to take part."""
    batch = case.batch
    return replace(case, batch=cases.synthetic(batch.batch, 16, 8192, batch.dtype))


def _cases(batch: Batch, fractions: Sequence[float], featured: Sequence[float]) -> list[Case]:
    """A shape with the shares of it, and with huge pages but for the smallest share."""
    leaves_out = (peers.PRINCETON_FLOAT32,) if batch.dtype == "float32" else ()
    shares = [(batch, True)] if batch.is_real else [
        (cases.with_fraction(batch, fraction), fraction in featured) for fraction in fractions
    ]  # fmt: skip
    made = [Case(each, "default", is_featured, leaves_out) for each, is_featured in shares]
    return made + [replace(case, pages="huge") for case in made[:2]]


def _full() -> tuple[Case, ...]:
    shapes: tuple[tuple[Batch, tuple[float, ...]], ...] = (
        (cases.synthetic(4, 512, 32000, "float32"), (1.0,)),
        (cases.synthetic(4, 512, 32000, "bfloat16"), ()),
        (cases.synthetic(2, 512, 128256, "bfloat16"), (1.0, 0.4)),
        (cases.synthetic(8, 128, 32000, "float32"), ()),
        (cases.synthetic(2, 2048, 32000, "bfloat16"), ()),
        (cases.synthetic(1, 64, 262144, "bfloat16"), ()),
        (cases.real(), ()),
    )
    return tuple(case for shape, marks in shapes for case in _cases(shape, (1.0, 0.4, 0.1), marks))


_ALL_BUT_TWO = tuple(
    each.name for each in peers.loss_candidates() if each.name not in (peers.OURS, peers.PRINCETON)
)

PROGRAM = program.Program(
    name="logits",
    module=__name__,
    description=(__doc__ or "").splitlines()[0],
    cases=_full(),
    quick_cases=(
        Case(SMALL_REAL, is_featured=True, leaves_out=_ALL_BUT_TWO),  # memory takes most time
        Case(SMALL_REAL, "huge", leaves_out=("torch.compile", "torch.compile cross_entropy")),
        Case(SMALL, leaves_out=(peers.PRINCETON_FLOAT32,)),
    ),
    phases={FORWARD: "forward", FORWARD_BACKWARD: "forward + backward"},
    baseline=LogitsProblem.baseline,
    floor="the scored rows at the machine's bandwidth and rate of exponentials",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; 0 if all of this project's candidates were right and timed."""
    return program.run(PROGRAM, arguments)
