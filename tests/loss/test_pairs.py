"""Pairs by indices, and weights of pairs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from simpo_ext import linear_simpo_loss, simpo_loss
from support import linear_oracle, oracle
from support.batches import DTYPES, make_batch
from support.comparisons import (
    DIFFERENTIABLE,
    OUTPUTS,
    assert_outputs_match,
    assert_same,
    gradients_by_the_oracle,
    loss_and_gradient,
    reduced_weights,
)
from support.linear_batches import make_linear_batch
from support.packed_batches import PAIRS, make_linear_packed, make_packed

pytestmark = pytest.mark.kernels

NAN, INF = float("nan"), float("inf")
PAIRED = torch.tensor(PAIRS)
# One weight for each pair of PAIRS. Pairs 4 and 5 are dropped.
WEIGHTS = torch.tensor([0.25, -1.5, 3.0, 0.0, 7.0, 0.0, 1.0], dtype=torch.float64)
# Five rows cannot be two halves. Row 1 is in no pair.
ROW_PAIRS = torch.tensor([[0, 2], [0, 3], [4, 0], [3, 2]])
SFTS: list[dict[str, Any]] = [
    {},
    {"sft_weight": 0.3},
    {"sft_weight": 0.3, "sft_reduction": "token"},
]
REDUCTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"normalizer": (3.0, 7.0)},
]
LOSSES: list[dict[str, Any]] = [
    {},
    {"loss_type": "hinge"},
    {"loss_type": "ipo"},
    {"label_smoothing": 0.2, "alpha": 0.1},
]
COMBINATIONS = [
    {**loss, **sft, **reduction}
    for loss, sft, reduction in itertools.product(LOSSES, SFTS, REDUCTIONS)
    if not ("sft_reduction" in sft and reduction.get("reduction") == "none")
]


def five_rows(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """An odd number of padded rows."""
    batch = make_batch(pairs=3, vocabulary=16, dtype=dtype)
    return batch.logits[:5], batch.labels[:5]


def assert_matches(out: Any, want: oracle.Preference, rtol: float = 1e-12) -> None:
    assert_outputs_match(out, want, rtol)
    assert out.metrics() == pytest.approx(want.metrics, rel=1e-5, nan_ok=True)


# ---- pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_by_default_the_first_half_is_paired_with_the_second(packed: bool) -> None:
    batch = make_packed()
    options: dict[str, Any] = {"cu_seqlens": batch.cu_seqlens} if packed else {}
    inputs = batch[:2] if packed else batch.padded()
    halves = torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]])
    want = loss_and_gradient(*inputs, **options)
    assert_same(loss_and_gradient(*inputs, pairs=halves, **options), want)


@pytest.mark.parametrize("options", COMBINATIONS[::3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_rows_in_pairs_match_the_oracle(dtype: torch.dtype, options: Any) -> None:
    logits, labels = five_rows(dtype)
    want, want_gradient = oracle.simpo_loss(
        logits.double().numpy(), labels.numpy(), pairs=ROW_PAIRS.numpy(), **options
    )
    out, (gradient, _) = loss_and_gradient(logits, labels, pairs=ROW_PAIRS, **options)
    assert_matches(out, want, 1e-12 if dtype == torch.float64 else 5e-6)
    rounding = {torch.float64: 1e-13, torch.float32: 3e-6}.get(dtype, torch.finfo(dtype).eps)
    error = np.abs(gradient.double().numpy() - want_gradient).max()
    assert error < rounding * np.abs(want_gradient).max()


def test_rows_of_hidden_states_in_pairs_match_the_oracle() -> None:
    batch = make_linear_batch(pairs=3, dtype=torch.float64)
    batch = batch._replace(hidden=batch.hidden[:5], labels=batch.labels[:5])
    options: dict[str, Any] = {"sft_weight": 0.3, "sft_reduction": "token"}
    want, gradients = linear_oracle.linear_simpo_loss(
        *batch.doubles(), bias=batch.double_bias(), pairs=ROW_PAIRS.numpy(), **options
    )
    leaf = batch.leaves()
    out = linear_simpo_loss(*leaf[:3], bias=leaf.bias, pairs=ROW_PAIRS, **options)
    assert_matches(out, want)
    out.loss.backward()
    for ours, theirs in zip(leaf.inputs(), gradients, strict=True):
        np.testing.assert_allclose(ours.grad.numpy(), theirs, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"sft_weight": 0.3, "sft_reduction": "token"}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shared_sequence_equals_copies_of_it(dtype: torch.dtype, options: Any) -> None:
    logits, labels = five_rows(dtype)
    stacked = ROW_PAIRS.t().flatten()
    leaf = logits.clone().requires_grad_()
    want = simpo_loss(leaf[stacked], labels[stacked], **options)
    want_gradient = torch.autograd.grad(want.loss, leaf)[0]
    out, (gradient, _) = loss_and_gradient(logits, labels, pairs=ROW_PAIRS, **options)
    for name in ("losses", "chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards"):
        assert_same(getattr(out, name), getattr(want, name))
    assert out.metrics() == pytest.approx(want.metrics(), rel=1e-13)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-6, atol=0.0)
    # The copies' gradients are rounded to the dtype before they are added.
    bound = 3 * torch.finfo(dtype).eps * want_gradient.abs().max()
    torch.testing.assert_close(gradient, want_gradient, rtol=0.0, atol=bound.item())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_results_have_the_order_of_the_pairs(dtype: torch.dtype, packed: bool) -> None:
    batch = make_packed(dtype=dtype)
    layout: dict[str, Any] = {"cu_seqlens": batch.cu_seqlens} if packed else {}
    inputs = batch[:2] if packed else batch.padded()
    order = torch.tensor([6, 2, 0, 4, 1, 5, 3])
    want, (want_gradient, _) = loss_and_gradient(*inputs, pairs=PAIRED, **layout)
    out, (gradient, _) = loss_and_gradient(*inputs, pairs=PAIRED[order], **layout)
    for name in ("losses", "chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards"):
        assert_same(getattr(out, name), getattr(want, name)[order])
    eps = torch.finfo(out.loss.dtype).eps
    torch.testing.assert_close(out.loss, want.loss, rtol=4 * eps, atol=0.0)
    bound = 4 * torch.finfo(dtype).eps * want_gradient.abs().max()
    torch.testing.assert_close(gradient, want_gradient, rtol=0.0, atol=bound.item())


@pytest.mark.parametrize("names", [*([name] for name in DIFFERENTIABLE), DIFFERENTIABLE],
                         ids="+".join)  # fmt: skip
@pytest.mark.parametrize("options", [
    {}, {"reduction": "none"}, {"average_log_prob": False, "alpha": 0.02, "reduction": "sum"},
    {"sft_reduction": "token", "loss_type": "hinge"}, {"loss_type": "ipo", "normalizer": 4.0},
], ids=str)  # fmt: skip
def test_gradient_through_each_output_and_all_of_them(options: Any, names: Any) -> None:
    packed = make_packed(vocabulary=11, dtype=torch.float64, before=1, after=1)
    options = {"sft_weight": 0.3, **options}
    layout = {"cu_seqlens": packed.cu_seqlens, "pairs": PAIRED, "pair_weight": WEIGHTS}
    leaf = packed.logits.clone().requires_grad_()
    out = simpo_loss(leaf, packed.labels, **layout, **options)
    outputs = [getattr(out, name) for name in names]
    (gradient,) = torch.autograd.grad(outputs, leaf, [reduced_weights(x) for x in outputs])
    _, want = packed.oracle_loss(
        pairs=PAIRS, pair_weight=WEIGHTS.numpy(), **gradients_by_the_oracle(names, out), **options
    )
    np.testing.assert_allclose(gradient.numpy(), want, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient_through_each_output_of_the_linear_loss(name: str) -> None:
    batch, packed = make_linear_packed(vocabulary=11, dtype=torch.float64, before=1)
    leaf = batch.leaves()
    layout = {"cu_seqlens": packed.cu_seqlens, "pairs": PAIRED, "pair_weight": WEIGHTS}
    out = linear_simpo_loss(*leaf[:3], bias=leaf.bias, sft_weight=0.3, **layout)
    result = getattr(out, name)
    gradients = torch.autograd.grad(result, leaf.inputs(), reduced_weights(result))
    layout = {"cu_seqlens": packed.cu_seqlens.numpy(), "pairs": PAIRS}
    _, want = linear_oracle.linear_simpo_loss(
        *batch.doubles(), bias=batch.double_bias(), sft_weight=0.3, pair_weight=WEIGHTS.numpy(),
        **layout, **gradients_by_the_oracle([name], out),
    )  # fmt: skip
    for got, expected in zip(gradients, want, strict=True):
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_in_no_pair_change_nothing(dtype: torch.dtype) -> None:
    logits, labels = five_rows(dtype)
    pairs = torch.tensor([[4, 0], [2, 0]])
    want, (want_gradient, _) = loss_and_gradient(logits, labels, pairs=pairs)
    logits[[1, 3]] = NAN
    out, (gradient, _) = loss_and_gradient(logits, labels, pairs=pairs)
    assert_same((tuple(out), gradient), (tuple(want), want_gradient))
    assert not gradient[[1, 3]].any()


def test_a_sequence_paired_with_itself_learns_only_from_the_sft_term() -> None:
    logits, labels = five_rows()
    pairs = torch.tensor([[2, 2]])
    out, (gradient, _) = loss_and_gradient(logits, labels, pairs=pairs)
    assert out.losses.item() == pytest.approx(np.log1p(np.e), rel=1e-15)  # beta 2, ratio 0.5
    assert not gradient.any()
    _, (gradient, _) = loss_and_gradient(logits, labels, pairs=pairs, sft_weight=1.0)
    _, want = oracle.simpo_loss(logits.numpy(), labels.numpy(), pairs=[[2, 2]], sft_weight=1.0)
    np.testing.assert_allclose(gradient.numpy(), want, rtol=1e-13, atol=1e-16)


def test_a_pair_given_twice_counts_twice() -> None:
    logits, labels = five_rows()
    weights = torch.tensor([2.0, 1.0])
    out, (gradient, _) = loss_and_gradient(
        logits, labels, pairs=torch.tensor([[0, 2], [3, 4], [0, 2]]), reduction="sum"
    )
    want, (want_gradient, _) = loss_and_gradient(
        logits, labels, pairs=torch.tensor([[0, 2], [3, 4]]), pair_weight=weights, reduction="sum"
    )
    torch.testing.assert_close((out.loss, gradient), (want.loss, want_gradient))
    assert out.metrics()["num_pairs"] == 3


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sequences_without_pairs(reduction: Any) -> None:
    logits, labels = five_rows()
    pairs = torch.zeros(0, 2, dtype=torch.int64)
    options: dict[str, Any] = {"reduction": reduction, "sft_weight": 0.5, "pairs": pairs}
    out, (gradient, _) = loss_and_gradient(logits, labels, **options)
    assert out.loss.sum() == 0 and out.losses.shape == (0,)
    assert not gradient.any()
    assert out.metrics()["num_pairs"] == out.metrics()["dropped_pairs"] == 0
    if reduction == "mean":
        assert simpo_loss(logits, labels, empty="nan", pairs=pairs).loss.isnan()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("strided", [False, True])
def test_pairs_of_any_integer_dtype_and_stride(strided: bool, dtype: torch.dtype) -> None:
    packed = make_packed()
    options: dict[str, Any] = {"cu_seqlens": packed.cu_seqlens}
    want = loss_and_gradient(*packed[:2], pairs=PAIRED, **options)
    pairs = PAIRED.to(dtype)
    if strided:  # Columns first in memory, and every other column skipped.
        pairs = torch.stack((pairs.t(), torch.full_like(pairs.t(), 99)), dim=1)[:, 0].t()
    assert_same(loss_and_gradient(*packed[:2], pairs=pairs, **options), want)


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weighted_pairs_match_the_oracle(dtype: torch.dtype, options: dict[str, Any]) -> None:
    packed = make_packed(vocabulary=16, dtype=dtype, after=2)
    want, want_gradient = packed.oracle_loss(pairs=PAIRS, pair_weight=WEIGHTS.numpy(), **options)
    out, (gradient, _) = loss_and_gradient(
        *packed[:2], cu_seqlens=packed.cu_seqlens, pairs=PAIRED, pair_weight=WEIGHTS, **options
    )
    assert_matches(out, want, 1e-12 if dtype == torch.float64 else 5e-6)
    assert out.loss.dtype == dtype
    bound = (1e-13 if dtype == torch.float64 else 3e-6) * np.abs(want_gradient).max()
    np.testing.assert_allclose(gradient.double().numpy(), want_gradient, rtol=0.0, atol=bound)


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_weighted_rows_without_pairs_match_the_oracle(options: dict[str, Any]) -> None:
    batch = make_batch(pairs=3, vocabulary=16, dtype=torch.float64)
    weights = torch.tensor([0.5, -2.0, 0.0])
    want, want_gradient = oracle.simpo_loss(
        batch.logits.numpy(), batch.labels.numpy(), pair_weight=weights.numpy(), **options
    )
    out, (gradient, _) = loss_and_gradient(*batch, pair_weight=weights, **options)
    assert_matches(out, want)
    np.testing.assert_allclose(gradient.numpy(), want_gradient, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_weights_of_one_change_no_bit(options: dict[str, Any]) -> None:
    batch = make_batch(pairs=3)
    ones = torch.ones(3)
    want = loss_and_gradient(*batch, **options)
    assert_same(loss_and_gradient(*batch, pair_weight=ones, **options), want)


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_weights_of_two_double_the_weighted_results_only(options: dict[str, Any]) -> None:
    batch = make_batch(pairs=3)
    want, (want_gradient, _) = loss_and_gradient(*batch, **options)
    out, (gradient, _) = loss_and_gradient(*batch, pair_weight=torch.full((3,), 2), **options)
    for name in OUTPUTS:
        factor = 2 if name in ("loss", "losses", "sft_loss") else 1
        assert_same(getattr(out, name), factor * getattr(want, name))
    assert_same(gradient, 2 * want_gradient)
    assert_same(out.metrics_values, want.metrics_values)


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_weight_zero_drops_a_pair_that_is_not_finite(options: Any, garbage: float) -> None:
    batch = make_batch(pairs=3, dtype=torch.float64)
    spoiled = batch.logits.clone()
    spoiled[[1, 4]] = garbage
    for zero in (0.0, -0.0):
        weight = torch.tensor([2.0, zero, -0.5])
        want, (want_gradient, _) = loss_and_gradient(*batch, pair_weight=weight, **options)
        out, (gradient, _) = loss_and_gradient(spoiled, batch.labels, pair_weight=weight, **options)
        # The sums equal those with a finite pair of weight 0.
        for name in ("loss", "losses", "sft_loss"):
            assert_same(getattr(out, name), getattr(want, name))
        assert_same(gradient, want_gradient)
        assert not gradient[[1, 4]].any()
        assert out.losses[1] == 0
        assert out.chosen_logps.isnan().tolist() == [False, True, False]
        assert out.metrics()["num_pairs"] == 3


@pytest.mark.parametrize("options", [*SFTS, {"reduction": "none"}], ids=str)
def test_weight_zero_drops_an_empty_pair(options: dict[str, Any]) -> None:
    batch = make_batch(pairs=3)
    batch.labels[4] = -100
    weight = torch.tensor([2.0, 0.0, -0.5])
    out, (gradient, _) = loss_and_gradient(*batch, pair_weight=weight, empty="nan", **options)
    assert out.loss.isfinite().all() and out.losses[1] == 0
    assert gradient.isfinite().all() and not gradient[[1, 4]].any()


@pytest.mark.parametrize("weight", [NAN, INF])
@pytest.mark.parametrize("options", SFTS, ids=str)
def test_the_weight_of_a_dropped_pair_changes_nothing(options: Any, weight: float) -> None:
    batch = make_batch(pairs=3)
    batch.labels[4] = -100
    want = loss_and_gradient(*batch, pair_weight=torch.tensor([2.0, 1.0, -0.5]), **options)
    weights = torch.tensor([2.0, weight, -0.5])
    assert_same(loss_and_gradient(*batch, pair_weight=weights, **options), want)


@pytest.mark.parametrize("options", SFTS[:2], ids=str)
def test_normalizing_by_the_sum_of_weights_gives_a_weighted_mean(options: Any) -> None:
    batch = make_batch(pairs=3, dtype=torch.float64)
    weights = torch.tensor([0.5, 2.0, 0.75], dtype=torch.float64)
    out = simpo_loss(*batch, pair_weight=weights, normalizer=weights.sum(), **options)
    each = simpo_loss(*batch, reduction="none", **options).loss
    torch.testing.assert_close(out.loss, (each * weights).sum() / weights.sum())


WEIGHT_DTYPES = [*DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("of_logits", [torch.float64, torch.bfloat16])
def test_weights_of_any_dtype_and_stride(of_logits: torch.dtype, dtype: torch.dtype) -> None:
    batch = make_batch(pairs=3, dtype=of_logits)
    weights = torch.tensor([3.0, 0.0, 2.0])
    want = loss_and_gradient(*batch, pair_weight=weights, sft_weight=0.3)
    strided = torch.stack((weights, weights + 9), dim=1).to(dtype)[:, 0]
    got = loss_and_gradient(*batch, pair_weight=strided, sft_weight=0.3)
    assert_same(got, want)
    assert [x.dtype for x in got[0]] == [x.dtype for x in want[0]]


def test_float64_losses_use_all_digits_of_float64_weights() -> None:
    batch = make_batch(pairs=1, dtype=torch.float64)
    weight = torch.tensor([1.0 + 2.0**-40], dtype=torch.float64)
    ratio = simpo_loss(*batch, pair_weight=weight).loss / simpo_loss(*batch).loss
    assert ratio.item() == pytest.approx(weight.item(), abs=4e-16)


@pytest.mark.parametrize("options", COMBINATIONS[::4], ids=str)
def test_weighted_pairs_of_the_linear_loss_match_the_oracle(options: dict[str, Any]) -> None:
    batch, packed = make_linear_packed(dtype=torch.float64, after=2)
    want, gradients = linear_oracle.linear_simpo_loss(
        *batch.doubles(), bias=batch.double_bias(), cu_seqlens=packed.cu_seqlens.numpy(),
        pairs=PAIRS, pair_weight=WEIGHTS.numpy(), **options,
    )  # fmt: skip
    leaf = batch.leaves()
    layout = {"cu_seqlens": packed.cu_seqlens, "pairs": PAIRED, "pair_weight": WEIGHTS}
    out = linear_simpo_loss(*leaf[:3], bias=leaf.bias, **layout, **options)
    assert_matches(out, want)
    out.loss.sum().backward()
    for ours, theirs in zip(leaf.inputs(), gradients, strict=True):
        np.testing.assert_allclose(ours.grad.numpy(), theirs, rtol=1e-11, atol=1e-13)
