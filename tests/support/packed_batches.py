"""Batches of packed sequences, and the same sequences as padded rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from support import oracle
from support.batches import Batch
from support.linear_batches import LinearBatch

# An empty sequence, one of a single position, which predicts nothing with a shift, and others.
LENGTHS = (7, 0, 5, 1, 12, 2, 5, 9)
# Some sequences are in several pairs, on one side or on both. 1 and 3 have no valid token with a
# shift, and 7 is in no pair.
PAIRS = ((0, 2), (0, 6), (4, 0), (5, 4), (1, 2), (6, 3), (2, 5))


class Packed(NamedTuple):
    """Packed sequences, with padding before and after them."""

    logits: Tensor  # [N, V]
    labels: Tensor  # [N]
    cu_seqlens: Tensor  # [S + 1]

    @property
    def spans(self) -> list[slice]:
        edges = self.cu_seqlens.tolist()
        return [slice(first, end) for first, end in itertools.pairwise(edges)]

    @property
    def lengths(self) -> list[int]:
        return self.cu_seqlens.diff().tolist()

    def padding(self) -> Tensor:
        """[N] bool: the positions before the first sequence and after the last."""
        outside = torch.ones(self.labels.shape, dtype=torch.bool)
        outside[self.cu_seqlens[0] : self.cu_seqlens[-1]] = False
        return outside

    def padded(self, fill: float = 0.0) -> Batch:
        """The sequences as rows of equal length. The rest of a row is filled."""
        rows = [self.logits[span] for span in self.spans]
        labels = [self.labels[span] for span in self.spans]
        return Batch(pad(rows, self.logits.shape[1:], fill), pad(labels, (), -100))

    def flat(self, rows: Tensor, fill: float = 0.0) -> Tensor:
        """The values of padded rows [S, T, ...] at the positions of the sequences [N, ...]."""
        result = rows.new_full((len(self.labels), *rows.shape[2:]), fill)
        for span, row, length in zip(self.spans, rows, self.lengths, strict=True):
            result[span] = row[:length]
        return result

    def arrays(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """logits and labels for the oracle."""
        return self.logits.detach().double().numpy(), self.labels.numpy()

    def oracle_loss(self, **options: Any) -> tuple[oracle.Preference, npt.NDArray[np.float64]]:
        return oracle.simpo_loss(*self.arrays(), cu_seqlens=self.cu_seqlens.numpy(), **options)


def pad(sequences: Sequence[Tensor], rest: Sequence[int], fill: float) -> Tensor:
    """Rows [S, T, *rest] of equal length. The rest of a row is filled."""
    longest = max((len(sequence) for sequence in sequences), default=0)
    dtype = sequences[0].dtype if sequences else torch.float32
    rows = torch.full((len(sequences), longest, *rest), fill, dtype=dtype)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence)] = sequence
    return rows


def make_packed(
    lengths: Sequence[int] = LENGTHS,
    vocabulary: int = 40,
    *,
    dtype: torch.dtype = torch.float32,
    before: int = 0,
    after: int = 0,
    seed: int = 0,
) -> Packed:
    """Sequences of these lengths. Those of three or more positions have a masked prompt.

    A few logits of a row are large, often the label's among them. The padding has NaN logits and
    labels out of range.
    """
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    cu = torch.tensor([0, *lengths]).cumsum(0) + before
    count = int(cu[-1]) + after
    logits = torch.randn(count, vocabulary, **options)
    labels = torch.randint(vocabulary, (count,), generator=generator)
    peaks = torch.randint(vocabulary, (count, 3), generator=generator)
    peaks[:-1, 0] = labels[1:]
    logits.scatter_add_(1, peaks, torch.rand(count, 3, **options) * 12.0)
    batch = Packed(logits.to(dtype), labels, cu)
    for s, span in enumerate(batch.spans):
        if lengths[s] > 2:
            batch.labels[span.start : span.start + 1 + s % 2] = -100
    batch.logits[batch.padding()] = float("nan")
    batch.labels[batch.padding()] = 2**40
    return batch


def make_linear_packed(
    lengths: Sequence[int] = LENGTHS,
    vocabulary: int = 40,
    width: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    before: int = 0,
    after: int = 0,
    seed: int = 0,
) -> tuple[LinearBatch, Packed]:
    """Hidden states [N, H] of packed sequences, with weight and bias, and their logits."""
    packed = make_packed(lengths, vocabulary, dtype=dtype, before=before, after=after, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    weight = torch.randn(vocabulary, width, **options)
    hidden = torch.randn(len(packed.labels), width, **options) / width**0.5
    tokens = torch.randint(vocabulary, packed.labels.shape, generator=generator)
    right = (packed.labels[1:] >= 0) & (packed.labels[1:] < vocabulary)
    right &= torch.rand(right.shape, **options) < 0.75
    tokens[:-1] = torch.where(right, packed.labels[1:], tokens[:-1])
    rows = weight[tokens]
    heights = torch.rand(len(tokens), 1, **options) * 12.0
    hidden += heights * rows / (rows.square().sum(-1, keepdim=True) + 0.1)
    hidden[packed.padding()] = float("nan")
    bias = torch.randn(vocabulary, **options)
    batch = LinearBatch(hidden.to(dtype), weight.to(dtype), packed.labels, bias.to(dtype))
    logits = torch.nn.functional.linear(batch.hidden, batch.weight, batch.bias)
    return batch, packed._replace(logits=logits)


def padded_linear(batch: LinearBatch, packed: Packed) -> LinearBatch:
    """The same sequences as padded rows."""
    hidden = packed._replace(logits=batch.hidden).padded()
    return batch._replace(hidden=hidden.logits, labels=hidden.labels)
