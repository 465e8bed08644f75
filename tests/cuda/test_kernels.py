"""CUDA kernels, emulated or on a GPU: labels out of range, rows of any alignment, and many rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from simpo_ext import linear_token_logps, simpo_loss, token_logps
from support import oracle
from support.batches import DTYPES, make_batch
from support.linear_batches import make_linear_batch

pytestmark = [pytest.mark.kernels, pytest.mark.cuda_only]


def _logps_and_grad(logits: Tensor, labels: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    hidden = logits.detach().requires_grad_()
    logps = token_logps(hidden, labels, shift=False)
    return logps.detach(), torch.autograd.grad(logps, hidden, upstream.to(logps.dtype))[0]


@pytest.mark.parametrize("label", [-1, -99, 50, 51, 2**31, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_label_out_of_range_makes_only_its_row_nan(dtype: torch.dtype, label: int) -> None:
    batch = make_batch(dtype=dtype)
    upstream = torch.ones(batch.labels.shape)
    upstream[1, 5] = 0.0
    want, want_grad = _logps_and_grad(*batch, upstream)
    labels = batch.labels.clone()
    labels[1, 4:6] = label
    logps, grad = _logps_and_grad(batch.logits, labels, upstream)
    others = torch.ones_like(labels, dtype=torch.bool)
    others[1, 4:6] = False
    assert logps[1, 4:6].isnan().all()
    assert grad[1, 4:6].isnan().all()  # even if the incoming gradient is 0
    assert torch.equal(logps[others], want[others])
    assert torch.equal(grad[others], want_grad[others])


def test_a_label_out_of_range_makes_the_loss_nan() -> None:
    batch = make_batch(pairs=3)
    batch.labels[1, 5] = 50
    logits = batch.logits.requires_grad_()
    out = simpo_loss(logits, batch.labels)
    assert out.loss.isnan()
    assert out.losses.isnan().tolist() == [False, True, False]
    out.loss.backward()
    assert logits.grad[1, 4].isnan().all()


@pytest.mark.parametrize("label", [-1, 5000, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_label_out_of_range_makes_only_its_hidden_state_nan(
    dtype: torch.dtype, label: int
) -> None:
    # In the emulator, two chunks.
    batch = make_linear_batch(vocabulary=5000, dtype=dtype)

    def logps_and_grad(labels: Tensor) -> tuple[Tensor, Tensor]:
        hidden = batch.hidden.detach().clone().requires_grad_()
        logps = linear_token_logps(hidden, batch.weight, labels, bias=batch.bias, shift=False)
        return logps.detach(), torch.autograd.grad(logps.sum(), hidden)[0]

    labels = batch.labels.clone()
    labels[1, 4:6] = 7
    want, want_grad = logps_and_grad(labels)
    labels[1, 4:6] = label
    logps, grad = logps_and_grad(labels)
    others = torch.ones_like(labels, dtype=torch.bool)
    others[1, 4:6] = False
    assert logps[1, 4:6].isnan().all()
    assert grad[1, 4:6].isnan().all()
    assert torch.equal(logps[others], want[others])
    assert torch.equal(grad[others], want_grad[others])


def test_tokens_beyond_num_valid_tokens_are_nan() -> None:
    hidden, weight, labels, bias = make_linear_batch(vocabulary=5000)
    want = linear_token_logps(hidden, weight, labels, bias=bias).flatten()
    valid = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1).flatten() != -100
    count = int(valid.sum())
    got = linear_token_logps(hidden, weight, labels, bias=bias, num_valid_tokens=count - 3)
    got = got.flatten()
    scored = valid.nonzero().flatten()
    torch.testing.assert_close(got[scored[:-3]], want[scored[:-3]], rtol=1e-5, atol=1e-5)
    assert got[scored[-3:]].isnan().all()
    assert (got[~valid] == 0).all()


# 1 to 40: heads, tails and vectors of every length. 5003: several loads in flight and a tail.
# 17001: a large block whose last batch of loads is not full.
@pytest.mark.parametrize("vocabulary", [*range(1, 41), 5003, 17001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_alignment_match_the_oracle(dtype: torch.dtype, vocabulary: int) -> None:
    batch = make_batch(pairs=1, time=4, vocabulary=vocabulary, dtype=dtype)
    labels = torch.tensor([[0, vocabulary - 1, vocabulary // 2, -100]]).expand(2, 4)
    upstream = torch.linspace(-1.0, 1.0, 8).reshape(2, 4)
    expected, _, _ = oracle.token_logps(batch.logits.double().numpy(), labels.numpy(), shift=False)
    expected_grad = oracle.token_logps_grad(
        upstream.double().numpy(), batch.logits.double().numpy(), labels.numpy(), shift=False
    )
    rounding = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    for first in range(16 // dtype.itemsize):
        # There is one element between rows, so their alignments differ.
        memory = torch.full((first + 8 * (vocabulary + 1),), math.nan, dtype=dtype)
        strides = (4 * (vocabulary + 1), vocabulary + 1, 1)
        logits = memory.as_strided(batch.logits.shape, strides, first).copy_(batch.logits)
        logps, grad = _logps_and_grad(logits, labels, upstream)
        assert (logps - torch.from_numpy(expected)).abs().max() < max(2e-6, rounding)
        assert (grad.double() - torch.from_numpy(expected_grad)).abs().max() < rounding

        # In place, input and output have the same alignment.
        hidden = torch.zeros((), dtype=dtype, requires_grad=True)
        overwritten = (memory + hidden).as_strided(batch.logits.shape, strides, first)
        logps = token_logps(overwritten, labels, shift=False, inplace_backward=True)
        logps.backward(upstream.to(logps.dtype))
        error = overwritten.detach().double() - torch.from_numpy(expected_grad)
        assert error.abs().max() < rounding


def test_more_rows_than_the_emulator_s_first_grid_dimension() -> None:
    batch = make_batch(pairs=3, time=50, vocabulary=12)
    logps, grad = _logps_and_grad(*batch, torch.ones(batch.labels.shape))
    args = batch.logits.double().numpy(), batch.labels.numpy()
    expected, _, _ = oracle.token_logps(*args, shift=False)
    expected_grad = oracle.token_logps_grad(torch.ones(6, 50).numpy(), *args, shift=False)
    torch.testing.assert_close(logps.double(), torch.from_numpy(expected), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), torch.from_numpy(expected_grad), rtol=0, atol=1e-6)
