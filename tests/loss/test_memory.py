"""The forward copies no logits. The backward allocates one gradient, or none if it is in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import simpo_ext
from support.batches import make_batch
from support.memory import allocated_bytes

pytestmark = [pytest.mark.kernels, pytest.mark.emulation]  # GPU: tests/cuda/test_tensors.py


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_allocated_memory(dtype: torch.dtype, inplace: bool) -> None:
    batch = make_batch(pairs=2, time=32, vocabulary=20000, dtype=dtype)
    size = batch.logits.numel() * batch.logits.element_size()
    leaf = batch.logits.requires_grad_()
    logits = leaf.view_as(leaf) if not inplace else leaf * 1
    losses: list[Tensor] = []

    def forward() -> None:
        out = simpo_ext.simpo_loss(logits, batch.labels, sft_weight=0.1, inplace_backward=inplace)
        losses.append(out.loss)

    assert allocated_bytes(forward) < 0.02 * size
    # The gradient of the logits alone: that of their leaf would be counted too.
    gradient = allocated_bytes(lambda: torch.autograd.grad(losses[0], logits))
    if inplace:
        assert gradient < 0.02 * size
    else:
        assert size <= gradient < 1.02 * size


def test_allocated_bytes_sees_the_copies_of_the_eager_formula() -> None:
    batch = make_batch(pairs=2, time=32, vocabulary=20000)
    size = batch.logits.numel() * batch.logits.element_size()
    assert allocated_bytes(lambda: batch.logits[:, :-1].log_softmax(-1)) > 0.9 * size
