"""linear_token_logps: values and gradients against the float64 oracle."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import simpo_ext
from support import linear_oracle
from support.batches import DTYPES
from support.comparisons import assert_same
from support.linear_batches import (
    UNLIMITED,
    LinearBatch,
    dense_logps,
    logps_and_gradients,
    logps_op,
    make_linear_batch,
    upstream_of,
)

pytestmark = pytest.mark.kernels

# V and H. 1: a softmax of one. 131: less than a chunk, and no multiple of a vector. 4096 and 4097:
# a full chunk, and two chunks. 12293: four chunks on a CPU and two on a GPU, of which the last is
# the shortest. An odd H: rows are not whole vectors.
SHAPES = [(1, 1), (1, 8), (2, 3), (131, 1), (131, 33), (4096, 5), (4097, 16), (12293, 7)]
OPTIONS: list[dict[str, Any]] = [
    {"shift": False},
    {"logit_scale": 0.25},
    {"softcap": 8.0},
    {"softcap": 5.0, "logit_scale": 1.5, "shift": False},
]


def floors(dtype: torch.dtype, truth: list[Tensor]) -> list[float]:
    """Errors that any computation in the dtype may have.

    logps: four ulp of the largest, in float32 or float64. Gradients: one ulp in the two short
    dtypes, and 32 in the others: an error of two ulp of logits of up to 16 is that relative error
    of the probabilities.
    """
    compute = torch.promote_types(dtype, torch.float32)
    largest = [max(1.0, x.abs().max().item()) if x.numel() else 1.0 for x in truth]
    ulps = [4 * torch.finfo(compute).eps]
    ulps += [torch.finfo(dtype).eps * (32 if dtype == compute else 1)] * (len(truth) - 1)
    return [ulp * size for ulp, size in zip(ulps, largest, strict=True)]


def truth_of(batch: LinearBatch, **options: Any) -> list[Tensor]:
    """The oracle's logps, and its gradients of hidden, weight and bias."""
    bias = batch.double_bias()
    logps, _, _ = linear_oracle.linear_token_logps(*batch.doubles(), bias=bias, **options)
    compute = torch.promote_types(batch.hidden.dtype, torch.float32)
    upstream = upstream_of(batch.labels).to(compute).double().numpy()
    gradients = linear_oracle.linear_token_logps_grad(
        upstream, *batch.doubles(), bias=bias, **options
    )
    return [torch.from_numpy(x) for x in (logps, *gradients)]


