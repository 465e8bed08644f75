"""The work that every candidate is given, and the bytes that it has to move at the least.

N token rows of V logits, as B = 8 sequences of T = N / 8: [B, T, V]. The first half of the
sequences is chosen and the second rejected where pairs are meant. Labels stand at the position of
their logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100
SEQUENCES = 8


@dataclass(frozen=True)
class Size:
    """N rows of V logits."""

    rows: int
    vocabulary: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """Reads ``"NxV"``; N has to be a multiple of the number of sequences."""
        rows, separator, vocabulary = text.partition("x")
        if not (separator and rows.isdigit() and vocabulary.isdigit()):
            raise ValueError(f"size: expected NxV such as 16384x128256, got {text!r}")
        size = cls(int(rows), int(vocabulary))
        if size.rows == 0 or size.rows % SEQUENCES != 0 or size.vocabulary == 0:
            raise ValueError(
                f"size: expected N a multiple of {SEQUENCES} and V > 0, both above 0, got {text!r}"
            )
        return size


@dataclass(frozen=True)
class Bytes:
    """The fewest bytes that device memory has to move; what is 8 or 16 bytes a row is left out."""

    forward: int
    backward: int


def fewest_bytes(size: Size, valid_rows: int, element_size: int) -> Bytes:
    """Bytes of the forward and of the backward of per-token log-probabilities.

    The forward reads each valid row once: N_valid * V * e. The backward reads it once more, and
    writes the gradient of all rows, zeros included: N_valid * V * e + N * V * e.
    """
    read = valid_rows * size.vocabulary * element_size
    return Bytes(forward=read, backward=read + size.rows * size.vocabulary * element_size)


@dataclass(frozen=True)
class Workload:
    """One batch."""

    size: Size
    valid_fraction: float
    valid_rows: int
    logits: Tensor  # [B, T, V]
    labels: Tensor  # [B, T] int64
    upstream: Tensor  # [B, T] float32: gradient of each log-probability, exact in bfloat16
    softcap: float | None = None  # bounds the logits before the softmax


def make_workload(
    size: Size,
    valid_fraction: float,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    softcap: float | None = None,
) -> Workload:
    """Logits peaked like a trained model's, and labels of which a fixed share is scored.

    Each sequence has the same number of scored positions, at random places.
    """
    generator = torch.Generator(device).manual_seed(seed)
    batch, time, vocabulary = SEQUENCES, size.rows // SEQUENCES, size.vocabulary
    logits = torch.empty(batch, time, vocabulary, dtype=dtype, device=device)
    logits.normal_(std=2.0, generator=generator)
    labels = torch.randint(vocabulary, (batch, time), generator=generator, device=device)

    # A few large logits a row, the label's among them.
    peaks = torch.randint(vocabulary, (batch, time, 3), generator=generator, device=device)
    peaks[:, :, 0] = labels
    heights = torch.rand(batch, time, 3, generator=generator, device=device) * 12.0
    logits.scatter_(2, peaks, heights.to(dtype))

    valid_time = max(1, round(valid_fraction * time))
    order = torch.rand(batch, time, generator=generator, device=device).argsort(1)
    labels.scatter_(1, order[:, valid_time:], IGNORE_INDEX)

    upstream = torch.randn(batch, time, generator=generator, device=device)
    return Workload(
        size=size,
        valid_fraction=valid_fraction,
        valid_rows=batch * valid_time,
        logits=logits,
        labels=labels,
        upstream=upstream.to(torch.bfloat16).float(),
        softcap=softcap,
    )
