"""The loss from hidden states beside its peers and the floor, on this machine's CPU.

All candidates get hidden [B, T, H] and weight [V, H], which both require grad, and labels [B, T]
that are not shifted. The work is SimPO's loss of the pairs. If a package does not have that, it is
the mean cross entropy of the scored labels: the same products and the same softmax of each token.
The forward is that of an evaluation, without gradients. Forward and backward give the gradients of
hidden states and weight. The floor is the bare matrix products of the scored rows.

Each peer has the form that is fastest for it. ``F.linear_cross_entropy`` gets chunks of 512 rows
and accumulates in the dtype of its input. With its default options, which are chunks of about H / V
of the rows and a float32 accumulation, it takes up to fifteen times as long on a CPU. Liger is
measured with and without torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

import simpo_ext
from bench.common import cases, program
from bench.common.cases import IGNORE_INDEX, Batch, Case, following
from bench.common.floor import LinearFloor
from bench.common.measure import FORWARD, FORWARD_BACKWARD, Problem
from bench.common.peers import (
    OURS,
    Candidate,
    Forward,
    UnusableError,
    get_batch_logps,
    pair_loss,
)
from bench.common.reference import (
    BETA,
    CROSS_ENTROPY,
    GAMMA_BETA_RATIO,
    SIMPO,
    LinearErrors,
    LinearTruth,
)

UNLIMITED = 2**60
BUDGETS = {OURS: None, "simpo_ext, budget 0": 0, "simpo_ext, unlimited": UNLIMITED}
EAGER = "F.linear + Princeton"
LIGER_COMPILED = "Liger SimPO compiled"
TORCH_CHUNK_ROWS = 512

# The largest errors that are allowed. float32 arithmetic, over sums of a few thousand terms:
FLOAT32 = LinearErrors(1e-5, 1e-4, 1e-5)
# Logits of up to 16 rounded to bfloat16 are wrong by up to 2^-5, and so is the sum they are divided
# by: the probabilities in the worst row of a gradient may be wrong by twice as much. Over a whole
# gradient with a thousand tokens, this averages out to 2^-8.
BFLOAT16 = LinearErrors(2.0**-7, 2.0**-4, 2.0**-5)
# The log-probabilities and their means are rounded to bfloat16, too.
BFLOAT16_ROUNDED = LinearErrors(0.125, 0.25, 0.125)

# ---- candidates ------------------------------------------------------------------------------


def _ours(budget: int | None) -> Forward:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, valid: int | None) -> Tensor:
        return simpo_ext.linear_simpo_loss(
            hidden,
            weight,
            labels,
            beta=BETA,
            gamma_beta_ratio=GAMMA_BETA_RATIO,
            logits_budget_bytes=budget,
            num_valid_tokens=valid,
        ).loss

    return loss


def _eager() -> Forward:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, _valid: int | None) -> Tensor:
        return pair_loss(get_batch_logps(F.linear(hidden, weight), labels))

    return loss


def _liger(compiled: bool) -> Forward:
    from liger_kernel.chunked_loss.simpo_loss import LigerFusedLinearSimPOLoss

    # Its gamma is the margin beta * gamma_beta_ratio.
    module = LigerFusedLinearSimPOLoss(
        ignore_index=IGNORE_INDEX,
        beta=BETA,
        gamma=BETA * GAMMA_BETA_RATIO,
        compute_nll_loss=False,
        compiled=compiled,
    )

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, _valid: int | None) -> Tensor:
        return module(weight, hidden[:, :-1], labels[:, 1:])[0]  # it does not shift

    return loss


def _cross_entropy(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Forward:
    """Of a function of hidden [N, H], weight [V, H] and labels [N] that are shifted."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, _valid: int | None) -> Tensor:
        return function(hidden.flatten(0, 1), weight, following(labels).flatten())

    return loss


def _torch() -> Forward:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise UnusableError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=TORCH_CHUNK_ROWS, chunking_method=None, acc_policy="compact"
    )
    return _cross_entropy(partial(function, ignore_index=IGNORE_INDEX, options=options))


def _liger_cross_entropy() -> Forward:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return _cross_entropy(partial(liger_fused_linear_cross_entropy, ignore_index=IGNORE_INDEX))


def _liger_scaled() -> Forward:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def function(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        losses = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels)
        return losses.sum() / (labels != IGNORE_INDEX).sum()

    return _cross_entropy(function)


def _cut_cross_entropy() -> Forward:
    from cut_cross_entropy import linear_cross_entropy

    return _cross_entropy(partial(linear_cross_entropy, ignore_index=IGNORE_INDEX))