def check_against_eager(
    batch: LinearBatch, *, logits_budget_bytes: int | None = None, **options: Any
) -> None:
    """Errors may be twice those of the eager computation, or the floor."""
    dtype = batch.hidden.dtype
    truth = truth_of(batch, **options)
    ours = logps_and_gradients(
        simpo_ext.linear_token_logps, batch, logits_budget_bytes=logits_budget_bytes, **options
    )
    eager = logps_and_gradients(dense_logps, batch, **options)
    assert ours[0] is not None
    assert ours[0].dtype == torch.promote_types(dtype, torch.float32)
    names = ("logps", "hidden", "weight", "bias")
    for name, x, y, z, floor in zip(names, ours, eager, truth, floors(dtype, truth), strict=True):
        if x is None:
            assert name == "bias" and batch.bias is None
            continue
        assert x.shape == z.shape and (name == "logps" or x.dtype == dtype)
        error, eager_error = ((w.double() - z).abs().max().item() for w in (x, y))
        assert error <= max(2 * eager_error, floor), name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("vocabulary", "width"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_at_least_as_exact_as_eager(
    dtype: torch.dtype, vocabulary: int, width: int, bias: bool
) -> None:
    batch = make_linear_batch(vocabulary=vocabulary, width=width, dtype=dtype, bias=bias)
    check_against_eager(batch)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("vocabulary", "budget"), [(131, None), (4099, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_options_are_at_least_as_exact_as_eager(
    dtype: torch.dtype, vocabulary: int, budget: int | None, options: dict[str, Any]
) -> None:
    batch = make_linear_batch(vocabulary=vocabulary, dtype=dtype)
    check_against_eager(batch, logits_budget_bytes=budget, **options)


# 5 and 4098 are tokens. Labels that are not masked get another token first.
@pytest.mark.parametrize("ignore_index", [-1, 0, 5, 4098, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("shift", [True, False])
def test_any_ignore_index_masks_even_one_that_is_a_token(ignore_index: int, shift: bool) -> None:
    batch = make_linear_batch(vocabulary=4099, width=3, dtype=torch.float64)
    batch.labels[batch.labels == ignore_index] = 6
    want = logps_and_gradients(simpo_ext.linear_token_logps, batch, shift=shift)
    other = batch._replace(labels=batch.labels.masked_fill(batch.labels == -100, ignore_index))
    options: dict[str, Any] = {"ignore_index": ignore_index, "shift": shift}
    got = logps_and_gradients(simpo_ext.linear_token_logps, other, **options)
    assert_same(got, want)
    assert want[0] is not None
    assert_same((want[0] == 0).sum(), (batch.labels[:, int(shift) :] == -100).sum() + 4 * shift)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    batch = make_linear_batch(dtype=torch.float64)
    narrow = batch._replace(labels=batch.labels.masked_fill(batch.labels == -100, 100).to(dtype))
    got = logps_and_gradients(simpo_ext.linear_token_logps, narrow, ignore_index=100)
    assert_same(got, logps_and_gradients(simpo_ext.linear_token_logps, batch))


@pytest.mark.parametrize("budget", [0, None])
@pytest.mark.parametrize("vocabulary", [4096, 8192, 12293, 16385])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_labels_at_the_ends_of_chunks(
    dtype: torch.dtype, vocabulary: int, budget: int | None
) -> None:
    batch = make_linear_batch(pairs=1, time=16, vocabulary=vocabulary, width=3, dtype=dtype)
    width = logps_op(batch, UNLIMITED)[3].shape[2]
    firsts = torch.arange(0, vocabulary, width)
    ends = torch.cat((firsts, firsts[1:] - 1, torch.tensor([vocabulary - 1])))
    labels = ends[torch.arange(batch.labels.numel()) % len(ends)].view_as(batch.labels)
    check_against_eager(batch._replace(labels=labels), shift=False, logits_budget_bytes=budget)


@pytest.mark.cpu_only
def test_threads_that_share_the_work_are_as_exact(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(3)
    check_against_eager(make_linear_batch(time=64, vocabulary=12293), logits_budget_bytes=0)


# ---- numerical hazards of chunks -----------------------------------------------------------------


def biased(batch: LinearBatch, columns: slice, value: float) -> LinearBatch:
    """The batch with the bias of some columns set to the value. No label is among the columns."""
    assert batch.bias is not None
    bias = batch.bias.clone()
    bias[columns] = value
    free = torch.ones(len(bias), dtype=torch.bool)
    free[columns] = False
    others = free.nonzero()[:, 0]
    labels = batch.labels.where(batch.labels < 0, others[batch.labels % len(others)])
    return batch._replace(bias=bias, labels=labels)


# More than the first chunk, a part of it, the last columns, and all but a few columns.
COLUMNS = [slice(0, 4500), slice(0, 2000), slice(8000, None), slice(0, 12280)]


@pytest.mark.parametrize("columns", COLUMNS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_probability_zero_leave_the_rest_exact(
    dtype: torch.dtype, columns: slice
) -> None:
    batch = biased(make_linear_batch(vocabulary=12293, dtype=dtype), columns, -math.inf)
    check_against_eager(batch)
    _, _, dweight, dbias = logps_and_gradients(simpo_ext.linear_token_logps, batch)
    assert dweight is not None and dbias is not None
    assert not dweight[columns].any()
    assert not dbias[columns].any()


@pytest.mark.parametrize("value", [-1000.0, 1000.0])
@pytest.mark.parametrize("columns", COLUMNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_chunks_with_very_different_logits_are_exact(
    dtype: torch.dtype, columns: slice, value: float
) -> None:
    check_against_eager(biased(make_linear_batch(vocabulary=12293, dtype=dtype), columns, value))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_in_a_hidden_state_makes_only_its_row_nan(dtype: torch.dtype) -> None:
    batch = make_linear_batch(vocabulary=5003, dtype=dtype, bias=False)
    want = logps_and_gradients(simpo_ext.linear_token_logps, batch)
    hidden = batch.hidden.clone()
    hidden[1, 3] = math.nan  # scored with labels[1, 4]
    got = logps_and_gradients(simpo_ext.linear_token_logps, batch._replace(hidden=hidden))
    for ours, theirs in zip(got[:2], want[:2], strict=True):
        assert ours is not None and theirs is not None
        assert ours[1, 3].isnan().all() and theirs[1, 3].isfinite().all()
        ours[1, 3] = theirs[1, 3]
        assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_of_minus_infinity_everywhere_is_no_distribution(dtype: torch.dtype) -> None:
    batch = make_linear_batch(vocabulary=4099, width=3, dtype=dtype)
    assert batch.bias is not None
    batch.bias.fill_(-math.inf)
    logps, dhidden, dweight, dbias = logps_and_gradients(simpo_ext.linear_token_logps, batch)
    scored = torch.nn.functional.pad(batch.labels[:, 1:] >= 0, (0, 1))
    assert_same(logps.isnan(), scored)
    assert_same(dhidden.isnan().all(-1), scored)
    assert dweight.isnan().all() and dbias.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sure_label_keeps_the_digits_of_its_gradient(dtype: torch.dtype) -> None:
    # 1 - p is between 1e-3 and 1e-2, and p rounded to bfloat16 is 1.
    vocabulary, heights = 4099, torch.linspace(12.9, 15.2, 8, dtype=torch.float64)
    weight = torch.zeros(vocabulary, 4, dtype=torch.float64)
    weight[7] = 1.0
    hidden = (heights[:, None] / 4).expand(1, 8, 4)
    batch = LinearBatch(hidden.to(dtype), weight.to(dtype), torch.full((1, 8), 7), None)
    ours = logps_and_gradients(simpo_ext.linear_token_logps, batch, shift=False)
    truth = truth_of(batch, shift=False)
    # The error of a rounded logit, which is up to 16, is a relative error of its exp. In float64, a
    # sum of 1 and small terms is rounded. Other dtypes add a few terms to the label's in float32.
    eps = torch.finfo(dtype).eps
    bound = 1e-12 if dtype == torch.float64 else max(20 * eps, 32 / vocabulary)
    for got, want in zip(ours[:2], truth[:2], strict=True):
        assert got is not None
        assert ((got.double() - want) / want).abs().max() <= bound


# ---- batches and rows without scored tokens ------------------------------------------------------


# [4, 1, 7] has labels that the shift does not score.
@pytest.mark.parametrize("shape", [(0, 5, 7), (4, 0, 7), (4, 1, 7), (4, 5, 7)])
@pytest.mark.parametrize("vocabulary", [1, 50, 4099])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_without_scored_tokens_is_zero(
    dtype: torch.dtype, vocabulary: int, shape: tuple[int, int, int]
) -> None:
    hidden = torch.full(shape, math.nan, dtype=dtype)
    weight = torch.full((vocabulary, shape[2]), math.nan, dtype=dtype)
    labels = torch.full(shape[:2], 0 if shape[1] == 1 else -100)
    batch = LinearBatch(hidden, weight, labels, weight[:, 0].clone())
    for options in ({}, {"num_valid_tokens": 0}, {"num_valid_tokens": 3}):
        results = logps_and_gradients(simpo_ext.linear_token_logps, batch, **options)
        compute = torch.promote_types(dtype, torch.float32)
        assert_same(results[0], torch.zeros(shape[:2], dtype=compute))
        for gradient, leaf in zip(results[1:], batch.inputs(), strict=True):
            assert_same(gradient, torch.zeros_like(leaf))


def test_empty_sequences_among_others_change_nothing() -> None:
    batch = make_linear_batch(pairs=3, vocabulary=4099, dtype=torch.float64)
    batch.labels[[0, 4]] = -100
    logps, dhidden, *rest = logps_and_gradients(simpo_ext.linear_token_logps, batch)
    for got, want in zip((logps, dhidden, *rest), truth_of(batch), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    assert not logps[[0, 4]].any() and not dhidden[[0, 4]].any()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_hidden_states_change_nothing(dtype: torch.dtype, garbage: float) -> None:
    batch = make_linear_batch(vocabulary=131, dtype=dtype)
    want = logps_and_gradients(simpo_ext.linear_token_logps, batch)
    masked = torch.nn.functional.pad(batch.labels[:, 1:] == -100, (0, 1), value=True)
    spoiled = batch._replace(hidden=batch.hidden.masked_fill(masked[..., None], garbage))
    got = logps_and_gradients(simpo_ext.linear_token_logps, spoiled)
    assert_same(got, want)
    assert got[1] is not None
    assert not got[1][masked].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vocabulary_of_one_is_certain(dtype: torch.dtype) -> None:
    batch = make_linear_batch(vocabulary=1, width=3, dtype=dtype)
    for result in logps_and_gradients(simpo_ext.linear_token_logps, batch):
        assert result is not None
        assert not result.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_positions_with_incoming_gradient_zero_have_gradient_zero(dtype: torch.dtype) -> None:
    batch = make_linear_batch(vocabulary=4099, dtype=dtype)
    upstream = upstream_of(batch.labels).to(torch.promote_types(dtype, torch.float32))
    upstream[1] = 0.0
    leaf = batch.leaves()
    logps = simpo_ext.linear_token_logps(*leaf[:3], bias=leaf.bias)
    grads = torch.autograd.grad(logps, leaf.inputs(), upstream, retain_graph=True)
    assert not grads[0][1].any()
    truth = linear_oracle.linear_token_logps_grad(
        upstream.double().numpy(), *batch.doubles(), bias=batch.double_bias()
    )
    for got, want in zip(grads, truth, strict=True):
        bound = 16 * torch.finfo(dtype).eps * max(1.0, np.abs(want).max())
        assert np.abs(got.double().numpy() - want).max() <= bound
    zeros = torch.autograd.grad(logps, leaf.inputs(), torch.zeros_like(upstream))
    assert_same(zeros, [torch.zeros_like(x) for x in leaf.inputs()])


# ---- CUDA kernels return NaN for wrong arguments -------------------------------------------------


@pytest.mark.cuda_only
@pytest.mark.parametrize("label", [-1, -99, 4099, 2**31, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_label_out_of_range_makes_only_its_row_nan(dtype: torch.dtype, label: int) -> None:
    batch = make_linear_batch(vocabulary=4099, width=3, dtype=dtype)
    want = logps_and_gradients(simpo_ext.linear_token_logps, batch)
    labels = batch.labels.clone()
    labels[1, 5] = label  # the label of hidden state 4
    got = logps_and_gradients(simpo_ext.linear_token_logps, batch._replace(labels=labels))
    for ours, theirs in zip(got[:2], want[:2], strict=True):
        assert ours is not None and theirs is not None
        assert ours[1, 4].isnan().all() and theirs[1, 4].isfinite().all()
        ours[1, 4] = theirs[1, 4]
        assert_same(ours, theirs)


@pytest.mark.cuda_only
@pytest.mark.parametrize("missing", [1, 5, 20])
def test_tokens_beyond_num_valid_tokens_are_nan(missing: int) -> None:
    batch = make_linear_batch(vocabulary=4099, width=3)
    scored = torch.nn.functional.pad(batch.labels[:, 1:] >= 0, (0, 1))
    count = int(scored.sum()) - missing
    want = simpo_ext.linear_token_logps(*batch[:3])
    got = simpo_ext.linear_token_logps(*batch[:3], num_valid_tokens=count)
    late = scored & (scored.flatten().cumsum(0).view_as(scored) > count)
    assert_same(got.isnan(), late)
    torch.testing.assert_close(got[~late], want[~late], rtol=1e-5, atol=1e-5)
