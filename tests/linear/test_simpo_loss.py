"""linear_simpo_loss and LinearSimPOLoss: values, gradients, keywords and modules."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import simpo_ext
from simpo_ext import LinearSimPOLoss, SimPOOutput, linear_simpo_loss, simpo_loss
from support import linear_oracle
from support.batches import DTYPES
from support.comparisons import assert_same
from support.linear_batches import LinearBatch, make_linear_batch
from support.signatures import keywords

pytestmark = pytest.mark.kernels

DIFFERENTIABLE = ("loss", "losses", "chosen_logps", "rejected_logps", "sft_loss")
REWARDS = ("chosen_rewards", "rejected_rewards")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"loss_type": "hinge"},
    {"label_smoothing": 0.1},
    {"beta": 10.0, "gamma_beta_ratio": -0.3},
    {"gamma": 1.5, "beta": 2.5},
    {"average_log_prob": False, "beta": 0.2},
    {"reduction": "sum"},
    {"reduction": "none", "sft_weight": 0.3},
    {"sft_weight": 0.3},
    {"sft_weight": 0.3, "sft_reduction": "token"},
    {"normalizer": 7.0, "sft_weight": 0.3},
    {"normalizer": (7.0, 11.0), "sft_weight": 0.3, "sft_reduction": "token"},
    {"empty": "nan"},
    {"ignore_index": 3},
    {"shift": False},
    {"softcap": 6.0, "logit_scale": 1.5},
    {"inplace_backward": True},
]
# Keywords of linear_simpo_loss that simpo_loss lacks.
OWN_KEYWORDS = {"bias": None, "logits_budget_bytes": None, "num_valid_tokens": None}


def scored(batch: LinearBatch, **options: Any) -> tuple[SimPOOutput, list[Tensor]]:
    """The outputs, and the gradients of hidden, weight and bias."""
    leaf = batch.leaves()
    out = linear_simpo_loss(*leaf[:3], bias=leaf.bias, **options)
    return out, list(torch.autograd.grad(out.loss.sum(), leaf.inputs()))


def from_logits(batch: LinearBatch, **options: Any) -> tuple[SimPOOutput, list[Tensor]]:
    """The outputs and gradients of the loss of all logits."""
    leaf = batch.leaves()
    logits = torch.nn.functional.linear(leaf.hidden, leaf.weight, leaf.bias)
    out = simpo_loss(logits, batch.labels, **options)
    return out, list(torch.autograd.grad(out.loss.sum(), leaf.inputs()))


def batch_for(options: dict[str, Any], **shape: Any) -> LinearBatch:
    """A batch whose masked labels are the options' ignore_index."""
    batch = make_linear_batch(pairs=3, time=12, **shape)
    ignore_index = options.get("ignore_index", -100)
    return batch._replace(labels=batch.labels.masked_fill(batch.labels == -100, ignore_index))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_output_and_gradient_match_the_oracle(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    batch = batch_for(options, vocabulary=131, dtype=dtype)
    out, grads = scored(batch, **options)
    options = {name: value for name, value in options.items() if name != "inplace_backward"}
    if "gamma" in options:
        options["gamma_beta_ratio"] = options.pop("gamma") / options["beta"]
    want, want_grads = linear_oracle.linear_simpo_loss(
        *batch.doubles(), bias=batch.double_bias(), **options
    )
    # Logits of up to 16 are off by a few ulp. A sum of 11 log-probabilities adds up their errors.
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for name in (*DIFFERENTIABLE, *REWARDS):
        result = getattr(out, name)
        assert result.dtype == dtype
        truth = torch.as_tensor(getattr(want, name), dtype=torch.float64)
        torch.testing.assert_close(
            result.detach().double(), truth, msg=name, rtol=tolerance, atol=tolerance
        )
    assert out.metrics() == pytest.approx(want.metrics, rel=tolerance, abs=tolerance)
    for got, truth in zip(grads, want_grads, strict=True):
        assert np.abs(got.double().numpy() - truth).max() < tolerance * np.abs(truth).max() * 2


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_match_those_of_the_logits(dtype: torch.dtype, options: dict[str, Any]) -> None:
    batch = batch_for(options, vocabulary=4099, width=6, dtype=dtype)
    out, grads = scored(batch, **options)
    want, want_grads = from_logits(batch, **options)
    # Both round the logits to the dtype. A few are rounded differently, because GEMMs of other
    # shapes sum in another order.
    relative = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    for name in (*DIFFERENTIABLE, *REWARDS, "metrics_values"):
        ours, theirs = getattr(out, name), getattr(want, name)
        assert ours.requires_grad == theirs.requires_grad
        torch.testing.assert_close(ours, theirs, rtol=relative, atol=relative, equal_nan=True)
    assert list(out.metrics()) == list(want.metrics())
    for got, expected in zip(grads, want_grads, strict=True):
        assert got.dtype == dtype
        error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
        assert error <= 2 * relative


@pytest.mark.parametrize("empty", ["drop", "nan"])
@pytest.mark.parametrize("rows", [[1], [4], [1, 4]])
def test_pairs_with_an_empty_sequence_are_dropped_or_nan(rows: list[int], empty: str) -> None:
    batch = make_linear_batch(pairs=3, vocabulary=4099, width=4, dtype=torch.float64)
    batch.labels[rows] = -100
    options: dict[str, Any] = {"empty": empty, "sft_weight": 0.3}
    (out, grads), (want, want_grads) = scored(batch, **options), from_logits(batch, **options)
    for got, expected in ((tuple(out), tuple(want)), (grads, want_grads)):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13, equal_nan=True)
    assert out.metrics()["dropped_pairs"] == (empty == "drop")
    assert out.losses.isnan().tolist() == [False, empty == "nan", False]
    if empty == "drop":
        assert not grads[0][[1, 4]].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0, 5, 7), (4, 0, 7), (4, 1, 7), (4, 5, 7)])
