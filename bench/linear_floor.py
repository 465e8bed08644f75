"""The floor of a linear batch: the bare matrix products over its valid rows, and nothing else.

    forward             logits = x W^T                      2 R V H flops
    forward + backward  the same, dx = dz W, dW = dz^T x    6 R V H flops

by torch.mm into memory that has been written to before. In one call each, or in blocks of the
vocabulary, whichever is fastest on the machine and the batch: blocks, whose logits stay nearer, may
be a fifth faster than one call. The products of the blocks for dx are not summed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FULL = 0
BLOCKS = (FULL, 4096, 8192)  # columns


def variant_name(block: int) -> str:
    """For people."""
    return f"blocks of {block}" if block else "one call each"


class Floor:
    """Laps of the bare products."""

    def __init__(self, hidden: Tensor, weight: Tensor, synchronize: Callable[[], None]) -> None:
        """Hidden [R, H] of the valid rows, and weight [V, H]."""
        self._hidden, self._weight = hidden, weight
        self._synchronize = synchronize
        self._logits = hidden.new_ones(len(hidden) * len(weight))
        self._hidden_gradient = torch.ones_like(hidden)
        self._weight_gradient = torch.ones_like(weight)

    def run(self, block: int) -> tuple[float, float]:
        """Milliseconds of the forward product, and of all three."""
        self._synchronize()
        began = time.perf_counter()
        self.forward(block)
        self._synchronize()
        forward = time.perf_counter()
        self.backward(block)
        self._synchronize()
        ended = time.perf_counter()
        return (forward - began) * 1e3, (ended - began) * 1e3

    def forward(self, block: int) -> None:
        """The logits."""
        for columns in self._blocks(block):
            torch.mm(self._hidden, self._weight[columns].t(), out=self._of(columns))

    def backward(self, block: int) -> None:
        """The two gradients, of the logits as if they were theirs."""
        for columns in self._blocks(block):
            logits = self._of(columns)
            torch.mm(logits.t(), self._hidden, out=self._weight_gradient[columns])
            torch.mm(logits, self._weight[columns], out=self._hidden_gradient)

    def _blocks(self, block: int) -> list[slice]:
        vocabulary = len(self._weight)
        step = min(block or vocabulary, vocabulary)
        return [slice(at, min(at + step, vocabulary)) for at in range(0, vocabulary, step)]

    def _of(self, columns: slice) -> Tensor:
        """The logits of a block: all blocks take the same place."""
        rows, width = len(self._hidden), columns.stop - columns.start
        return self._logits[: rows * width].view(rows, width)


def describe(times_ms: dict[int, tuple[float, float]], flops: float) -> dict[str, Any]:
    """The floor of a batch by the forward's and the whole milliseconds of each variant."""
    variants = [
        {"name": variant_name(block), "forward_ms": forward, "forward_backward_ms": both}
        for block, (forward, both) in times_ms.items()
    ]
    both = min(each["forward_backward_ms"] for each in variants)
    return {
        "forward_ms": min(each["forward_ms"] for each in variants),
        "forward_backward_ms": both,
        "gflops": flops / both / 1e6,
        "variants": variants,
    }