def linear_candidates() -> list[Candidate]:
    """All of them, this project's first."""
    return [
        *(
            Candidate(name, SIMPO, partial(_ours, budget), is_ours=True)
            for name, budget in BUDGETS.items()
        ),
        Candidate(EAGER, SIMPO, _eager, is_rounded=True),
        Candidate("F.linear_cross_entropy", CROSS_ENTROPY, _torch),
        Candidate("Liger SimPO", SIMPO, partial(_liger, False)),
        Candidate(LIGER_COMPILED, SIMPO, partial(_liger, True), is_compiled=True),
        Candidate(
            "Liger linear cross entropy", CROSS_ENTROPY, _liger_cross_entropy, needs_cuda=True
        ),
        Candidate("Liger scaled cross entropy", CROSS_ENTROPY, _liger_scaled, needs_cuda=True),
        Candidate("cut-cross-entropy", CROSS_ENTROPY, _cut_cross_entropy, needs_cuda=True),
    ]


# ---- the problem -----------------------------------------------------------------------------


class LinearProblem(Problem):
    """Hidden states, weight and labels."""

    baseline = OURS

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self.batch, self.device = batch, device
        self.candidates = linear_candidates()
        self._tensors = cases.make_tensors(batch, device)
        self._labels = cases.masked(self._tensors.labels, batch)
        # A trainer's collator knows the number, and on a GPU it saves a wait.
        self._valid = batch.valid_rows if device.type == "cuda" else None

    @cached_property
    def _truth(self) -> LinearTruth:
        return LinearTruth(self._tensors, self._labels)

    def errors(self, candidate: Candidate) -> dict[str, tuple[float, float]]:
        """See the base class."""
        loss, gradients = self.lap(candidate, FORWARD_BACKWARD)
        found = self._truth.errors(candidate.work, loss, *gradients)
        allowed = FLOAT32
        if self.batch.dtype == "bfloat16":
            allowed = BFLOAT16_ROUNDED if candidate.is_rounded else BFLOAT16
        names = ("value", "gradient", "norm")
        return dict(zip(names, zip(found, allowed, strict=True), strict=True))

    def lap(
        self, candidate: Candidate, phase: str, prepared: None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and the gradients of hidden and weight."""
        inputs = (self._tensors.hidden, self._tensors.weight)
        if phase == FORWARD:
            with torch.no_grad():
                return candidate.forward(*inputs, self._labels, self._valid), ()
        loss = candidate.forward(*inputs, self._labels, self._valid)
        return loss.detach(), torch.autograd.grad(loss, inputs)

    def make_floor(self) -> LinearFloor:
        """See the base class."""
        rows = self._tensors.hidden.detach()[following(self._labels) != IGNORE_INDEX]
        return LinearFloor(rows, self._tensors.weight.detach(), self.batch.flops)


def make_problem(case: Case) -> LinearProblem:
    """For a process of its own."""
    return LinearProblem(case.batch, torch.device("cpu"))


def small(case: Case) -> Case:
    """Loads the same code, with enough work for every thread to take part."""
    batch = case.batch
    return replace(case, batch=cases.synthetic(batch.batch, 32, 4096, batch.dtype, hidden=256))


# ---- the program -----------------------------------------------------------------------------


def _full() -> tuple[Case, ...]:
    def case(batch: int, hidden: int, vocabulary: int, dtype: str, fraction: float) -> Case:
        shape = cases.synthetic(batch, 512, vocabulary, dtype, fraction, hidden)
        leaves_out = () if (vocabulary, hidden) == (32000, 1024) else (LIGER_COMPILED,)
        return Case(shape, "default", False, leaves_out)

    def featured(made: Case) -> Case:
        return replace(made, is_featured=True)

    return (
        *(case(4, 1024, 32000, "bfloat16", fraction) for fraction in (1.0, 0.4)),
        featured(case(8, 2048, 32000, "bfloat16", 1.0)),
        *(featured(case(4, 1024, 128256, "bfloat16", fraction)) for fraction in (1.0, 0.4)),
        featured(case(4, 1024, 32000, "float32", 1.0)),
        case(4, 1024, 32000, "float32", 0.4),
        case(4, 1024, 128256, "float32", 1.0),
        Case(cases.real(hidden=2048), "default", True, (LIGER_COMPILED,)),
    )


SMALL = cases.synthetic(2, 32, 640, "float32", hidden=64)
SMALL_REAL = cases.real(pairs=1, vocabulary=512, hidden=64, shrink=32)

PROGRAM = program.Program(
    name="linear",
    module=__name__,
    description=(__doc__ or "").splitlines()[0],
    cases=_full(),
    quick_cases=(Case(SMALL, leaves_out=(LIGER_COMPILED,)), Case(SMALL_REAL)),
    phases={FORWARD: "forward", FORWARD_BACKWARD: "forward + backward"},
    baseline=LinearProblem.baseline,
    floor="the bare matrix products of the scored rows",
    ratio="x_floor",
    rounds=5,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; 0 if all of this project's candidates were right and timed."""
    return program.run(PROGRAM, arguments)