def test_loss_zero_without_scored_tokens(shape: tuple[int, int, int], reduction: str) -> None:
    labels = torch.full(shape[:2], 3 if shape[1] == 1 else -100)
    batch = LinearBatch(torch.randn(shape), torch.randn(11, 7), labels, torch.randn(11))
    out, grads = scored(batch, reduction=reduction, sft_weight=0.5)
    want, _ = from_logits(batch, reduction=reduction, sft_weight=0.5)
    assert_same(tuple(out), tuple(want))
    assert not out.loss.any()
    assert_same(grads, [torch.zeros_like(x) for x in batch.inputs()])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_every_differentiable_output_has_its_own_gradient(name: str) -> None:
    batch = make_linear_batch(pairs=3, vocabulary=131, dtype=torch.float64)
    results = []
    for function in (
        linear_simpo_loss,
        lambda h, w, labels, bias, **options: simpo_loss(
            torch.nn.functional.linear(h, w, bias), labels, **options
        ),
    ):
        leaf = batch.leaves()
        out = function(*leaf[:3], bias=leaf.bias, sft_weight=0.2, label_smoothing=0.1)
        value = getattr(out, name)
        weights = torch.linspace(0.5, 1.5, max(value.numel(), 1)).to(value).view(value.shape)
        results.append(torch.autograd.grad(value, leaf.inputs(), weights))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-13)


def test_gradients_of_several_outputs_add_up() -> None:
    batch = make_linear_batch(dtype=torch.float64)

    def gradients(with_loss: float, with_rest: float) -> tuple[Tensor, ...]:
        leaf = batch.leaves()
        out = linear_simpo_loss(*leaf[:3], bias=leaf.bias, sft_weight=0.2)
        rest = out.losses[1] + out.chosen_logps.sum() - out.sft_loss
        return torch.autograd.grad(with_loss * out.loss + with_rest * rest, leaf.inputs())

    both, first, second = gradients(1.0, 1.0), gradients(1.0, 0.0), gradients(0.0, 1.0)
    added = tuple(x + y for x, y in zip(first, second, strict=True))
    torch.testing.assert_close(both, added, rtol=1e-12, atol=1e-13)


def test_rewards_and_metrics_are_detached_and_nothing_is_recorded_without_grad() -> None:
    leaf = make_linear_batch().leaves()
    out = linear_simpo_loss(*leaf[:3], bias=leaf.bias)
    assert [x.requires_grad for x in tuple(out)] == [True] * 4 + [False] * 2 + [True, False]
    with torch.no_grad():
        out = linear_simpo_loss(*leaf[:3], bias=leaf.bias)
    assert not any(x.requires_grad for x in tuple(out))


def test_inplace_backward_does_not_change_the_hidden_states() -> None:
    batch = make_linear_batch().leaves()
    hidden = batch.hidden * 1
    before = hidden.detach().clone()
    out = linear_simpo_loss(hidden, *batch[1:3], bias=batch.bias, inplace_backward=True)
    (out.loss + hidden.square().sum()).backward()  # square saved the hidden states.
    assert_same(hidden.detach(), before)


