"""Hidden states to a scalar loss: this project's ways, and its peers'.

All get hidden [B, T, H] and weight [V, H], which both require grad, and labels [B, T] that are not
shifted. The work is SimPO's loss of the pairs, or where a package has only that, the mean cross
entropy of the scored labels: the same products and the same softmax of each token.

Each peer has the form that is fastest for it. F.linear_cross_entropy gets chunks of 512 rows and
accumulates in the dtype of its input: with the defaults of its options, chunks of about H / V of
the rows and in bfloat16 an accumulation in float32, it takes up to fifteen times as long on a CPU.
Liger is measured with and without torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import simpo_ext
from bench.linear_reference import CROSS_ENTROPY, SIMPO
from bench.peers import Candidate, UnusableError
from bench.reference import BETA, GAMMA_BETA_RATIO
from bench.trainers import BFLOAT16_ARITHMETIC, FLOAT32_ARITHMETIC, get_batch_logps
from bench.workload import IGNORE_INDEX

UNLIMITED = 2**60
OURS = "simpo_ext"
OURS_0 = "simpo_ext, budget 0"
OURS_UNLIMITED = "simpo_ext, unlimited"
BUDGETS = {OURS: None, OURS_0: 0, OURS_UNLIMITED: UNLIMITED}

EAGER = "F.linear + Princeton"
TORCH = "F.linear_cross_entropy"
LIGER = "Liger SimPO"
LIGER_COMPILED = "Liger SimPO compiled"
LIGER_CROSS_ENTROPY = "Liger linear cross entropy"
LIGER_SCALED = "Liger scaled cross entropy"
CCE = "cut-cross-entropy"

TORCH_CHUNK_ROWS = 512

# hidden, weight, labels, number of valid tokens where the caller knows it -> []
Loss = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]


@dataclass(frozen=True)
class Tolerance:
    """Largest relative errors that are allowed (linear_reference.py)."""

    loss: float
    gradient: float  # of a row
    norm: float  # of a whole gradient


# float32 arithmetic, over sums of a few thousand terms.
FLOAT32 = Tolerance(FLOAT32_ARITHMETIC, 1e-4, 1e-5)
# Logits of up to 16 rounded to bfloat16 are wrong by up to 2^-5, and so is the sum they are divided
# by: the probabilities of which the worst row of a gradient consists may be wrong by twice as much.
# Over a whole gradient that averages out, to 2^-8 where there are a thousand tokens.
BFLOAT16 = Tolerance(2.0**-7, 2.0**-4, 2.0**-5)
# Log-probabilities and their means rounded to bfloat16 too.
BFLOAT16_MODEL = Tolerance(BFLOAT16_ARITHMETIC, 2 * BFLOAT16_ARITHMETIC, BFLOAT16_ARITHMETIC)


@dataclass(frozen=True, eq=False)
class LinearCandidate(Candidate):
    """One way to the loss."""

    arithmetic: str = "float32"  # or "model": in the dtype of the logits
    gradients_in_forward: bool = False

    def loss(self, hidden: Tensor, weight: Tensor, labels: Tensor, valid: int | None) -> Tensor:
        """The loss []."""
        function, reason = self._loaded
        if function is None:
            raise UnusableError(reason)
        return function(hidden, weight, labels, valid)

    def tolerance(self, dtype: torch.dtype) -> Tolerance:
        """For hidden states of a dtype."""
        if dtype == torch.float32:
            return FLOAT32
        return BFLOAT16_MODEL if self.arithmetic == "model" else BFLOAT16


# ---- this project ----------------------------------------------------------------------------


def _simpo_ext(budget: int | None) -> Loss:
    linear_simpo_loss = simpo_ext.linear_simpo_loss

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, valid: int | None) -> Tensor:
        return linear_simpo_loss(
            hidden,
            weight,
            labels,
            beta=BETA,
            gamma_beta_ratio=GAMMA_BETA_RATIO,
            logits_budget_bytes=budget,
            num_valid_tokens=valid,
        ).loss

    return loss


# ---- peers -----------------------------------------------------------------------------------


def _eager() -> Loss:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, _valid: int | None) -> Tensor:
        chosen, rejected = get_batch_logps(F.linear(hidden, weight), labels).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected - GAMMA_BETA_RATIO)).mean()

    return loss


def _shifted(labels: Tensor) -> Tensor:
    """The label after each position [B * T]: hidden need not be copied without its last rows."""
    following = torch.full_like(labels, IGNORE_INDEX)
    following[:, :-1] = labels[:, 1:]
    return following.flatten()


def _cross_entropy(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """Of a function of hidden [N, H], weight [V, H] and labels [N] that are shifted."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, _valid: int | None) -> Tensor:
        return function(hidden.flatten(0, 1), weight, _shifted(labels))

    return loss


def _torch() -> Loss:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise UnusableError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=TORCH_CHUNK_ROWS, chunking_method=None, acc_policy="compact"
    )
    return _cross_entropy(lambda hidden, weight, labels: function(
        hidden, weight, labels, ignore_index=IGNORE_INDEX, options=options
    ))  # fmt: skip


def _liger(compiled: bool) -> Loss:
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


def _liger_cross_entropy() -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return _cross_entropy(lambda hidden, weight, labels: liger_fused_linear_cross_entropy(
        hidden, weight, labels, ignore_index=IGNORE_INDEX
    ))  # fmt: skip


def _liger_scaled() -> Loss:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def function(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        losses = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels)
        return losses.sum() / (labels != IGNORE_INDEX).sum()

    return _cross_entropy(function)


def _cut_cross_entropy() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return _cross_entropy(lambda hidden, weight, labels: linear_cross_entropy(
        hidden, weight, labels, ignore_index=IGNORE_INDEX
    ))  # fmt: skip


def linear_candidates() -> list[LinearCandidate]:
    """All of them, this project's first."""

    def ours(name: str, budget: int | None) -> LinearCandidate:
        return LinearCandidate(name, SIMPO, lambda: _simpo_ext(budget), is_ours=True)

    def cuda(name: str, load: Callable[[], Loss], in_forward: bool) -> LinearCandidate:
        return LinearCandidate(
            name, CROSS_ENTROPY, load, needs_cuda=True, gradients_in_forward=in_forward
        )

    return [
        *(ours(name, budget) for name, budget in BUDGETS.items()),
        LinearCandidate(EAGER, SIMPO, _eager, arithmetic="model"),
        LinearCandidate(TORCH, CROSS_ENTROPY, _torch),
        LinearCandidate(LIGER, SIMPO, lambda: _liger(False), gradients_in_forward=True),
        LinearCandidate(LIGER_COMPILED, SIMPO, lambda: _liger(True), gradients_in_forward=True),
        cuda(LIGER_CROSS_ENTROPY, _liger_cross_entropy, True),
        cuda(LIGER_SCALED, _liger_scaled, False),
        cuda(CCE, _cut_cross_entropy, False),
    ]
