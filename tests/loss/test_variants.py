"""IPO and AlphaPO, from logits and from sequence log-probabilities."""

from __future__ import annotations

import decimal
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from simpo_ext import (
    simpo_loss,
    simpo_loss_from_logps,
)
from support import oracle
from support.batches import DTYPES, make_batch
from support.comparisons import OUTPUTS, assert_outputs_match, assert_same, loss_and_gradient
from support.packed_batches import PAIRS, make_packed

pytestmark = pytest.mark.kernels

NAN, INF = float("nan"), float("inf")
PAIRED = torch.tensor(PAIRS)
ALPHAS = [1e-30, 1e-20, 1e-6, 0.1, 1.0, 5.0, -1e-20, -0.5, -3.0]
# Typical averages over tokens, and values near 0, at which 1 - exp(-alpha l) cancels.
LOGPS = torch.tensor([-1.25, -0.5, -3.0, -7.0, -1e-6, -0.125], dtype=torch.float64)
OTHERS = torch.tensor([-2.5, -0.75, -1.0, -9.0, -2e-6, -0.125], dtype=torch.float64)
LOSSES: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.2},
    {"loss_type": "hinge"},
    {"loss_type": "ipo"},
]


def two_columns(chosen: Tensor, rejected: Tensor) -> tuple[Any, Any]:
    """Sequences of one token each, for the oracle."""
    values = torch.cat((chosen, rejected)).double().numpy()[:, None]
    return values, np.ones(values.shape, dtype=np.bool_)


