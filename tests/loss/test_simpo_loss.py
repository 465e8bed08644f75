"""simpo_loss, simpo_loss_from_logps and SimPOLoss: values, gradients and metrics."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

import simpo_ext
from support import oracle
from support.batches import DTYPES, Batch, make_batch
from support.comparisons import OUTPUTS
from support.signatures import keywords

pytestmark = pytest.mark.kernels

COMBINATIONS = [
    {"loss_type": loss_type, "average_log_prob": average, "reduction": reduction, **sft}
    for loss_type, average, reduction, sft in itertools.product(
        ("sigmoid", "hinge"),
        (True, False),
        ("mean", "sum", "none"),
        ({}, {"sft_weight": 0.3}, {"sft_weight": 0.3, "sft_reduction": "token"}),
    )
    if not (reduction == "none" and sft.get("sft_reduction") == "token")
]
EXTRAS: list[dict[str, Any]] = [
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.5},
    {"beta": 10.0, "gamma_beta_ratio": -0.3},
    {"normalizer": 7.0, "sft_weight": 0.3},
    {"normalizer": (7.0, 11.0), "sft_weight": 0.3, "sft_reduction": "token"},
    {"softcap": 6.0, "logit_scale": 1.5},
    {"shift": False},
    {"gamma": 1.5, "beta": 2.5},
]


def as_oracle_options(options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    if "gamma" in options:
        options["gamma_beta_ratio"] = options.pop("gamma") / options["beta"]
    return options


@pytest.mark.parametrize("options", COMBINATIONS + EXTRAS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_output_and_the_gradient_match_the_oracle(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    batch = make_batch(pairs=3, time=12, vocabulary=40, dtype=dtype)
    expected, expected_gradient = oracle.simpo_loss(
        batch.logits.double().numpy(), batch.labels.numpy(), **as_oracle_options(options)
    )
    leaf = batch.logits.clone().requires_grad_()
    out = simpo_ext.simpo_loss(leaf, batch.labels, **options)
    # Sums of log-probs reach a hundred; token log-probs are within 5e-7.
    tolerance = (
        {"rtol": 1e-13, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 2e-6}
    )
    for name in OUTPUTS:
        result = getattr(out, name)
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        truth = torch.as_tensor(getattr(expected, name), dtype=torch.float64)
        torch.testing.assert_close(result.detach().double(), truth, msg=name, **tolerance)
    for name, value in expected.metrics.items():
        assert out.metrics()[name] == pytest.approx(value, rel=2e-6, abs=2e-6), name
    assert list(out.metrics()) == [
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "num_pairs",
        "dropped_pairs",
        "num_tokens",
    ]

    out.loss.sum().backward()
    truth = torch.from_numpy(expected_gradient)
    rounding = {torch.float64: 1e-13, torch.float32: 3e-6}.get(dtype, torch.finfo(dtype).eps)
    error = (leaf.grad.double() - truth).abs().max() / truth.abs().max()
    assert error < rounding


@pytest.mark.parametrize("name", ["loss", "losses", "chosen_logps", "rejected_logps", "sft_loss"])
def test_every_differentiable_output_has_its_own_gradient(name: str) -> None:
    batch = make_batch(pairs=3, time=9, vocabulary=11, dtype=torch.float64)

    def output(logits: torch.Tensor) -> torch.Tensor:
        options = {"sft_weight": 0.2, "label_smoothing": 0.1}
        return getattr(simpo_ext.simpo_loss(logits, batch.labels, **options), name)

    assert torch.autograd.gradcheck(output, batch.logits.requires_grad_())


def test_gradients_of_several_outputs_add_up() -> None:
    batch = make_batch(dtype=torch.float64)
    weights = torch.tensor([0.3, -1.2], dtype=torch.float64)

    def gradient(with_loss: float, with_rest: float) -> torch.Tensor:
        leaf = batch.logits.clone().requires_grad_()
        out = simpo_ext.simpo_loss(leaf, batch.labels, sft_weight=0.2)
        rest = (out.losses * weights).sum() + out.chosen_logps.sum() - out.sft_loss
        (with_loss * out.loss + with_rest * rest).backward()
        return leaf.grad

    torch.testing.assert_close(gradient(1.0, 1.0), gradient(1.0, 0.0) + gradient(0.0, 1.0))


def test_rewards_and_metrics_are_detached() -> None:
    batch = make_batch()
    out = simpo_ext.simpo_loss(batch.logits.requires_grad_(), batch.labels)
    for name in ("chosen_rewards", "rejected_rewards", "metrics_values"):
        assert not getattr(out, name).requires_grad, name


def test_no_graph_is_recorded_without_grad() -> None:
    batch = make_batch()
    with torch.no_grad():
        assert (
            simpo_ext.simpo_loss(batch.logits.requires_grad_(), batch.labels).loss.grad_fn is None
        )


def test_micro_batches_with_a_normalizer_give_the_gradient_of_the_whole() -> None:
    batch = make_batch(pairs=6, dtype=torch.float64)
    options = {"sft_weight": 0.3, "sft_reduction": "token"}
    whole = batch.logits.clone().requires_grad_()
    out = simpo_ext.simpo_loss(whole, batch.labels, **options)
    out.loss.backward()
    chosen_tokens = (batch.labels[:6, 1:] != -100).sum().item()
    parts = batch.logits.clone().requires_grad_()
    total = 0.0
    for pairs in ([0, 1], [2], [3, 4, 5]):
        rows = [*pairs, *[6 + pair for pair in pairs]]
        part = simpo_ext.simpo_loss(
            parts[rows], batch.labels[rows], normalizer=(6.0, chosen_tokens), **options
        )
        part.loss.backward()
        total += part.loss.item()
    assert total == pytest.approx(out.loss.item(), rel=1e-14)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-13, atol=1e-16)


def test_a_normalizer_may_be_a_numpy_number_or_a_tensor() -> None:
    batch = make_batch(pairs=3)
    expected = simpo_ext.simpo_loss(*batch, normalizer=5.0).loss
    for normalizer in (5, np.float32(5.0), np.int64(5), torch.tensor(5.0), torch.tensor(5)):
        assert torch.equal(simpo_ext.simpo_loss(*batch, normalizer=normalizer).loss, expected)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_from_logps_agrees_with_the_formula(dtype: torch.dtype, loss_type: str) -> None:
    chosen = torch.tensor([-1.25, -3.0, -0.5, -0.125], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-2.5, -1.0, -9.0, -0.125], dtype=dtype, requires_grad=True)
    losses, chosen_rewards, rejected_rewards = simpo_ext.simpo_loss_from_logps(
        chosen, rejected, beta=2.5, gamma_beta_ratio=0.3, loss_type=loss_type
    )
    c, r = (x.detach().double().requires_grad_() for x in (chosen, rejected))
    margin = 2.5 * (c - r - 0.3)
    truth = (
        -torch.nn.functional.logsigmoid(margin) if loss_type == "sigmoid" else (1 - margin).relu()
    )
    torch.testing.assert_close(losses.double(), truth, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(chosen_rewards.double(), 2.5 * c.detach(), rtol=1e-7, atol=0)
    torch.testing.assert_close(rejected_rewards.double(), 2.5 * r.detach(), rtol=1e-7, atol=0)
    assert not chosen_rewards.requires_grad
    assert not rejected_rewards.requires_grad
    losses.sum().backward()
    truth.sum().backward()
    # The gradients are rounded once to the inputs' dtype. The smallest float16 number is 6e-8.
    tolerance = {"rtol": max(torch.finfo(dtype).eps, 1e-7), "atol": 6e-8}
    torch.testing.assert_close(chosen.grad.double(), c.grad, **tolerance)
    torch.testing.assert_close(rejected.grad.double(), r.grad, **tolerance)


def test_from_logps_equals_simpo_loss() -> None:
    batch = make_batch(pairs=4)
    out = simpo_ext.simpo_loss(*batch, label_smoothing=0.2)
    losses, chosen_rewards, _ = simpo_ext.simpo_loss_from_logps(
        out.chosen_logps, out.rejected_logps, label_smoothing=0.2
    )
    torch.testing.assert_close(losses, out.losses, rtol=1e-6, atol=0)
    assert torch.equal(chosen_rewards, out.chosen_rewards)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_losses_far_from_the_margin_neither_overflow_nor_vanish(loss_type: str) -> None:
    logps = torch.tensor([-1000.0, 0.0], dtype=torch.float64)
    losses, _, _ = simpo_ext.simpo_loss_from_logps(logps, logps.flip(0), loss_type=loss_type)
    # z is -1000.5 and 999.5: softplus(2001) and softplus(-1999), or hinges of 1 + 2001 and 0.
    assert losses.tolist() == ([2001.0, 0.0] if loss_type == "sigmoid" else [2002.0, 0.0])
    slightly, _, _ = simpo_ext.simpo_loss_from_logps(
        logps[1:], logps[1:] - 20.0, loss_type="sigmoid"
    )
    assert slightly.item() == pytest.approx(math.exp(-39.0), rel=1e-12)


def test_a_tie_is_not_counted_as_accurate() -> None:
    logits = torch.zeros(4, 3, 5)
    out = simpo_ext.simpo_loss(logits, torch.zeros(4, 3, dtype=torch.int64))
    assert torch.equal(out.chosen_rewards, out.rejected_rewards)
    assert out.metrics()["rewards/accuracies"] == 0.0


# ---- the specification's worked examples ---------------------------------------------------------


def logits_with_mean_logps(means: list[float]) -> Batch:
    """Sequences of two tokens from a vocabulary of two, with these mean log-probabilities."""
    logits = torch.zeros(len(means), 3, 2, dtype=torch.float64)
    for row, mean in enumerate(means):
        # log_softmax of (0, x) at 0 is -log(1 + exp(x)).
        logits[row, :, 1] = math.log(math.expm1(-mean))
    labels = torch.tensor([[-100, 0, 0]] * len(means))
    return Batch(logits, labels)


def test_example_1_of_the_specification() -> None:
    batch = logits_with_mean_logps([-1.2, -2.5])
    out = simpo_ext.simpo_loss(*batch, beta=2.0, gamma_beta_ratio=0.5)
    # z = 1.3 - 0.5 = 0.8, -log sigmoid(1.6) = 0.18390. The specification rounds sigmoid to 0.832.
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-1.6)), rel=1e-13)
    assert round(out.loss.item(), 3) == 0.184
    # The specification's margin of the rewards is without gamma.
    assert out.metrics()["rewards/margins"] == pytest.approx(2.6, rel=1e-13)
    losses, _, _ = simpo_ext.simpo_loss_from_logps(
        torch.tensor([-1.2]), torch.tensor([-2.5]), beta=2.0, gamma_beta_ratio=0.5
    )
    assert round(losses.item(), 3) == 0.184


def test_example_2_of_the_specification() -> None:
    batch = logits_with_mean_logps([-1.2, -2.5])
    # The specification's 0.184 is the loss at beta 2. At its beta of 2.5, the loss is 0.127.
    carried_over = simpo_ext.simpo_loss(*batch, beta=2.0, gamma_beta_ratio=0.5, sft_weight=0.1)
    assert round(carried_over.loss.item(), 3) == 0.304
    out = simpo_ext.simpo_loss(*batch, beta=2.5, gamma_beta_ratio=0.5, sft_weight=0.1)
    assert out.sft_loss.item() == pytest.approx(1.2, rel=1e-13)
    assert out.losses.item() == pytest.approx(math.log1p(math.exp(-2.0)), rel=1e-13)
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-2.0)) + 0.12, rel=1e-13)


def test_the_specification_s_hinge_and_smoothing_formulas() -> None:
    chosen, rejected = torch.tensor([[-1.2], [-1.5]], dtype=torch.float64)
    options = {"beta": 2.0, "gamma_beta_ratio": 0.1}
    z = 0.3 - 0.1
    losses, _, _ = simpo_ext.simpo_loss_from_logps(chosen, rejected, loss_type="hinge", **options)
    assert losses.item() == pytest.approx(1 - 2.0 * z, rel=1e-13)
    losses, _, _ = simpo_ext.simpo_loss_from_logps(chosen, rejected, label_smoothing=0.1, **options)
    expected = 0.9 * math.log1p(math.exp(-2 * z)) + 0.1 * math.log1p(math.exp(2 * z))
    assert losses.item() == pytest.approx(expected, rel=1e-13)


def test_the_hinge_has_subgradient_zero_at_its_kink() -> None:
    chosen = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    losses, _, _ = simpo_ext.simpo_loss_from_logps(
        chosen, torch.tensor([-1.5]).double(), beta=2.0, gamma_beta_ratio=0.0, loss_type="hinge"
    )
    losses.sum().backward()
    assert losses.item() == 0.0
    assert chosen.grad.item() == 0.0


# ---- SimPOLoss -----------------------------------------------------------------------------------


def test_the_module_equals_the_function_with_its_options() -> None:
    batch = make_batch(pairs=3)
    options: dict[str, Any] = {"gamma": 1.0, "sft_weight": 0.1, "label_smoothing": 0.05}
    module = simpo_ext.SimPOLoss(**options)
    out, want = module(*batch), simpo_ext.simpo_loss(*batch, **options)
    for ours, expected in zip(tuple(out), tuple(want), strict=True):
        assert torch.equal(ours, expected)
    assert torch.equal(
        module(*batch, normalizer=10.0).loss,
        simpo_ext.simpo_loss(*batch, normalizer=10.0, **options).loss,
    )
    assert list(module.parameters()) == []


def test_the_module_and_the_function_have_the_same_keywords_and_defaults() -> None:
    of_a_call = {"cu_seqlens": None, "pairs": None, "pair_weight": None}
    assert keywords(simpo_ext.simpo_loss) == {**keywords(simpo_ext.SimPOLoss), **of_a_call}
    forward = keywords(simpo_ext.SimPOLoss.forward)
    assert forward == {**of_a_call, "normalizer": None}


def test_the_module_s_repr_shows_every_option() -> None:
    assert repr(simpo_ext.SimPOLoss(beta=2.5, gamma=1.0, softcap=30.0)) == (
        "SimPOLoss(beta=2.5, gamma_beta_ratio=0.4, loss_type='sigmoid', label_smoothing=0.0, "
        "alpha=0.0, sft_weight=0.0, sft_reduction='sequence', average_log_prob=True, "
        "reduction='mean', normalizer=None, empty='drop', ignore_index=-100, shift=True, "
        "logit_scale=1.0, softcap=30.0, inplace_backward=False, report=())"
    )


def test_other_attributes_of_a_module_are_no_options() -> None:
    batch = make_batch()
    hidden, weight = torch.randn(*batch.labels.shape, 3), torch.randn(batch.logits.shape[2], 3)
    module, linear = simpo_ext.SimPOLoss(beta=2.5), simpo_ext.LinearSimPOLoss(beta=2.5)
    module.name = linear.name = "of the caller"
    module.beta = linear.beta = 3.0  # Assigning an option changes it.
    loss = module(*batch).loss
    assert torch.equal(loss, simpo_ext.simpo_loss(*batch, beta=3.0).loss)
    of_hidden = simpo_ext.linear_simpo_loss(hidden, weight, batch.labels, beta=3.0).loss
    assert torch.equal(linear(hidden, weight, batch.labels).loss, of_hidden)
    assert "caller" not in repr(module) + repr(linear)
