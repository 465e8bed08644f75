"""The batches of the linear benchmark: hidden states, an output layer and labels.

The geometry is that of the logits benchmark (cases.py), with H beside it. Rows of hidden are drawn
from a few distinct states, in random order: no implementation gains by that, and it lets float64
verify the loss and every element of both gradients at a small share of the work
(linear_reference.py). Logits are peaked like a trained model's: noise of standard deviation 2, and
three large logits for each state, one of which is mostly the next label.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench import cases
from bench.cases import DTYPES, Batch

STATES = 64
NOISE = 2.0
PEAK = 12.0
PEAKS = 3
LIKELY = 0.8  # of the labels are a peak of the state before them


@dataclass(frozen=True)
class LinearBatch:
    """The geometry of a batch; JSON carries it from process to process."""

    batch: Batch
    hidden: int  # H

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> LinearBatch:
        """The inverse of :meth:`to_json`."""
        return cls(Batch.from_json(fields["batch"]), fields["hidden"])

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"batch": self.batch.to_json(), "hidden": self.hidden}

    @property
    def name(self) -> str:
        """BxTxHxV and the dtype."""
        batch = self.batch
        kind = "real " if batch.name.startswith("real") else ""
        shape = f"{batch.batch}x{batch.time}x{self.hidden}x{batch.vocabulary}"
        return f"{kind}{shape} {batch.dtype}"

    @property
    def tokens(self) -> int:
        """N = B * T."""
        return self.batch.batch * self.batch.time

    @property
    def hidden_bytes(self) -> int:
        """N * H * e."""
        return self.tokens * self.hidden * self.batch.element_size

    @property
    def compacted_bytes(self) -> int:
        """R * H * e, of the valid rows."""
        return self.batch.valid_rows * self.hidden * self.batch.element_size

    @property
    def weight_bytes(self) -> int:
        """V * H * e."""
        return self.batch.vocabulary * self.hidden * self.batch.element_size

    def flops(self, rows: int) -> float:
        """Of the three matrix products of forward and backward over so many rows."""
        return 6.0 * rows * self.batch.vocabulary * self.hidden


def synthetic(
    batch: int, time: int, hidden: int, vocabulary: int, dtype: str, fraction: float = 1.0
) -> LinearBatch:
    """Sequences without padding, of which the last ``fraction`` is the completion."""
    return LinearBatch(cases.synthetic(batch, time, vocabulary, dtype, fraction), hidden)


def with_fraction(each: LinearBatch, fraction: float) -> LinearBatch:
    """The same tensors with another share scored."""
    return replace(each, batch=cases.with_fraction(each.batch, fraction))


@dataclass(frozen=True)
class Tensors:
    """What a candidate gets, and what hidden was drawn from."""

    hidden: Tensor  # [B, T, H] a leaf that requires grad
    weight: Tensor  # [V, H] a leaf that requires grad
    labels: Tensor  # [B, T] int64, none of them masked
    states: Tensor  # [K, H] the distinct rows
    state_of: Tensor  # [B, T] int64: hidden[b, t] is states[state_of[b, t]]


def make_tensors(each: LinearBatch, device: torch.device, seed: int = 0) -> Tensors:
    """The tensors of a batch; the same ones for every share of it."""
    generator = torch.Generator(device).manual_seed(seed)
    batch, width, dtype = each.batch, each.hidden, DTYPES[each.batch.dtype]
    made = {"generator": generator, "device": device}
    shape = (batch.batch, batch.time)
    weight = torch.randn(batch.vocabulary, width, **made).mul_(width**-0.5).to(dtype)

    count = min(STATES, each.tokens)
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
