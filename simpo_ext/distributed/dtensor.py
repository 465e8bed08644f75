"""The layout of a DTensor whose vocabulary is sharded over a mesh.

It has this rank's labels, the group of ranks with the other labels, and the placements that the
other arguments must have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from .._inputs.checks import is_dtensor
from .shard import VocabShard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


def _is_plain(placement: Placement) -> bool:
    """Whether the placement is neither Partial nor a strided shard."""
    return placement.is_replicate() or placement.is_shard()


class VocabLayout:
    """The layout of the DTensor ``name``, whose vocabulary is dimension ``dim``."""

    def __init__(self, name: str, tensor: Tensor, dim: int, shard: VocabShard | None) -> None:
        from torch.distributed.tensor import Replicate

        if shard is not None:
            raise ValueError(
                f"shard: expected None with a DTensor for {name}, whose placements give this "
                f"rank's labels, got {type(shard).__name__}"
            )
        self._tensor = cast("DTensor", tensor)
        self._name = name
        self.mesh = self._tensor.device_mesh
        self.placements = tuple(self._tensor.placements)
        if not all(_is_plain(placement) for placement in self.placements):
            raise ValueError(
                f"{name}: expected Shard and Replicate placements, got {self._layout()}"
            )
        over = [d for d, p in enumerate(self.placements) if p.is_shard(dim)]
        if len(over) != 1:
            raise ValueError(
                f"{name}: expected the vocabulary, dimension {dim}, to be sharded over one mesh "
                f"dimension, got {self._layout()}"
            )
        self._over = over[0]
        # DTensor splits a dimension like torch.chunk.
        vocabulary, ranks = tensor.shape[dim], self.mesh.size(self._over)
        width = -(-vocabulary // ranks)
        first = min(self.mesh.get_local_rank(self._over) * width, vocabulary)
        size = min(width, vocabulary - first)
        self.shard = VocabShard.on_group(first, vocabulary, size, self.mesh.get_group(self._over))
        #: The placements that labels and hidden states must have.
        self.rows: tuple[Placement, ...] = (Replicate(),) * self.mesh.ndim

    def _layout(self, tensor: Tensor | None = None) -> str:
        tensor = self._tensor if tensor is None else cast("DTensor", tensor)
        return f"placements {list(tensor.placements)} of shape {list(tensor.shape)}"

    def take_rows_of(self, name: str, tensor: Tensor, shift: bool, is_packed: bool) -> None:
        """Takes the placements of the rows from ``tensor`` [B, T, ...].

        The ranks that share the vocabulary have the same rows. Packed sequences are one row, and
        every rank needs all of it.
        """
        from torch.distributed.tensor import Replicate

        dtensor = cast("DTensor", tensor)
        if dtensor.device_mesh != self.mesh:
            raise ValueError(
                f"{name}: expected the mesh of {self._name}, {self.mesh}, got {dtensor.device_mesh}"
            )
        rows = list(dtensor.placements)
        if dtensor is self._tensor:
            rows[self._over] = Replicate()
        for d, placement in enumerate(rows):
            allowed = placement.is_replicate() or (
                d != self._over
                and not is_packed
                and (placement.is_shard(0) or (placement.is_shard(1) and not shift))
            )
            if not allowed:
                raise ValueError(
                    f"{name}: expected to be replicated over the mesh dimension that shards the "
                    "vocabulary, and replicated or sharded by sequences over others (with "
                    "shift=False also by positions; packed sequences must be replicated), got "
                    f"{self._layout(tensor)}"
                )
        self.rows = tuple(rows)

    def check_replicated(self) -> None:
        """Raises ValueError if lm_head is sharded over another mesh dimension, too."""
        others = [p for d, p in enumerate(self.placements) if d != self._over]
        if not all(placement.is_replicate() for placement in others):
            raise ValueError(
                f"{self._name}: expected Shard(0) over one mesh dimension and Replicate over "
                f"others, got {self._layout()}"
            )

    def local(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's shard of a tensor that has the layout's own placements."""
        from torch.distributed.tensor import Partial

        if not is_dtensor(tensor):
            return tensor
        dtensor: Any = tensor
        if dtensor.device_mesh != self.mesh or tuple(dtensor.placements) != self.placements:
            raise ValueError(
                f"{name}: expected the layout of {self._name}, {self._layout()}, got "
                f"{self._layout(tensor)}"
            )
        # Ranks with different rows each compute a term of the sum that is lm_head's gradient.
        gradient = [
            Partial() if placement.is_replicate() and not row.is_replicate() else placement
            for placement, row in zip(self.placements, self.rows, strict=True)
        ]
        return cast(Tensor, dtensor.to_local(grad_placements=gradient))

    def local_rows(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's rows of labels or hidden states."""
        if not is_dtensor(tensor):
            return tensor
        dtensor: Any = tensor
        if dtensor.device_mesh != self.mesh or tuple(dtensor.placements) != self.rows:
            raise ValueError(
                f"{name}: expected placements {list(self.rows)} over the mesh of {self._name}, got "
                f"{self._layout(tensor)}"
            )
        return cast(Tensor, dtensor.to_local(grad_placements=self.rows))


def replicated(name: str, tensor: Tensor) -> Tensor:
    """The local tensor of an argument that is the same on every rank.

    The argument is a plain tensor or a replicated DTensor.
    """
    if not is_dtensor(tensor):
        return tensor
    dtensor: Any = tensor
    if not all(placement.is_replicate() for placement in dtensor.placements):
        raise ValueError(
            f"{name}: expected a plain tensor or a replicated DTensor, got placements "
            f"{list(dtensor.placements)}"
        )
    return cast(Tensor, dtensor.to_local())