def test_micro_batches_with_a_normalizer_give_the_gradient_of_the_whole() -> None:
    batch = make_linear_batch(pairs=6, dtype=torch.float64)
    options: dict[str, Any] = {"sft_weight": 0.3, "sft_reduction": "token"}
    out, whole = scored(batch, **options)
    chosen_tokens = (batch.labels[:6, 1:] != -100).sum().item()
    leaf, total = batch.leaves(), 0.0
    for pairs in ([0, 1], [2], [3, 4, 5]):
        rows = [*pairs, *[6 + pair for pair in pairs]]
        part = linear_simpo_loss(
            leaf.hidden[rows], leaf.weight, leaf.labels[rows], bias=leaf.bias,
            normalizer=(6.0, chosen_tokens), **options,
        )  # fmt: skip
        part.loss.backward()
        total += part.loss.item()
    assert total == pytest.approx(out.loss.item(), rel=1e-13)
    for got, want in zip([x.grad for x in leaf.inputs()], whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


# ---- keywords ------------------------------------------------------------------------------------


def test_linear_simpo_loss_takes_every_keyword_of_simpo_loss() -> None:
    assert keywords(linear_simpo_loss) == {**keywords(simpo_loss), **OWN_KEYWORDS}
    positional = [
        name
        for name, parameter in inspect.signature(linear_simpo_loss).parameters.items()
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    ]
    assert positional == ["hidden", "weight", "labels"]


def test_linear_token_logps_takes_every_keyword_of_token_logps_but_one() -> None:
    # Without logits, there is no inplace_backward.
    of_logits = keywords(simpo_ext.token_logps)
    del of_logits["inplace_backward"]
    assert keywords(simpo_ext.linear_token_logps) == {**of_logits, **OWN_KEYWORDS}


def test_the_module_keeps_the_options_and_takes_the_tensors() -> None:
    of_a_call = dict.fromkeys(("cu_seqlens", "pairs", "pair_weight"))
    own = {"logits_budget_bytes": None}
    assert {**keywords(LinearSimPOLoss), **of_a_call} == {**keywords(simpo_loss), **own}
    forward = dict.fromkeys(("bias", "normalizer", "num_valid_tokens"))
    assert keywords(LinearSimPOLoss.forward) == {**of_a_call, **forward}


def test_the_public_names_are_those_of_their_modules() -> None:
    for name in ("linear_token_logps", "linear_simpo_loss"):
        assert getattr(simpo_ext, name) is getattr(simpo_ext.functional, name)
        assert name in simpo_ext.functional.__all__ and name in simpo_ext.__all__
    assert simpo_ext.LinearSimPOLoss is simpo_ext.modules.LinearSimPOLoss
    assert "LinearSimPOLoss" in simpo_ext.__all__


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_module_equals_the_function_with_its_options(options: dict[str, Any]) -> None:
    hidden, weight, labels, bias = batch_for(options, vocabulary=4099, width=4)
    module = LinearSimPOLoss(logits_budget_bytes=0, **options)
    out = module(hidden, weight, labels, bias=bias)
    want = linear_simpo_loss(hidden, weight, labels, bias=bias, **options)
    assert_same(tuple(out), tuple(want))
    assert list(module.parameters()) == []


def test_a_call_of_the_module_takes_a_normalizer_and_a_count() -> None:
    hidden, weight, labels, _ = make_linear_batch()
    module = LinearSimPOLoss(normalizer=3.0)
    valid = int((labels[:, 1:] != -100).sum())
    for options in ({"normalizer": 10.0}, {"num_valid_tokens": valid}):
        expected = linear_simpo_loss(hidden, weight, labels, **{"normalizer": 3.0, **options})
        assert_same(module(hidden, weight, labels, **options).loss, expected.loss)
    with pytest.raises(ValueError, match="num_valid_tokens: expected"):
        module(hidden, weight, labels, num_valid_tokens=-1)


def test_the_module_s_repr_shows_every_option() -> None:
    options = keywords(LinearSimPOLoss) | {"gamma": 1.0, "beta": 2.5, "logits_budget_bytes": 4096}
    shown = repr(LinearSimPOLoss(**options))
    del options["gamma"], options["preset"]
    options.update(
        gamma_beta_ratio=0.4, loss_type="sigmoid", sft_weight=0.0, sft_reduction="sequence",
        average_log_prob=True, empty="drop", shift=True,
    )  # fmt: skip
    want = {f"{name}={value!r}" for name, value in options.items()}
    assert shown.startswith("LinearSimPOLoss(")
    inside = shown.removeprefix("LinearSimPOLoss(").removesuffix(")")
    assert set(inside.split(", ")) == want
