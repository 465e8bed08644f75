"""Batches with logits like those of a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Batch(NamedTuple):
    logits: Tensor  # [2P, T, V]
    labels: Tensor  # [2P, T]


def make_batch(
    pairs: int = 2,
    time: int = 8,
    vocabulary: int = 50,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    offset: float = 0.0,
) -> Batch:
    """A batch of sequences of different lengths, with masked prompts and padding.

    A few logits of a row are large, often the label's among them. A flat distribution would average
    errors away.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = 2 * pairs
    logits = torch.randn(batch, time, vocabulary, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (batch, time), generator=generator)
    peaks = torch.randint(vocabulary, (batch, time, 3), generator=generator)
    peaks[:, :-1, 0] = labels[:, 1:]
    heights = torch.rand(batch, time, 3, generator=generator, dtype=torch.float64) * 12.0
    logits.scatter_add_(2, peaks, heights)
    for row in range(batch):
        prompt = 1 + row % max(1, time // 3)
        padding = row % max(1, time // 4)
        labels[row, :prompt] = -100
        labels[row, time - padding :] = -100
    return Batch((logits + offset).to(dtype), labels)


def eager_token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """The trainers' formula, computed in float32 or float64: [2P, T - 1]."""
    targets = labels[:, 1:]
    compute = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    gathered = compute.log_softmax(-1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    return gathered.masked_fill(targets == -100, 0.0)


def far_apart(x: Tensor, path: Path, dim: int) -> Tensor:
    """A copy in a sparse file, whose stride in ``dim`` is just above 2^31 elements."""
    strides = list(x.stride())
    strides[dim] = 2**31 + 64
    last = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    flat = torch.from_file(str(path), shared=True, size=last + 1, dtype=x.dtype)
    return flat.as_strided(x.shape, strides).copy_(x)
