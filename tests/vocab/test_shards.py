"""The ops of a sharded vocabulary, in one process, match those of the whole vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from simpo_ext.distributed import (
    VocabShard,
    vocab_parallel_linear_token_logps,
    vocab_parallel_token_logps,
)
from support import linear_oracle, oracle
from support.batches import DTYPES, Batch, make_batch
from support.comparisons import assert_same
from support.linear_batches import UNLIMITED, LinearBatch, make_linear_batch, upstream_of
from support.vocab_batches import (
    CUTS,
    OPS,
    in_shards,
    linear_in_shards,
    linear_whole,
    token_options,
    whole,
)

pytestmark = pytest.mark.kernels

OPTIONS: list[dict[str, Any]] = [
    {},
    {"shift": False, "logit_scale": 0.25},
    {"softcap": 5.0, "logit_scale": 1.5},
]
OPTIONS_OF_OPS = token_options()


def assert_as_exact(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], truth: Sequence[Tensor]
) -> None:
    """Errors may be twice those of the whole vocabulary's ops, or a few ulp of the largest."""
    for i, (x, y, z) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        error, other_error = ((w.double() - z).abs().max().item() for w in (x, y))
        # One ulp of a gradient in a short dtype, else 8.
        ulps = 1 if x.dtype in (torch.bfloat16, torch.float16) else 8
        floor = ulps * torch.finfo(x.dtype).eps * max(1.0, z.abs().max().item())
        assert error <= max(2 * other_error, floor), i


# ---- from logits ---------------------------------------------------------------------------------


def check_shards(batch: Batch, cuts: Sequence[int], **options: Any) -> None:
    upstream = upstream_of(batch.labels).float()
    ours = in_shards(batch, upstream, token_options(**options), cuts)
    theirs = whole(batch, upstream, token_options(**options))
    args = batch.logits.double().numpy(), batch.labels.numpy()
    logps, _, _ = oracle.token_logps(*args, **options)
    dlogits = oracle.token_logps_grad(upstream.double().numpy(), *args, **options)
    truth = [torch.from_numpy(x) for x in (logps, dlogits)]
    assert_as_exact([ours[0], ours[3]], [theirs[0], theirs[3]], truth)
    assert_same(ours[1], theirs[1])  # The maximum is exact.
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cuts", CUTS[50], ids=len)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_match_the_whole_vocabulary(
    dtype: torch.dtype, cuts: Sequence[int], options: dict[str, Any]
) -> None:
    check_shards(make_batch(dtype=dtype), cuts, **options)


# Shards longer and shorter than a block of the CPU kernels, and than a large block of a GPU's.
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_long_rows_in_shards(dtype: torch.dtype) -> None:
    batch = make_batch(pairs=1, time=4, vocabulary=70_001, dtype=dtype)
    check_shards(batch, (0, 65_537, 65_540, 70_001))


