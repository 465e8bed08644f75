"""The work of the GPU benchmark from logits: its batch, its truth in float64, and its fewest bytes.

N token rows of V logits, as B = 8 sequences of T = N / 8: [B, T, V]. The first half of the
sequences is chosen and the second rejected where pairs are meant. Labels stand at the position of
their logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.common.cases import IGNORE_INDEX
from bench.common.reference import simpo_loss

SEQUENCES = 8
CHUNK_ELEMENTS = 2**26  # 0.5 GiB in float64


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


# ---- the truth -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What the results of one workload have to be."""

    workload: Workload
    logsumexp: Tensor  # [N] float64
    token_logps: Tensor  # [N] float64; 0 where masked
    simpo_loss: Tensor  # [] float64
    simpo_upstream: Tensor  # [N] float64: d simpo_loss / d token_logps


def _chunks(workload: Workload) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // workload.size.vocabulary)
    for start in range(0, workload.size.rows, step):
        yield slice(start, min(start + step, workload.size.rows))


def _capped(z: Tensor, softcap: float | None) -> Tensor:
    """Softcap * tanh(z / softcap), in the memory of z."""
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def make_reference(workload: Workload) -> Reference:
    """Computes the truth of a workload."""
    logits, labels = workload.logits.flatten(0, 1), workload.labels.flatten()
    logsumexp = torch.empty(labels.shape, dtype=torch.float64, device=labels.device)
    token_logps = torch.empty_like(logsumexp)
    for rows in _chunks(workload):
        z = _capped(logits[rows].double(), workload.softcap)
        logsumexp[rows] = z.logsumexp(1)
        label_z = z.gather(1, labels[rows].clamp(min=0).unsqueeze(1)).squeeze(1)
        token_logps[rows] = label_z - logsumexp[rows]
    token_logps.masked_fill_(labels == IGNORE_INDEX, 0.0)

    leaf = token_logps.view_as(workload.labels).clone().requires_grad_()
    loss = simpo_loss(leaf, workload.labels)
    (simpo_upstream,) = torch.autograd.grad(loss, leaf)
    return Reference(workload, logsumexp, token_logps, loss.detach(), simpo_upstream.flatten())


def value_error(value: Tensor, expected: Tensor) -> float:
    """Largest |value - expected| / max(1, |expected|); NaN where there is one."""
    difference = (value.double().flatten() - expected.flatten()).abs()
    return (difference / expected.flatten().abs().clamp(min=1.0)).max().item()


def gradient_error(gradient: Tensor, upstream: Tensor, reference: Reference) -> float:
    """Largest error of a row of the gradient, relative to that row's upstream gradient.

    The gradient of a row is upstream * (onehot(label) - softmax), so no element of it is larger
    than the upstream gradient; a softcap makes it smaller. In a masked row, the error
    of an element that is not 0 is infinite.
    """
    workload = reference.workload
    logits, labels = workload.logits.flatten(0, 1), workload.labels.flatten()
    gradient, upstream = gradient.reshape(logits.shape), upstream.double().flatten()
    worst = torch.zeros((), dtype=torch.float64, device=labels.device)
    for rows in _chunks(workload):
        valid = labels[rows] != IGNORE_INDEX
        z = _capped(logits[rows].double(), workload.softcap)
        expected = z.sub(reference.logsumexp[rows].unsqueeze(1)).exp_().neg_()
        label = labels[rows].clamp(min=0).unsqueeze(1)
        expected.scatter_add_(1, label, torch.ones_like(label, dtype=torch.float64))
        expected *= (upstream[rows] * valid).unsqueeze(1)
        if workload.softcap is not None:
            expected *= 1.0 - z.div_(workload.softcap).square_()
        error = expected.sub_(gradient[rows]).abs_().amax(1)
        scale = upstream[rows].abs()
        relative = torch.where(
            valid, error / scale.clamp(min=1e-300), torch.where(error == 0.0, 0.0, torch.inf)
        )
        worst = torch.maximum(worst, relative.max())  # NaN if either is
    return worst.item()
