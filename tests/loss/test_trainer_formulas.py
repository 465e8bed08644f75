"""Agreement with the trainers' formulas, with explicit options."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import simpo_ext
from support.batches import Batch, make_batch
from support.trainer_formulas import get_batch_logps, princeton_loss, trl_loss

pytestmark = pytest.mark.kernels


def compare(batch: Batch, ours: Tensor, theirs: Tensor, leaves: tuple[Tensor, Tensor]) -> None:
    ours.backward()
    theirs.backward()
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if batch.logits.dtype == torch.float64 else {}
    torch.testing.assert_close(ours.detach(), theirs.detach(), **tolerance)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("average", [True, False])
def test_sequence_logps_match_get_batch_logps(dtype: torch.dtype, average: bool) -> None:
    batch = make_batch(pairs=4, time=17, vocabulary=101, dtype=dtype)
    leaves = batch.logits.clone().requires_grad_(), batch.logits.clone().requires_grad_()
    weights = torch.linspace(-1, 1, 8, dtype=dtype)
    ours = simpo_ext.sequence_logps(leaves[0], batch.labels, average_log_prob=average)
    theirs = get_batch_logps(leaves[1], batch.labels, average)
    compare(batch, (ours * weights).sum(), (theirs * weights).sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("loss_type", "label_smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.1), ("hinge", 0.0)]
)
@pytest.mark.parametrize("sft_weight", [0.0, 0.25])
def test_simpo_loss_equals_princeton_s_training_loss(
    dtype: torch.dtype, loss_type: str, label_smoothing: float, sft_weight: float
) -> None:
    batch = make_batch(pairs=4, time=17, vocabulary=101, dtype=dtype)
    leaves = batch.logits.clone().requires_grad_(), batch.logits.clone().requires_grad_()
    options = {
        "beta": 2.5,
        "gamma_beta_ratio": 0.55,
        "loss_type": loss_type,
        "label_smoothing": label_smoothing,
        "sft_weight": sft_weight,
    }
    out = simpo_ext.simpo_loss(leaves[0], batch.labels, sft_reduction="token", **options)
    theirs = princeton_loss(leaves[1], batch.labels, **options)
    torch.testing.assert_close(out.chosen_rewards, theirs.chosen_rewards)
    torch.testing.assert_close(out.rejected_rewards, theirs.rejected_rewards)
    metrics = out.metrics()
    accuracies = (theirs.chosen_rewards > theirs.rejected_rewards).double().mean().item()
    assert metrics["rewards/accuracies"] == accuracies
    assert metrics["rewards/margins"] == pytest.approx(
        (theirs.chosen_rewards - theirs.rejected_rewards).mean().item(), rel=1e-5
    )
    compare(batch, out.loss, theirs.loss, leaves)


@pytest.mark.parametrize("cpo_alpha", [0.0, 1.0])
def test_simpo_loss_equals_trl_s_cpo_loss(cpo_alpha: float) -> None:
    batch = make_batch(pairs=4, time=17, vocabulary=101, dtype=torch.float64)
    leaves = batch.logits.clone().requires_grad_(), batch.logits.clone().requires_grad_()
    out = simpo_ext.simpo_loss(
        leaves[0],
        batch.labels,
        beta=0.1,
        gamma=0.5,
        label_smoothing=0.05,
        sft_weight=cpo_alpha,
        sft_reduction="token",
    )
    theirs = trl_loss(leaves[1], batch.labels, label_smoothing=0.05, cpo_alpha=cpo_alpha)
    compare(batch, out.loss, theirs.loss, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logps_are_more_exact_than_the_trainers(
    dtype: torch.dtype,
) -> None:
    # The trainers average log-probabilities that log_softmax rounded to the model's dtype.
    batch = make_batch(pairs=8, time=64, vocabulary=512, dtype=dtype)
    truth = get_batch_logps(batch.logits.double(), batch.labels, average_log_prob=True)
    theirs = get_batch_logps(batch.logits, batch.labels, average_log_prob=True)
    ours = simpo_ext.sequence_logps(*batch)
    assert (ours - truth).abs().max() < 1e-6
    assert (ours - truth).abs().max() < 1e-3 * (theirs - truth).abs().max()
