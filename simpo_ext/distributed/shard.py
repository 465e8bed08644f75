"""Which labels a rank has, and the collectives that bring the ranks' parts together.

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
    """The labels whose logits this rank has, and the collectives of the ranks that have the others.

    :meth:`of_group` makes one for a group of ``torch.distributed``; callables make one for any
    other way to communicate. Every rank calls them in the same order, with equal shapes: ``labels``
    and all options have to be the same on every rank.
    """

    first_label: int
    """The label of this rank's first logit."""
    vocab_size: int
    """The labels of all ranks together: [0, vocab_size)."""
    all_gather: Callable[[Tensor], Tensor]
    """[...] -> [K, ...]: the tensors of all K ranks, ordered alike on every rank."""
    all_reduce: Callable[[Tensor], Tensor]
    """The sum of the tensors of all ranks, the same bits on every rank. May overwrite its
    argument."""
    size: int | None = None
    """How many labels this rank has, or None: not checked."""

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
        """ValueError unless ``columns`` logits are those of this shard."""
        if self.size is not None and columns != self.size:
            raise ValueError(
                f"shard: expected the logits of {self.size} labels, which this rank was said to "
                f"have, got {columns}"
            )
        if self.first_label + columns > self.vocab_size:
            raise ValueError(
                f"shard: expected labels within [0, {self.vocab_size}), got {columns} from "
                f"{self.first_label} on"
            )

    @classmethod
    def of_group(
        cls, shard_size: int, group: ProcessGroup | None = None, *, vocab_size: int | None = None
    ) -> VocabShard:
        """The shard of a rank that has ``shard_size`` labels, after those of the ranks before it.

        Every rank of ``group`` calls this once; sizes are exchanged here and not in each step. They
        may differ, and be 0.

        On CPUs, each gathering sends the shapes first, so that ranks that disagree on them raise a
        ValueError where gloo would end the process. On a GPU nothing is waited for, and
        disagreement is whatever it is to the backend.

        Args:
            shard_size: How many labels this rank has.
            group: Default: that of all ranks.
            vocab_size: What the sizes add up to, if that is to be checked.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: The sizes are not those of a vocabulary; the message has all of them.
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
            raise RuntimeError("group: expected a group that this rank is in, got another")
        exchanged: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(exchanged, (shard_size, vocab_size), group)
        sizes = [size for size, _ in exchanged]
        total = sum(sizes)
        # On every rank, whoever was told of a vocabulary: none is left waiting for another.
        if total == 0 or any(told not in (None, total) for _, told in exchanged):
            told = "; vocab_size is " + ", ".join(str(told) for _, told in exchanged)
            raise ValueError(
                "shard_size: expected the sizes of all ranks to add up to those of a vocabulary, "
                f"got {sizes}, which is {total}{told}"
            )
        return cls.on_group(sum(sizes[:rank]), total, shard_size, group or dist.group.WORLD)

    @classmethod
    def on_group(
        cls, first_label: int, vocab_size: int, size: int, group: ProcessGroup | None
    ) -> VocabShard:
        """A shard known without an exchange."""
        name = cast(Any, group).group_name
        return cls(first_label, vocab_size, partial(_gather, name), partial(_reduce, name), size)


# ---- collectives of torch.distributed, which a compiler can trace --------------------------------


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
        rows = "R valid tokens" if tensor.dim() == 2 else "B sequences of T tokens"
        listed = ", ".join(f"{shape[1:]} on rank {rank}" for rank, shape in enumerate(shapes))
        raise ValueError(
            f"labels: expected the same {rows} on every rank of the group, got {listed}"
        )
