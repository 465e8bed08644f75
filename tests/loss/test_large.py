"""Offsets beyond 2^31 elements. Sparse files hold the tensors, so they take little memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import simpo_ext
from support.batches import far_apart, make_batch

pytestmark = [pytest.mark.kernels, pytest.mark.emulation]  # GPU: tests/cuda/test_tensors.py


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_offsets_beyond_2_31_elements(dtype: torch.dtype, dim: int, tmp_path: Path) -> None:
    batch = make_batch(pairs=1, time=3, vocabulary=40, dtype=dtype)
    labels = torch.tensor([[-100, 5, 7], [-100, 39, 0]])
    near = batch.logits.clone().requires_grad_()
    expected = simpo_ext.token_logps(near, labels)
    expected.sum().backward()

    leaf = far_apart(batch.logits, tmp_path / "logits", dim).requires_grad_()
    logps = simpo_ext.token_logps(leaf, labels)
    assert torch.equal(logps, expected)
    (gradient,) = torch.autograd.grad(logps.sum(), leaf)
    assert torch.equal(gradient, near.grad)

    scale = torch.ones((), dtype=dtype, requires_grad=True)
    logits = leaf.detach().mul_(scale)
    logps = simpo_ext.token_logps(logits, labels, inplace_backward=True)
    torch.autograd.backward(logps.sum())
    assert torch.equal(logits.detach(), near.grad)
