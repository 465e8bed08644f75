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
    """The denominators of a loss's means. It can be passed as ``normalizer``."""

    pairs: Tensor
    """[] float64: the number of counted pairs."""
    tokens: Tensor
    """[] float64: the number of scored tokens in their chosen completions."""


def global_normalizer(
    counts: PairCounts | Iterable[PairCounts],
    *,
    group: ProcessGroup | None = None,
    gradients: GradientReduction = "mean",
) -> PairCounts:
    """Computes the ``normalizer`` for a mean over the pairs of all micro-batches and ranks.

    Averaging the means of micro-batches or ranks is wrong if they have different numbers of pairs.
    Pass this ``normalizer`` to the loss of each micro-batch and call ``backward()`` without
    dividing by the number of micro-batches. The accumulated and reduced gradient is then that of
    one batch with all pairs. The host does not wait for the GPU.

    Every rank of the group must call this function, even a rank without counted pairs, because it
    makes one all_reduce of two numbers. The default ``group`` is the default group of
    torch.distributed. If torch.distributed is not initialised, there is no communication.

    Args:
        counts: The results of ``count_pairs`` for the micro-batches of one optimizer step on this
            rank: one :class:`PairCounts`, or an iterable with one for each micro-batch.
        group: The ranks whose gradients are reduced. With several dimensions of parallelism, it is
            the group of the ranks that have different pairs.
        gradients: How the ranks' gradients are reduced. ``"mean"``: DDP and FSDP average them. To
            compensate, this function divides its result by the number of ranks, and the mean of
            the ranks' losses is the loss of the whole batch. ``"sum"``: they are added, and the sum
            of the ranks' losses is the loss of the whole batch.

    Returns:
        The sums over micro-batches and ranks, at least 1 each, so that the gradient is 0 if all
        pairs are dropped. With ``gradients="mean"`` they are divided by the number of ranks. They
        are on the device of ``counts``.

    Raises:
        TypeError: ``counts`` has the wrong type, or ``group`` is not a process group that this rank
            is in.
        ValueError: ``counts`` is empty, its tensors have dimensions or are on different devices, or
            ``gradients`` is invalid.
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
    """The pairs and tokens of each item in turn, [] float64 and on one device."""
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
                raise ValueError(f"{name}: expected shape [], got {list(value.shape)}")
            if values and value.device != values[0].device:
                raise ValueError(
                    f"{name}: expected device {values[0].device} like counts[0].pairs, "
                    f"got {value.device}"
                )
            values.append(value.detach().to(torch.float64))
    if not values:
        raise ValueError("counts: expected at least one PairCounts, got none")
    return values


def _ranks(group: ProcessGroup | None) -> int:
    """The number of ranks to reduce over."""
    if not dist.is_available():
        if group is not None:
            raise TypeError(
                f"group: expected None without torch.distributed, got {type(group).__name__}"
            )
        return 1
    if group is None:
        return dist.get_world_size() if dist.is_initialized() else 1
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group: expected a torch.distributed.ProcessGroup that this rank is in, "
            f"got {type(group).__name__}"
        )
    return dist.get_world_size(group)