@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_at_both_ends_of_every_shard(dtype: torch.dtype) -> None:
    cuts = (0, 8, 9, 33, 50)
    ends = torch.tensor([0, 7, 8, 9, 32, 33, 49, 20])
    batch = make_batch(dtype=dtype)
    check_shards(batch._replace(labels=ends.repeat(4, 1)), cuts, shift=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_shard_has_the_bits_of_the_whole_vocabulary(dtype: torch.dtype) -> None:
    batch, options = make_batch(dtype=dtype), token_options(softcap=9.0)
    upstream = upstream_of(batch.labels)
    for cuts in ((0, 50), (0, 0, 50, 50)):
        assert_same(in_shards(batch, upstream, options, cuts), whole(batch, upstream, options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_are_not_finite(dtype: torch.dtype) -> None:
    batch = make_batch(dtype=dtype)
    logits, labels = batch.logits.clone(), torch.full((4, 8), 30)
    logits[0, 0, :17] = -math.inf  # a whole shard
    logits[0, 1, 30] = -math.inf  # the label's logit
    logits[0, 2] = -math.inf
    logits[0, 3, 2] = math.nan  # in a shard without the label
    logits[0, 4, 2] = math.inf
    logits[0, 5, 30] = math.nan
    logits[0, 6, 17:] = -math.inf  # the label's shard
    batch = Batch(logits, labels)
    options, upstream = token_options(shift=False), torch.ones(4, 8)
    got = in_shards(batch, upstream, options, (0, 17, 17, 50))
    want = whole(batch, upstream, options)
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6, equal_nan=True)
    assert got[0][0, 1] == got[0][0, 6] == -math.inf
    assert got[0][0, 2:6].isnan().all()
    assert got[3][0, 2:6].isnan().all()
    fine = [0, 1, 6, 7]
    bound = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(got[3][0, fine], want[3][0, fine], rtol=bound, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_logits_are_not_read(dtype: torch.dtype) -> None:
    batch, options = make_batch(dtype=dtype), token_options()
    upstream = upstream_of(batch.labels)
    want = in_shards(batch, upstream, options, (0, 20, 50))
    masked = torch.nn.functional.pad(batch.labels[:, 1:] == -100, (0, 1), value=True)
    spoiled = batch._replace(logits=batch.logits.masked_fill(masked[..., None], math.nan))
    got = in_shards(spoiled, upstream, options, (0, 20, 50))
    assert_same(got, want)
    assert not got[3][masked].any()
    assert not got[0][masked].any()


def test_gradients_in_place_have_the_same_bits() -> None:
    for dtype in DTYPES:
        batch, options = make_batch(dtype=dtype), token_options()
        upstream = upstream_of(batch.labels)
        args = batch, upstream, options, (0, 20, 20, 49, 50)
        assert_same(in_shards(*args, in_place=True), in_shards(*args))


def test_a_label_of_two_shards_is_nan() -> None:
    # Ranks have different labels.
    batch = make_batch()
    parts = (batch.logits[..., :20], batch.labels.clamp(max=19), 0), (
        batch.logits[..., 20:], batch.labels, 20)  # fmt: skip
    stats = [OPS.token_logps_shard(*part, 50, *OPTIONS_OF_OPS) for part in parts]
    logps, _, _ = OPS.token_logps_merge(torch.stack(stats), batch.labels, -100, True, False)
    targets = torch.nn.functional.pad(batch.labels[:, 1:], (0, 1), value=-100)
    assert_same(logps.isnan(), targets >= 20)


@pytest.mark.cpu_only
@pytest.mark.parametrize("label", [-1, 50, 2**63 - 1])
def test_a_label_out_of_range_is_an_error_on_every_shard(label: int) -> None:
    batch, linear = make_batch(), make_linear_batch()
    batch.labels[1, 5] = linear.labels[1, 5] = label
    shard = VocabShard(20, 50, lambda x: x[None], lambda x: x)
    message = rf"labels\[1, 5\] is out of range: .* in \[0, 50\), got {label}"
    with pytest.raises(IndexError, match=message):
        vocab_parallel_token_logps(batch.logits[..., 20:30], batch.labels, shard)
    with pytest.raises(IndexError, match=message):
        vocab_parallel_linear_token_logps(linear.hidden, linear.weight[20:20], linear.labels, shard)


@pytest.mark.cuda_only
@pytest.mark.parametrize("label", [-1, 50, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_label_out_of_range_makes_only_its_row_nan(dtype: torch.dtype, label: int) -> None:
    batch, linear, options = make_batch(dtype=dtype), make_linear_batch(dtype=dtype), OPTIONS_OF_OPS
    upstream = torch.ones(batch.labels.shape)
    results = []
    for wrong in (False, True):
        labels = batch.labels.clone()
        labels[1, 5] = label if wrong else 7
        got = in_shards(batch._replace(labels=labels), upstream, options, (0, 20, 20, 50))
        got += linear_in_shards(linear._replace(labels=labels), upstream, options, (0, 20, 20, 50))[
            :4
        ]
        results.append([got[0], got[3], got[4], got[7]])
    for ours, want in zip(results[1], results[0], strict=True):
        assert ours[1, 4].isnan().all() and want[1, 4].isfinite().all()
        ours[1, 4] = want[1, 4]
        assert_same(ours, want)


# ---- from hidden states --------------------------------------------------------------------------


def check_linear_shards(
    batch: LinearBatch, cuts: Sequence[int], budget: int = 0, count: int = -1, **options: Any
) -> None:
    upstream = upstream_of(batch.labels).float()
    ours = linear_in_shards(batch, upstream, token_options(**options), cuts, budget, count)
    theirs = linear_whole(batch, upstream, token_options(**options), budget, count)
    bias = batch.double_bias()
    logps, _, _ = linear_oracle.linear_token_logps(*batch.doubles(), bias=bias, **options)
    gradients = linear_oracle.linear_token_logps_grad(
        upstream.double().numpy(), *batch.doubles(), bias=bias, **options
    )
    truth = [torch.from_numpy(x) for x in (logps, *gradients) if x is not None]
    assert_as_exact([ours[0], *ours[3:]], [theirs[0], *theirs[3:]], truth[: len(theirs) - 2])


@pytest.mark.parametrize("budget", [0, UNLIMITED])
@pytest.mark.parametrize("cuts", CUTS[50][1:5], ids=len)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_shards_match_the_whole_vocabulary(
    dtype: torch.dtype, cuts: Sequence[int], budget: int
) -> None:
    check_linear_shards(make_linear_batch(dtype=dtype), cuts, budget)


@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_linear_shards_with_options(
    dtype: torch.dtype, bias: bool, options: dict[str, Any]
) -> None:
    batch = make_linear_batch(dtype=dtype, bias=bias, width=5)
    check_linear_shards(batch, (0, 20, 20, 50), UNLIMITED, 40, **options)


# A shard of several chunks, one of a single chunk, and an empty one.
@pytest.mark.parametrize("budget", [0, 2**17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_of_several_chunks(dtype: torch.dtype, budget: int) -> None:
    batch = make_linear_batch(pairs=1, vocabulary=13_000, width=3, dtype=dtype)
    check_linear_shards(batch, (0, 8500, 8500, 13_000), budget)


@pytest.mark.parametrize("strided", [False, True])
def test_dhidden_is_rounded_once_after_the_sum(strided: bool) -> None:
    for dtype in DTYPES:
        hidden, weight, labels, _ = make_linear_batch(dtype=dtype, vocabulary=20, width=5)
        weight = weight.t().contiguous().t() if strided else weight
        float64 = dtype == torch.float64
        args = hidden, weight, None, labels
        stats, kept = OPS.linear_token_logps_shard(*args, 0, 20, *OPTIONS_OF_OPS, 0, 30)
        logps, *rows = OPS.linear_token_logps_merge(
            stats[None], labels, *OPTIONS_OF_OPS[:2], float64
        )
        dhidden, dweight, dbias = OPS.linear_token_logps_shard_backward(
            torch.ones_like(logps), *args, *rows, kept, 0, 20, *OPTIONS_OF_OPS, True, False, False
        )
        assert (dhidden.shape, dhidden.dtype) == ((30, 5), logps.dtype)
        assert dweight.shape == dbias.shape == (0,)
        valid = torch.nn.functional.pad(labels[:, 1:] >= 0, (0, 1))
        count = int(valid.sum())
        assert dhidden[:count].any(1).all()
        assert not dhidden[count:].any()
        want = torch.zeros_like(hidden)
        want[valid] = dhidden[:count].to(dtype)
        got = OPS.linear_token_logps_dhidden(dhidden, hidden, labels, *OPTIONS_OF_OPS[:2])
        assert_same(got, want)
