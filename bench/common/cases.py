"""The batches of the benchmarks: sequences of prompt and completion, as a trainer has them.

The first B/2 sequences are chosen and the others rejected, if B is even. Labels are not shifted:
what stands at t is scored with the label at t + 1. The prompt of each sequence and its padding are
masked, and the completion is scored.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

LENGTHS = Path(__file__).resolve().parents[1] / "data" / "preference_lengths.json"
PAIRS = 8
# This draw has about the median share of completion tokens, and its longest sequence is one of the
# shorter ones. The eager formula makes several float32 copies of the logits.
REAL_SEED = 285
REAL_VOCABULARY = 32000

# Rows of hidden states are drawn from a few distinct ones. No implementation gains by that, and it
# lets float64 verify every element of both gradients at a small part of the cost.
STATES = 64
NOISE, PEAK, PEAKS = 2.0, 12.0, 3  # the standard deviation, and a row's few large logits
LIKELY = 0.8  # of the labels are a peak of the state before them


@dataclass(frozen=True)
class Batch:
    """The geometry of a batch."""

    batch: int  # B
    time: int  # T
    vocabulary: int  # V
    dtype: str
    prompts: tuple[int, ...]  # [B] positions before the completion
    ends: tuple[int, ...]  # [B] positions up to its end
    share: str  # the scored part, as people write it
    hidden: int = 0  # H; 0 if the batch consists of logits
    is_real: bool = False  # the lengths are those of real preference pairs

    @property
    def name(self) -> str:
        """BxTxV or BxTxHxV, and the dtype."""
        sizes = (self.batch, self.time, *([self.hidden] if self.hidden else []), self.vocabulary)
        return f"{'real ' if self.is_real else ''}{'x'.join(map(str, sizes))} {self.dtype}"

    @property
    def valid_rows(self) -> int:
        """R: scored positions. Nothing stands before a sequence's first token to score it."""
        pairs = zip(self.prompts, self.ends, strict=True)
        return sum(end - max(prompt, 1) for prompt, end in pairs)

    @property
    def valid_fraction(self) -> float:
        """R / (B * T)."""
        return self.valid_rows / (self.batch * self.time)

    @property
    def element_size(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype].itemsize

    @property
    def logits_bytes(self) -> int:
        """Bytes of [B, T, V]."""
        return self.batch * self.time * self.vocabulary * self.element_size

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients: of the logits, or of hidden states and weight."""
        if not self.hidden:
            return self.logits_bytes
        return (self.batch * self.time + self.vocabulary) * self.hidden * self.element_size

    @property
    def flops(self) -> float:
        """Of the three matrix products of forward and backward over the scored rows."""
        return 6.0 * self.valid_rows * self.vocabulary * self.hidden


@dataclass(frozen=True)
class Case:
    """A batch, and what is measured on it. JSON carries it from process to process."""

    batch: Batch
    pages: str = "default"  # or "huge": the allocator asks for huge pages
    is_featured: bool = False  # memory is measured, and the tables and the plot show the case
    leaves_out: tuple[str, ...] = field(default=())  # names of candidates

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Case:
        """The inverse of :meth:`to_json`."""
        batch = fields["batch"]
        sequences = {name: tuple(batch[name]) for name in ("prompts", "ends")}
        leaves_out = tuple(fields["leaves_out"])
        return cls(**{**fields, "batch": Batch(**{**batch, **sequences}), "leaves_out": leaves_out})

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def synthetic(
    batch: int, time: int, vocabulary: int, dtype: str, fraction: float = 1.0, hidden: int = 0
) -> Batch:
    """Sequences without padding whose last ``fraction`` is the completion."""
    prompt = min(round((1.0 - fraction) * time), time - 2)
    prompts, ends = (prompt,) * batch, (time,) * batch
    return Batch(batch, time, vocabulary, dtype, prompts, ends, f"{fraction:.0%}", hidden)


def with_fraction(batch: Batch, fraction: float) -> Batch:
    """The same tensors with another share scored."""
    return synthetic(batch.batch, batch.time, batch.vocabulary, batch.dtype, fraction, batch.hidden)


def real(
    pairs: int = PAIRS, vocabulary: int = REAL_VOCABULARY, hidden: int = 0, shrink: int = 1
) -> Batch:
    """Pairs drawn from real preference lengths, padded to the longest. bfloat16.

    Args:
        pairs: P.
        vocabulary: V.
        hidden: H, or 0.
        shrink: Divides the lengths, for a trial run.
    """
    lengths: list[list[int]] = json.loads(LENGTHS.read_text(encoding="utf-8"))
    drawn = random.Random(REAL_SEED).sample(lengths, pairs)
    sequences = [(prompt, chosen) for prompt, chosen, _ in drawn]
    sequences += [(prompt, rejected) for prompt, _, rejected in drawn]
    prompts = tuple(max(1, prompt // shrink) for prompt, _ in sequences)
    ends = tuple(
        start + max(1, completion // shrink)
        for start, (_, completion) in zip(prompts, sequences, strict=True)
    )
    made = Batch(
        2 * pairs, max(ends), vocabulary, "bfloat16", prompts, ends, "", hidden, is_real=True
    )
    return replace(made, share=f"{made.valid_fraction:.0%}")


# ---- labels ----------------------------------------------------------------------------------


def masked(labels: Tensor, batch: Batch) -> Tensor:
    """A copy of labels [B, T] with all but the completions masked."""
    labels = labels.clone()
    for row, prompt, end in zip(labels, batch.prompts, batch.ends, strict=True):
        row[:prompt] = IGNORE_INDEX
        row[end:] = IGNORE_INDEX
    return labels


def following(labels: Tensor) -> Tensor:
    """The label after each position [B, T]; IGNORE_INDEX after the last."""
    shifted = torch.full_like(labels, IGNORE_INDEX)
    shifted[:, :-1] = labels[:, 1:]
    return shifted


# ---- logits ----------------------------------------------------------------------------------


def make_labels(batch: Batch, seed: int = 0) -> Tensor:
    """Labels [B, T] int64, none of them masked."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(batch.vocabulary, (batch.batch, batch.time), generator=generator)


