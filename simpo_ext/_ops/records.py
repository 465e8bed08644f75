"""The options, layouts and outputs of the ops, and the names of the metrics.

Enums are strings here. Their order in the ``Literal`` types is that of the enums in
csrc/core/loss_math.h, whose values the ops take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

LossType = Literal["sigmoid", "hinge", "ipo"]
Reduction = Literal["none", "mean", "sum"]
SftReduction = Literal["sequence", "token"]
EmptyPolicy = Literal["drop", "nan"]

ENUMS: dict[str, tuple[str, ...]] = {
    "loss_type": get_args(LossType),
    "sft_reduction": get_args(SftReduction),
    "reduction": get_args(Reduction),
    "empty": get_args(EmptyPolicy),
}

# The order of enum Metric in csrc/core/kernels.h.
METRIC_NAMES: tuple[str, ...] = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "num_pairs",
    "dropped_pairs",
    "num_tokens",
)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-probabilities and losses for logits of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Validity(NamedTuple):
    """Says which positions are scored. Every op that reads labels takes these arguments."""

    ignore_index: int
    shift: bool


class TokenOptions(NamedTuple):
    """The trailing arguments of the token_logps op."""

    ignore_index: int
    shift: bool
    logit_scale: float
    softcap: float  # 0: none

    @property
    def validity(self) -> Validity:
        """The options that say which positions are scored."""
        return Validity(self.ignore_index, self.shift)


class LossOptions(NamedTuple):
    """The trailing arguments of the preference_loss op, with its enums as strings."""

    ignore_index: int
    shift: bool
    average_log_prob: bool
    beta: float
    gamma_beta_ratio: float
    loss_type: LossType
    label_smoothing: float
    alpha: float
    sft_weight: float
    sft_reduction: SftReduction
    reduction: Reduction
    empty: EmptyPolicy

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments as the op takes them."""
        return tuple(map(_argument, self._fields, self))


def _argument(name: str, value: Any) -> Any:
    return ENUMS[name].index(value) if name in ENUMS else value


# The forward applies these to the slopes that it saves, so the backward op does not take them.
_IN_SLOPES = ("beta", "gamma_beta_ratio", "loss_type", "label_smoothing", "alpha")


def gradient_arguments(arguments: Sequence[Any]) -> list[Any]:
    """Selects preference_loss_backward's arguments from :attr:`LossOptions.arguments`."""
    named = zip(LossOptions._fields, arguments, strict=True)
    return [value for name, value in named if name not in _IN_SLOPES]


class Layout(NamedTuple):
    """Where the sequences of a batch lie, which of them are pairs, and the weight of each pair.

    Without ``cu_seqlens`` the rows are the sequences, S = B; with it, B is 1. Without ``pairs``,
    pair p has the sequences p and P + p.
    """

    cu_seqlens: Tensor | None = None  # [S + 1] int64
    pairs: Tensor | None = None  # [P, 2] int64
    pair_weight: Tensor | None = None  # [P] float64


class LossOutputs(NamedTuple):
    """The outputs of the preference_loss op, except those that only its backward needs."""

    loss: Tensor  # [], or [P] without a reduction
    losses: Tensor  # [P]
    logps: Tensor  # [2P]
    rewards: Tensor  # [2P]
    sft_loss: Tensor  # as loss
    metrics: Tensor  # [len(METRIC_NAMES)] float64
    # With a report, the report of token_logps:
    mean_logit: Tensor | None = None  # [2P, T] float64
    entropy: Tensor | None = None  # [2P, T] float64