def from_logps(
    chosen: Tensor, rejected: Tensor, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Losses and rewards, and the gradients of both arguments."""
    leaves = [x.clone().requires_grad_() for x in (chosen, rejected)]
    results = simpo_loss_from_logps(*leaves, **options)
    gradients = torch.autograd.grad(results[0].sum(), leaves)
    assert [x.requires_grad for x in results] == [True, False, False]
    return [x.detach() for x in results], list(gradients)


def check_against_oracle(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Compares outputs, metrics and the gradient of the loss of logits."""
    batch = make_batch(pairs=3, time=12, vocabulary=40, dtype=dtype)
    want, want_gradient = oracle.simpo_loss(
        batch.logits.double().numpy(), batch.labels.numpy(), **options
    )
    out, (gradient, _) = loss_and_gradient(*batch, **options)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6
    assert_outputs_match(out, want, tolerance)
    assert out.metrics() == pytest.approx(want.metrics, rel=5e-6, abs=5e-6)
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    error = np.abs(gradient.double().numpy() - want_gradient).max()
    assert error < rounding * np.abs(want_gradient).max()


# ---- AlphaPO -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_alpha_of_every_magnitude_from_logps(dtype: torch.dtype, alpha: float, loss: Any) -> None:
    chosen, rejected = LOGPS.to(dtype), OTHERS.to(dtype)
    options: dict[str, Any] = {"alpha": alpha, "beta": 0.75, **loss}
    values, valid = two_columns(chosen, rejected)
    want = oracle.preference_loss(values, valid, **options)
    gradient = oracle.preference_grad(values, valid, reduction="sum", **options)[:, 0]
    (losses, *rewards), gradients = from_logps(chosen, rejected, **options)
    eps, largest = torch.finfo(dtype).eps, torch.finfo(dtype).max
    for got, expected in zip(rewards, (want.chosen_rewards, want.rejected_rewards), strict=True):
        np.testing.assert_allclose(got.double().numpy(), expected, rtol=4 * eps)
    # The error of a difference of two rewards, and so of the loss and its slope.
    off = 8 * eps * (np.abs(want.chosen_rewards) + np.abs(want.rejected_rewards) + 1.0)
    if loss.get("loss_type") == "ipo":  # The loss is a square.
        off = 4 * off * (np.abs(want.chosen_rewards - want.rejected_rewards) + 1.0)
    # Squares and slopes may overflow float32.
    finite = want.losses <= largest
    np.testing.assert_array_equal(np.isfinite(losses.numpy()), finite)
    losses_off = np.abs(losses.double().numpy() - want.losses)[finite]
    assert (losses_off <= (off + 8 * eps * np.abs(want.losses))[finite]).all()
    slopes = np.exp(-alpha * np.concatenate((chosen, rejected)).astype(np.float64))
    for got, expected, bound in zip(
        torch.cat(gradients).double().numpy(), gradient, np.tile(off, 2) * slopes, strict=True
    ):
        assert got == expected or (
            abs(got - expected) <= 2 * bound + 8 * eps * abs(expected)
            if abs(expected) <= largest
            else got == np.copysign(INF, expected)
        )


@pytest.mark.parametrize("alpha", [1e-30, 1e-20, 1e-9, -1e-20])
def test_rewards_of_a_tiny_alpha_keep_their_digits(alpha: float) -> None:
    # The textbook form, (1 - exp(l)^-alpha) / alpha, gives 0.
    for dtype in (torch.float64, torch.float32):
        (_, *rewards), _ = from_logps(LOGPS.to(dtype), OTHERS.to(dtype), alpha=alpha, beta=1.0)
        for got, logps in zip(rewards, (LOGPS, OTHERS), strict=True):
            with decimal.localcontext(prec=60):
                a = decimal.Decimal(alpha)
                exact = [float((1 - (-a * decimal.Decimal(x)).exp()) / a) for x in logps.tolist()]
            np.testing.assert_allclose(got.double().numpy(), exact, rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("options", LOSSES, ids=str)
@pytest.mark.parametrize("alpha", [1e-25, -1e-25])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_limit_of_small_alpha_is_alpha_zero(
    dtype: torch.dtype, alpha: float, options: Any
) -> None:
    batch = make_batch(pairs=3, dtype=dtype)
    want, (want_gradient, _) = loss_and_gradient(*batch, alpha=0.0, **options)
    out, (gradient, _) = loss_and_gradient(*batch, alpha=alpha, **options)
    tolerance = 8 * torch.finfo(out.loss.dtype).eps
    for name in OUTPUTS:
        got, expected = getattr(out, name), getattr(want, name)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert out.metrics() == pytest.approx(want.metrics(), rel=1e-6)
    bound = max(torch.finfo(dtype).eps, 4 * tolerance) * want_gradient.abs().max().item()
    torch.testing.assert_close(gradient, want_gradient, rtol=0.0, atol=bound)
    assert_same(loss_and_gradient(*batch, **options), loss_and_gradient(*batch, alpha=0, **options))


@pytest.mark.parametrize("options", [
    *LOSSES, {"sft_weight": 0.3}, {"sft_weight": 0.3, "sft_reduction": "token"},
    {"average_log_prob": False, "reduction": "sum"}, {"reduction": "none", "sft_weight": 0.3},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("alpha", [1e-20, 1e-6, 0.1, -0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_output_and_the_gradient_match_the_oracle(
    dtype: torch.dtype, alpha: float, options: dict[str, Any]
) -> None:
    if "average_log_prob" in options:
        alpha /= 10  # The sums are about ten times the averages.
    check_against_oracle(dtype, {"alpha": alpha, **options})


@pytest.mark.parametrize("alpha", [0.1, 1.0, -0.5])
def test_alpha_changes_rewards_and_their_metrics_but_not_logps(alpha: float) -> None:
    batch = make_batch(pairs=3, dtype=torch.float64)
    plain = simpo_loss(*batch, beta=1.5)
    out = simpo_loss(*batch, beta=1.5, alpha=alpha, sft_weight=0.3)
    assert_same(out.chosen_logps, plain.chosen_logps)
    assert_same(out.rejected_logps, plain.rejected_logps)
    assert out.sft_loss.item() == pytest.approx(-plain.chosen_logps.mean().item(), rel=1e-14)
    rewards = []
    for side in ("chosen", "rejected"):
        logps = getattr(out, f"{side}_logps")
        rewards.append(1.5 * -torch.expm1(-alpha * logps) / alpha)
        torch.testing.assert_close(getattr(out, f"{side}_rewards"), rewards[-1])
        assert out.metrics()[f"rewards/{side}"] == pytest.approx(rewards[-1].mean().item())
        assert out.metrics()[f"logps/{side}"] == pytest.approx(logps.mean().item())
    margin = (rewards[0] - rewards[1]).mean().item()
    assert out.metrics()["rewards/margins"] == pytest.approx(margin)


VARIANTS: list[dict[str, Any]] = [
    {"alpha": 0.25},
    {"alpha": -0.5, "sft_weight": 0.3},
    {"alpha": 1e-6, "loss_type": "ipo"},
    {"alpha": 0.1, "average_log_prob": False, "label_smoothing": 0.1},
    {"loss_type": "ipo"},
    {"loss_type": "ipo", "gamma_beta_ratio": 0.7, "beta": 0.3, "sft_weight": 0.3},
    {"alpha": 0.2, "loss_type": "hinge", "gamma_beta_ratio": 20.0},  # Far from the kink.
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_gradcheck(options: dict[str, Any]) -> None:
    packed = make_packed((4, 0, 3, 1, 3, 2, 2), 5, dtype=torch.float64)
    layout = {"cu_seqlens": packed.cu_seqlens, "pairs": PAIRED}
    assert torch.autograd.gradcheck(
        lambda x: simpo_loss(x, packed.labels, **layout, **options).loss,
        packed.logits.requires_grad_(),
    )


# exp(200) overflows float32, and exp(800) float64.
PAST = [(torch.float32, -200.0), (torch.float64, -800.0)]


@pytest.mark.parametrize(("dtype", "low"), PAST)
def test_an_overflowing_reward_is_infinite_and_its_gradient_is_not_nan(
    dtype: torch.dtype, low: float
) -> None:
    def pair(chosen: float, rejected: float, **options: Any) -> list[float]:
        """The loss, both rewards and both gradients."""
        tensors = torch.tensor([chosen], dtype=dtype), torch.tensor([rejected], dtype=dtype)
        results, gradients = from_logps(*tensors, alpha=1.0, beta=2.0, **options)
        return [x.item() for x in (*results, *gradients)]

    one = 2.0 * -np.expm1(1.0)  # beta r(-1); the slope of r is e
    won: dict[str, Any] = {"rel": 1e-6}
    for loss_type in ("sigmoid", "hinge"):
        assert pair(-1.0, low, loss_type=loss_type) == pytest.approx([0.0, one, -INF, 0, 0], **won)
        lost = [INF, -INF, one, -INF, 2 * np.e]
        assert pair(low, -1.0, loss_type=loss_type) == pytest.approx(lost, **won)
    smooth = [INF, one, -INF, 0.2 * np.e, -INF]
    assert pair(-1.0, low, label_smoothing=0.1) == pytest.approx(smooth, **won)
    assert pair(-1.0, low, loss_type="ipo") == pytest.approx([INF, one, -INF, INF, -INF], **won)
    # With a negative alpha, exp(-alpha l) underflows, and the reward is 1 / alpha.
    for side, other in ((low, -1.0), (-1.0, low)):
        tensors = torch.tensor([side], dtype=dtype), torch.tensor([other], dtype=dtype)
        results, gradients = from_logps(*tensors, alpha=-1.0, beta=2.0)
        assert all(x.isfinite().all() for x in (*results, *gradients))


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
@pytest.mark.parametrize(("dtype", "low"), PAST)
def test_a_pair_with_slope_zero_has_gradient_zero_despite_an_infinite_reward(
    dtype: torch.dtype, low: float, loss_type: Any
) -> None:
    batch = make_batch(pairs=3, dtype=dtype)
    batch.logits[5].scatter_add_(1, batch.labels[5].roll(-1).clamp(min=0)[:, None],
                                 torch.full((8, 1), 2 * low, dtype=dtype))  # fmt: skip
    out, (gradient, _) = loss_and_gradient(*batch, alpha=1.0, loss_type=loss_type, reduction="sum")
    assert out.rejected_rewards[2] == -INF
    assert out.losses[2] == 0
    assert not gradient[[2, 5]].any()
    kept = [0, 1, 3, 4]
    want, (want_gradient, _) = loss_and_gradient(
        batch.logits[kept], batch.labels[kept], alpha=1.0, loss_type=loss_type, reduction="sum"
    )
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(gradient[kept], want_gradient)


@pytest.mark.parametrize("alpha", [0.5, -0.5])
def test_a_token_of_probability_zero_with_alpha(alpha: float) -> None:
    batch = make_batch(pairs=2, dtype=torch.float64)
    at = int((batch.labels[3] != -100).nonzero()[2])
    batch.logits[3, at - 1, batch.labels[3, at]] = -INF
    want, want_gradient = oracle.simpo_loss(*(x.numpy() for x in batch), alpha=alpha)
    out, (gradient, _) = loss_and_gradient(*batch, alpha=alpha)
    assert out.rejected_logps[1] == -INF
    assert out.rejected_rewards[1] == (-INF if alpha > 0 else 2.0 / alpha)
    np.testing.assert_allclose(out.losses.detach().numpy(), want.losses, rtol=1e-12)
    assert np.isfinite(want_gradient).all()
    np.testing.assert_allclose(gradient.numpy(), want_gradient, rtol=1e-11, atol=1e-15)


def test_a_dropped_pair_with_alpha_is_dropped() -> None:
    batch = make_batch(pairs=3)
    batch.labels[4] = -100
    kept = [0, 2, 3, 5]
    out, (gradient, _) = loss_and_gradient(*batch, alpha=0.3)
    want, (want_gradient, _) = loss_and_gradient(batch.logits[kept], batch.labels[kept], alpha=0.3)
    assert_same((out.loss, gradient[kept]), (want.loss, want_gradient))
    assert out.rejected_rewards.isnan().tolist() == [False, True, False]
    assert not gradient[[1, 4]].any()


# ---- IPO -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"beta": 0.1}, {"average_log_prob": False, "reduction": "sum"}, {"gamma_beta_ratio": 0.5},
    {"reduction": "none", "sft_weight": 0.3}, {"sft_weight": 0.3, "sft_reduction": "token"},
    {"alpha": 0.2},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_ipo_matches_the_oracle(dtype: torch.dtype, options: dict[str, Any]) -> None:
    check_against_oracle(dtype, {"loss_type": "ipo", **options})


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_the_default_margin_of_each_loss(loss_type: Any) -> None:
    batch = make_batch(pairs=3)
    default = 0.0 if loss_type == "ipo" else 0.5
    options: dict[str, Any] = {"loss_type": loss_type}
    out = simpo_loss(*batch, **options)
    assert_same(out, simpo_loss(*batch, gamma_beta_ratio=default, **options))
    assert_same(out, simpo_loss(*batch, gamma=default * 2.0, **options))
    logps = out.chosen_logps, out.rejected_logps
    assert_same(
        simpo_loss_from_logps(*logps, **options),
        simpo_loss_from_logps(*logps, gamma_beta_ratio=default, **options),
    )
    for ratio in (0.25, -1.0):
        other = simpo_loss(*batch, gamma_beta_ratio=ratio, **options)
        assert not torch.equal(other.losses, out.losses)


def test_ipo_equals_the_paper_s_formula() -> None:
    chosen, rejected = LOGPS.clone().requires_grad_(), OTHERS.clone().requires_grad_()
    losses, _, _ = simpo_loss_from_logps(chosen, rejected, loss_type="ipo", beta=0.2)
    want = (chosen - rejected - 1 / (2 * 0.2)) ** 2
    torch.testing.assert_close(losses, want, rtol=1e-14, atol=0.0)
    got = torch.autograd.grad(losses.sum(), (chosen, rejected))
    torch.testing.assert_close(got, torch.autograd.grad(want.sum(), (chosen, rejected)))
    # The loss is 0 at the target, which these numbers reach exactly.
    at_target, _, _ = simpo_loss_from_logps(
        torch.tensor([-1.0]), torch.tensor([-1.25]), loss_type="ipo", beta=2.0
    )
    assert at_target.item() == 0.0


# ---- from sequence log-probabilities -------------------------------------------------------------


@pytest.mark.parametrize("options", [*LOSSES, {"alpha": 0.3}, {"alpha": -0.5, "loss_type": "ipo"}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_sequence_logps(dtype: torch.dtype, options: dict[str, Any]) -> None:
    chosen, rejected = LOGPS[:4].to(dtype), OTHERS[:4].to(dtype)
    weight = torch.tensor([0.5, -2.0, 0.0, 1.0])
    values, valid = two_columns(chosen, rejected)
    options = {"beta": 1.5, **options}
    want = oracle.preference_loss(values, valid, pair_weight=weight.numpy(), **options)
    gradient = oracle.preference_grad(
        values, valid, pair_weight=weight.numpy(), reduction="sum", **options
    )
    results, gradients = from_logps(chosen, rejected, pair_weight=weight, **options)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    for got, name in zip(results, OUTPUTS[1:2] + OUTPUTS[4:6], strict=True):
        got, expected = got.double().numpy(), getattr(want, name)
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance, err_msg=name)
    tolerance = max(tolerance, torch.finfo(dtype).eps)
    got = torch.cat(gradients).double().numpy()
    np.testing.assert_allclose(got, gradient[:, 0], rtol=tolerance, atol=tolerance)


def test_weight_zero_drops_sequence_logps_that_are_not_finite() -> None:
    chosen, rejected = torch.tensor([NAN, -INF, -1.0, -2.0]), torch.tensor([-1.0, -1.0, INF, -1.0])
    weight = torch.tensor([0, 0, 0, 3])
    (losses, *_), gradients = from_logps(chosen, rejected, pair_weight=weight)
    assert losses[:3].tolist() == [0.0] * 3 and losses[3] > 3.0
    assert [(x != 0).tolist() for x in gradients] == [[False] * 3 + [True]] * 2
