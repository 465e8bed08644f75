"""The batches of the logits benchmark: sequences of prompt and completion, as a trainer has them.

Logits [B, T, V] of the first B/2 sequences are chosen and of the others rejected, where B is even.
Labels are not shifted: the logits at t are scored with the label at t + 1. Of each sequence the
prompt is masked, the completion is scored, and what pads it to the longest is masked.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.workload import IGNORE_INDEX

LENGTHS = Path(__file__).resolve().parent / "data" / "preference_lengths.json"
PAIRS = 8
# Its batch has about the median share of completion tokens, and is one of the shorter ones: the
# eager formula makes several copies of it in float32.
REAL_SEED = 285
REAL_VOCABULARY = 32000

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Batch:
    """The geometry of a batch; JSON carries it from process to process."""

    name: str
    batch: int
    time: int
    vocabulary: int
    dtype: str
    prompts: tuple[int, ...]  # [B] positions before the completion
    ends: tuple[int, ...]  # [B] positions up to its end
    share: str  # what is scored, for people

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Batch:
        """The inverse of :meth:`to_json`."""
        return cls(**{**fields, "prompts": tuple(fields["prompts"]), "ends": tuple(fields["ends"])})

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @property
    def element_size(self) -> int:
        """Bytes of a logit."""
        return DTYPES[self.dtype].itemsize

    @property
    def valid_rows(self) -> int:
        """Positions whose logits are scored: the first token of a sequence has none before it."""
        pairs = zip(self.prompts, self.ends, strict=True)
        return sum(end - max(prompt, 1) for prompt, end in pairs)

    @property
    def valid_fraction(self) -> float:
        """Of all B * T positions."""
        return self.valid_rows / (self.batch * self.time)

    @property
    def logits_bytes(self) -> int:
        """B * T * V * e."""
        return self.batch * self.time * self.vocabulary * self.element_size


def synthetic(batch: int, time: int, vocabulary: int, dtype: str, fraction: float = 1.0) -> Batch:
    """Sequences without padding, of which the last ``fraction`` is the completion."""
    prompt = min(round((1.0 - fraction) * time), time - 2)
    return Batch(
        name=f"{batch}x{time}x{vocabulary} {dtype}",
        batch=batch,
        time=time,
        vocabulary=vocabulary,
        dtype=dtype,
        prompts=(prompt,) * batch,
        ends=(time,) * batch,
        share=f"{fraction:.0%}",
    )


def with_fraction(batch: Batch, fraction: float) -> Batch:
    """The same logits with another share scored."""
    return synthetic(batch.batch, batch.time, batch.vocabulary, batch.dtype, fraction)


def real(
    pairs: int = PAIRS,
    vocabulary: int = REAL_VOCABULARY,
    dtype: str = "bfloat16",
    seed: int = REAL_SEED,
    shrink: int = 1,
) -> Batch:
    """Pairs drawn from the preference lengths, padded to the longest.

    Args:
        pairs: P.
        vocabulary: V.
        dtype: Of the logits.
        seed: Of the draw.
        shrink: Divides the lengths, for a trial run.
    """
    lengths: list[list[int]] = json.loads(LENGTHS.read_text(encoding="utf-8"))
    drawn = random.Random(seed).sample(lengths, pairs)
    sequences = [(prompt, chosen) for prompt, chosen, _ in drawn]
    sequences += [(prompt, rejected) for prompt, _, rejected in drawn]
    prompts = tuple(max(1, prompt // shrink) for prompt, _ in sequences)
    ends = tuple(
        start + max(1, completion // shrink)
        for start, (_, completion) in zip(prompts, sequences, strict=True)
    )
    made = Batch(
        name="",
        batch=2 * pairs,
        time=max(ends),
        vocabulary=vocabulary,
        dtype=dtype,
        prompts=prompts,
        ends=ends,
        share="",
    )
    return replace(
        made,
        name=f"real {made.batch}x{made.time}x{vocabulary} {dtype}",
        share=f"{made.valid_fraction:.0%}",
    )


def make_labels(batch: Batch, seed: int = 0) -> Tensor:
    """Labels [B, T] int64, none of them masked."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(batch.vocabulary, (batch.batch, batch.time), generator=generator)


def masked(labels: Tensor, prompts: Sequence[int], ends: Sequence[int]) -> Tensor:
    """A copy of labels [B, T] with all but the completions masked."""
    labels = labels.clone()
    for row, prompt, end in zip(labels, prompts, ends, strict=True):
        row[:prompt] = IGNORE_INDEX
        row[end:] = IGNORE_INDEX
    return labels


def make_logits(batch: Batch, labels: Tensor, seed: int = 0) -> Tensor:
    """Logits [B, T, V] peaked like a trained model's.

    Noise of standard deviation 2, and a few large logits in each row, among them that of the next
    label. The rows' noise is cut from one stretch at random places, since a billion independent
    numbers would take longer than what is measured.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, dtype = batch.batch * batch.time, DTYPES[batch.dtype]
    stretch = torch.empty(4 * batch.vocabulary).normal_(std=2.0, generator=generator).to(dtype)
    starts = torch.randint(3 * batch.vocabulary, (rows,), generator=generator)
    logits = torch.empty(rows, batch.vocabulary, dtype=dtype)
    for row, start in zip(logits, starts.tolist(), strict=True):
        row.copy_(stretch[start : start + batch.vocabulary])
    peaks = torch.randint(batch.vocabulary, (rows, 3), generator=generator)
    peaks[:, 0] = labels.roll(-1, 1).flatten()
    heights = torch.rand(rows, 3, generator=generator) * 12.0
    logits.scatter_(1, peaks, heights.to(dtype))
    return logits.view(batch.batch, batch.time, batch.vocabulary)