def make_logits(batch: Batch, labels: Tensor, seed: int = 0) -> Tensor:
    """Logits [B, T, V] peaked like a trained model's.

    Each row is noise with a few large logits, and one of these is the next label's. The rows' noise
    is cut at random places from one stretch, because a billion independent numbers would take
    longer than the measurement.
    """
    generator = torch.Generator(labels.device).manual_seed(seed)
    made = {"generator": generator, "device": labels.device}
    rows, dtype = batch.batch * batch.time, DTYPES[batch.dtype]
    stretch = (torch.randn(4 * batch.vocabulary, **made) * NOISE).to(dtype)
    starts = torch.randint(3 * batch.vocabulary, (rows,), **made)
    logits = torch.empty(rows, batch.vocabulary, dtype=dtype, device=labels.device)
    for row, start in zip(logits, starts.tolist(), strict=True):
        row.copy_(stretch[start : start + batch.vocabulary])
    peaks = torch.randint(batch.vocabulary, (rows, PEAKS), **made)
    peaks[:, 0] = labels.roll(-1, 1).flatten()
    heights = torch.rand(rows, PEAKS, **made) * PEAK
    logits.scatter_(1, peaks, heights.to(dtype))
    return logits.view(batch.batch, batch.time, batch.vocabulary)


class _Computed(torch.autograd.Function):
    """Makes values count as computed from another tensor, without a pass over them."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient.sum()


def as_model_output(values: Tensor) -> Tensor:
    """The same memory as a tensor that requires grad and is no leaf, as a model's logits are.

    A backward may overwrite only such logits.
    """
    anchor = torch.zeros((), dtype=values.dtype, device=values.device, requires_grad=True)
    return _Computed.apply(values.detach(), anchor)


# ---- hidden states ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensors:
    """What the candidates get, and what hidden was drawn from."""

    hidden: Tensor  # [B, T, H] a leaf that requires grad
    weight: Tensor  # [V, H] a leaf that requires grad
    labels: Tensor  # [B, T] int64, none of them masked
    states: Tensor  # [K, H] the distinct rows
    state_of: Tensor  # [B, T] int64: hidden[b, t] is states[state_of[b, t]]


def make_tensors(batch: Batch, device: torch.device, seed: int = 0) -> Tensors:
    """The tensors of a batch with hidden states. They do not depend on the scored share."""
    generator = torch.Generator(device).manual_seed(seed)
    width, dtype = batch.hidden, DTYPES[batch.dtype]
    made = {"generator": generator, "device": device}
    shape = (batch.batch, batch.time)
    weight = torch.randn(batch.vocabulary, width, **made).mul_(width**-0.5).to(dtype)

    count = min(STATES, batch.batch * batch.time)
    peaks = torch.randint(batch.vocabulary, (count, PEAKS), **made)
    heights = torch.rand(count, PEAKS, 1, **made) * PEAK
    states = torch.randn(count, width, **made) * NOISE
    states = (states + (weight[peaks].float() * heights).sum(1)).to(dtype)

    state_of = torch.randint(count, shape, **made)
    choice = torch.randint(PEAKS, shape, **made)
    likely = peaks[state_of, choice].roll(1, 1)  # the label at t + 1 follows the state at t
    anything = torch.randint(batch.vocabulary, shape, **made)
    labels = torch.where(torch.rand(shape, **made) < LIKELY, likely, anything)
    hidden = states[state_of]
    return Tensors(hidden.requires_grad_(), weight.requires_grad_(), labels, states, state_of)
