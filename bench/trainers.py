"""The loss from logits to a scalar, as trainers compute it and as this project does.

All candidates get logits [B, T, V] and labels [B, T] that are not shifted, and average the
log-probabilities of each sequence. With an even B the result is SimPO's loss of the pairs, with an
odd one the negative mean over the sequences.

Each peer has the form that is fastest for it: ``F.cross_entropy`` on flattened logits rather than
on [B, V, T], and ``torch.compile`` of the float32 formula rather than of the one in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import simpo_ext
from bench.peers import Candidate, Forward
from bench.reference import BETA, GAMMA_BETA_RATIO
from bench.workload import IGNORE_INDEX

WORK = "sequence_loss"

OURS = "simpo_ext"
OURS_INPLACE = "simpo_ext in place"

# Relative errors that are allowed: of the loss, and of a row of the gradient against the row's
# incoming gradient. A bfloat16 has 8 bits, so its rounding is up to 2^-9 of a number.
FLOAT32_ARITHMETIC = 1e-5
OURS_LOSS = 1e-6
BFLOAT16_ROUNDING = 2.0**-8
# Log-probabilities and their mean rounded to bfloat16, at rewards of about 10.
BFLOAT16_ARITHMETIC = 0.125


@dataclass(frozen=True, eq=False)
class LossCandidate(Candidate):
    """One way to the loss."""

    kind: str = "eager"  # or "compile", "ours", "ours in place"
    arithmetic: str = "float32"  # or "model": in the dtype of the logits

    @property
    def is_inplace(self) -> bool:
        """Whether its backward overwrites the logits."""
        return self.kind == "ours in place"

    def tolerances(self, dtype: torch.dtype) -> tuple[float, float]:
        """Of the loss and of the gradient, for logits of a dtype."""
        if dtype == torch.float32:
            return (OURS_LOSS if self.is_ours else FLOAT32_ARITHMETIC), FLOAT32_ARITHMETIC
        if self.arithmetic == "model":
            return BFLOAT16_ARITHMETIC, BFLOAT16_ARITHMETIC
        return (OURS_LOSS if self.is_ours else FLOAT32_ARITHMETIC), BFLOAT16_ROUNDING


# ---- this project ----------------------------------------------------------------------------


def _simpo_ext(inplace: bool) -> Forward:
    def forward(logits: Tensor, labels: Tensor) -> Tensor:
        if logits.shape[0] % 2:
            return -simpo_ext.sequence_logps(logits, labels, inplace_backward=inplace).mean()
        return simpo_ext.simpo_loss(
            logits,
            labels,
            beta=BETA,
            gamma_beta_ratio=GAMMA_BETA_RATIO,
            inplace_backward=inplace,
        ).loss

    return forward


# ---- the trainers ----------------------------------------------------------------------------


def get_batch_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Princeton's: mean log-probability [B] of each sequence, in the dtype of the logits."""
    labels = labels[:, 1:].clone()
    logits = logits[:, :-1, :]
    loss_mask = labels != IGNORE_INDEX
    labels[labels == IGNORE_INDEX] = 0
    per_token_logps = torch.gather(
        logits.log_softmax(-1), dim=2, index=labels.unsqueeze(2)
    ).squeeze(2)
    return (per_token_logps * loss_mask).sum(-1) / loss_mask.sum(-1)


def get_batch_logps_float32(logits: Tensor, labels: Tensor) -> Tensor:
    """Princeton's, of logits converted to float32 first."""
    return get_batch_logps(logits.float(), labels)


def cross_entropy_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean log-probability [B] by PyTorch's cross entropy, in the dtype of the logits."""
    labels = labels[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        labels.flatten(),
        reduction="none",
        ignore_index=IGNORE_INDEX,
    )
    return -losses.view(labels.shape).sum(-1) / (labels != IGNORE_INDEX).sum(-1)


def _trl() -> Forward:
    from trl.trainer.utils import selective_log_softmax

    def get_batch_logps(logits: Tensor, labels: Tensor) -> Tensor:  # as trl's CPOTrainer
        labels = labels[:, 1:].clone()
        logits = logits[:, :-1, :]
        loss_mask = labels != IGNORE_INDEX
        labels[labels == IGNORE_INDEX] = 0
        per_token_logps = selective_log_softmax(logits, labels)
        return (per_token_logps * loss_mask).sum(-1) / loss_mask.sum(-1)

    return _loss(get_batch_logps)


def _loss(batch_logps: Callable[[Tensor, Tensor], Tensor]) -> Forward:
    def forward(logits: Tensor, labels: Tensor) -> Tensor:
        logps = batch_logps(logits, labels)
        if logps.shape[0] % 2:
            return -logps.mean()
        chosen, rejected = logps.chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected - GAMMA_BETA_RATIO)).mean()

    return forward


def _compiled(batch_logps: Callable[[Tensor, Tensor], Tensor]) -> Forward:
    return torch.compile(_loss(batch_logps), dynamic=False, fullgraph=True)


def loss_candidates() -> list[LossCandidate]:
    """All of them, this project's first. What is compiled belongs to this list alone."""
    return [
        LossCandidate(OURS, WORK, lambda: _simpo_ext(False), is_ours=True, kind="ours"),
        LossCandidate(
            OURS_INPLACE, WORK, lambda: _simpo_ext(True), is_ours=True, kind="ours in place"
        ),
        LossCandidate("Princeton", WORK, lambda: _loss(get_batch_logps), arithmetic="model"),
        LossCandidate("Princeton float32", WORK, lambda: _loss(get_batch_logps_float32)),
        LossCandidate("TRL selective_log_softmax", WORK, _trl, arithmetic="model"),
        LossCandidate(
            "F.cross_entropy", WORK, lambda: _loss(cross_entropy_logps), arithmetic="model"
        ),
        LossCandidate(
            "torch.compile", WORK, lambda: _compiled(get_batch_logps_float32), kind="compile"
        ),
        LossCandidate(
            "torch.compile cross_entropy",
            WORK,
            lambda: _compiled(cross_entropy_logps),
            kind="compile",
            arithmetic="model",
        ),
    ]
