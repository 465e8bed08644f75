"""Denominators of a mean over several micro-batches and ranks.

Public as :class:`simpo_ext.PairCounts` and :func:`simpo_ext.distributed.global_normalizer`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._inputs.checks import check_choice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

GradientReduction = Literal["mean", "sum"]


class PairCounts(NamedTuple):
    """What the means of a loss divide by; it can be passed as ``normalizer`` as it is."""

    pairs: Tensor
    """[] float64: the number of counted pairs."""
    tokens: Tensor
    """[] float64: the number of their chosen completions' scored tokens."""


def global_normalizer(
    counts: PairCounts | Iterable[PairCounts],
    *,
    group: ProcessGroup | None = None,
    gradients: GradientReduction = "mean",
) -> PairCounts:
    """The ``normalizer`` with which the gradients of micro-batches and ranks add up to the mean.

    A mean of means is not the mean where micro-batches or ranks differ in their number of pairs.
    With this ``normalizer`` each loss is ``backward()``ed as it is, not divided by the number of
    micro-batches: what accumulates, and is then reduced over the ranks, is the gradient of one
    batch of all their pairs. Nothing is read on the host.

    Every rank of the group has to call it, one without a single counted pair too: one all_reduce
    of two numbers. Without ``group``, the default group where torch.distributed is initialised,
    and no communication where it is not.

    Args:
        counts: What ``count_pairs`` says of the micro-batches of one optimizer step on this rank:
            one :class:`PairCounts` each, or the only one.
        group: The ranks that the gradients are reduced over; of several dimensions of parallelism,
            those that have different pairs.
        gradients: What becomes of the gradients of the ranks. ``"mean"``: they are averaged, as DDP
            and FSDP do, and the result is divided by the number of ranks to make up for it. The
            mean over the ranks of their losses then is the loss of the whole batch. ``"sum"``: they
            are added up, as are the losses.

    Returns:
        Sums over micro-batches and ranks, at least 1 each, so that a step of dropped pairs alone
        has gradient 0; divided by the number of ranks with ``gradients="mean"``. On the device of
        ``counts``.

    Raises:
        TypeError: ``counts`` are something else, or ``group`` is no process group this rank is in.
        ValueError: There are no ``counts``, they are not of dimension 0 or on different devices, or
            ``gradients`` is neither ``"mean"`` nor ``"sum"``.
    """
    gradients_are_averaged = check_choice("gradients", gradients, ("mean", "sum")) == "mean"
    values = _check_counts([counts] if isinstance(counts, PairCounts) else counts)
    ranks = _ranks(group)
    total = torch.stack(values).view(-1, 2).sum(0)  # [2]
    if ranks > 1:
        dist.all_reduce(total, group=group)
    total = total.clamp(min=1.0)
    if gradients_are_averaged:
        total = total / ranks
    return PairCounts(*total.unbind())


def _check_counts(counts: Iterable[PairCounts]) -> list[Tensor]:
    """Pairs and tokens in turn, [] float64 each and on one device."""
    if isinstance(counts, Tensor) or not isinstance(counts, Iterable):
        raise TypeError(f"counts: expected PairCounts, one or several, got {type(counts).__name__}")
    values: list[Tensor] = []
    for index, item in enumerate(counts):
        if not isinstance(item, PairCounts):
            raise TypeError(f"counts[{index}]: expected PairCounts, got {type(item).__name__}")
        for name, value in zip(item._fields, item, strict=True):
            name = f"counts[{index}].{name}"
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
            if value.dim() != 0:
                raise ValueError(f"{name}: expected no dimension, got shape {list(value.shape)}")
            if values and value.device != values[0].device:
                raise ValueError(
                    f"{name}: expected device {values[0].device} as of counts[0].pairs, "
                    f"got {value.device}"
                )
            values.append(value.detach().to(torch.float64))
    if not values:
        raise ValueError("counts: expected at least one PairCounts, got none")
    return values


def _ranks(group: ProcessGroup | None) -> int:
    """How many ranks there are to reduce over."""
    if not dist.is_available():
        if group is not None:
            raise TypeError("group: expected None, as this torch has no torch.distributed")
        return 1
    if group is None:
        return dist.get_world_size() if dist.is_initialized() else 1
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group: expected a torch.distributed.ProcessGroup that this rank is in, "
            f"got {type(group).__name__}"
        )
    return dist.get_world_size(group)
