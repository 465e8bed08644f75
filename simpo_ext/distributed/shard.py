"""A rank's shard of the vocabulary, and the collectives that combine the shards.

Public as part of :mod:`simpo_ext.distributed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .._inputs.checks import check_count
from .._ops.fast_path import is_plain_call

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabShard:
    """The labels whose logits this rank has, and the collectives between the ranks.

    :meth:`of_group` makes one for a group of ``torch.distributed``. For other communication
    libraries, pass your own callables. Every rank calls them in the same order and with equal
    shapes, so ``labels`` and all options must be the same on every rank.
    """

    first_label: int
    """The label of this rank's first logit."""
    vocab_size: int
    """The number of labels of all ranks together. Labels are in [0, vocab_size)."""
    all_gather: Callable[[Tensor], Tensor]
    """[...] -> [K, ...]: the tensors of all K ranks, in the same order on every rank."""
    all_reduce: Callable[[Tensor], Tensor]
    """The sum of the tensors of all ranks, the same bits on every rank. May overwrite its
    argument."""
    size: int | None = None
    """The number of labels of this rank. None: not checked."""

    def __post_init__(self) -> None:
        check_count("first_label", self.first_label)
        if check_count("vocab_size", self.vocab_size) == 0:
            raise ValueError("vocab_size: expected 1 or more, got 0")
        for name in ("all_gather", "all_reduce"):
            if not callable(getattr(self, name)):
                got = type(getattr(self, name)).__name__
                raise TypeError(f"{name}: expected a callable, got {got}")
        self.check(0 if self.size is None else check_count("size", self.size))

    def check(self, columns: int) -> None:
        """Raises ValueError if ``columns`` is not the number of this shard's logits."""
        if self.size is not None and columns != self.size:
            raise ValueError(
                f"shard: expected the logits of {self.size} labels, the size of this rank's shard, "
                f"got {columns}"
            )
        if self.first_label + columns > self.vocab_size:
            raise ValueError(
                f"shard: expected labels within [0, {self.vocab_size}), got {columns} labels from "
                f"{self.first_label} on"
            )

    @classmethod
    def of_group(
        cls, shard_size: int, group: ProcessGroup | None = None, *, vocab_size: int | None = None
    ) -> VocabShard:
        """Makes this rank's shard. The labels of a rank follow the labels of the rank before it.

        Every rank of ``group`` calls this method once, because the ranks exchange their sizes. The
        sizes may differ, and a size may be 0.

        If ranks later pass tensors of different shapes, CPU tensors raise a ValueError on every
        rank: the ranks compare the shapes before they gather, because gloo would end the process.
        For GPU tensors, the comparison would make the host wait for the GPU. So the shapes are not
        compared, and the backend defines what happens.

        Args:
            shard_size: The number of labels of this rank.
            group: Default: the group of all ranks.
            vocab_size: The expected sum of the sizes. Default: the sum is not checked.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: The sizes of the ranks do not add up to ``vocab_size``, or add up to 0.
            RuntimeError: ``torch.distributed`` is not initialised, or this rank is not in the
                group.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "VocabShard.of_group: expected torch.distributed to be initialised; call "
                "torch.distributed.init_process_group first"
            )
        shard_size = check_count("shard_size", shard_size)
        if vocab_size is not None:
            vocab_size = check_count("vocab_size", vocab_size)
        rank = dist.get_rank(group)
        if rank < 0:
            raise RuntimeError(
                "group: expected a group that this rank is in, got one without this rank"
            )
        exchanged: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(exchanged, (shard_size, vocab_size), group)
        sizes = [size for size, _ in exchanged]
        total = sum(sizes)
        # Every rank raises, even a rank without vocab_size. Otherwise it would wait for the others
        # in its next collective.
        if total == 0 or any(told not in (None, total) for _, told in exchanged):
            told_by_rank = [told for _, told in exchanged]
            raise ValueError(
                "shard_size: expected the sizes of all ranks to add up to vocab_size, at least 1, "
                f"got {sizes} with the sum {total} and vocab_size {told_by_rank}"
            )
        return cls.on_group(sum(sizes[:rank]), total, shard_size, group or dist.group.WORLD)

    @classmethod
    def on_group(
        cls, first_label: int, vocab_size: int, size: int, group: ProcessGroup | None
    ) -> VocabShard:
        """Makes a shard without an exchange, for a caller that knows all sizes."""
        name = cast(Any, group).group_name
        return cls(first_label, vocab_size, partial(_gather, name), partial(_reduce, name), size)


# ---- collectives of torch.distributed that torch.compile can trace -------------------------------


def _gather(group: str, tensor: Tensor) -> Tensor:
    if tensor.is_cpu and is_plain_call(tensor):
        _check_shapes(group, tensor)
    return _gather_alike(group, tensor)


def _gather_alike(group: str, tensor: Tensor) -> Tensor:
    from torch.distributed import _functional_collectives as functional

    # Called all_gather_tensor before torch 2.13.
    gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
    gathered = gather(tensor.unsqueeze(0), 0, cast(Any, group))
    return cast(Tensor, functional.wait_tensor(gathered))  # type: ignore[no-untyped-call]


def _reduce(group: str, tensor: Tensor) -> Tensor:
    from torch.distributed import _functional_collectives as functional

    reduced = functional.all_reduce(tensor, "sum", cast(Any, group))
    return cast(Tensor, functional.wait_tensor(reduced))  # type: ignore[no-untyped-call]


def _check_shapes(group: str, tensor: Tensor) -> None:
    shape = [*tensor.shape, *[-1] * (4 - tensor.dim())]
    shapes = [
        [size for size in shape if size >= 0]
        for shape in _gather_alike(group, torch.tensor(shape)).tolist()
    ]
    if any(shape != shapes[0] for shape in shapes):
        rows = "R scored tokens" if tensor.dim() == 2 else "B sequences of T tokens"
        listed = ", ".join(f"{shape[1:]} on rank {rank}" for rank, shape in enumerate(shapes))
        raise ValueError(
            f"labels: expected the same {rows} on every rank of the group, got {listed}"
        )
