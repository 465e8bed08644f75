"""Agreement with the trainers' own formulas, written out in PyTorch from their public definitions.

Princeton: SimPOTrainer.get_batch_logps, simpo_loss and the SFT term of get_batch_loss_metrics.
TRL: CPOTrainer.get_batch_logps and cpo_loss with loss_type="simpo" and cpo_alpha.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import simpo_ext
from batches import Batch, make_batch

pytestmark = pytest.mark.kernels


def princeton_get_batch_logps(logits: Tensor, labels: Tensor, average_log_prob: bool) -> Tensor:
    labels = labels[:, 1:].clone()
    logits = logits[:, :-1, :]
    loss_mask = labels != -100
    labels[labels == -100] = 0
    per_token = torch.gather(logits.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
    if average_log_prob:
        return (per_token * loss_mask).sum(-1) / loss_mask.sum(-1)
    return (per_token * loss_mask).sum(-1)


def princeton_simpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float,
    gamma_beta_ratio: float,
    loss_type: str,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = (chosen - rejected) - gamma_beta_ratio
    if loss_type == "sigmoid":
        losses = (
            -F.logsigmoid(beta * logits) * (1 - label_smoothing)
            - F.logsigmoid(-beta * logits) * label_smoothing
        )
    else:
        losses = torch.relu(1 - beta * logits)
    return losses, beta * chosen.detach(), beta * rejected.detach()


def token_mean_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """The SFT term of Princeton and TRL: cross entropy over the chosen half of the batch."""
    pairs = logits.shape[0] // 2
    chosen = logits[:pairs, :-1].reshape(-1, logits.shape[-1])
    return F.cross_entropy(chosen, labels[:pairs, 1:].reshape(-1), ignore_index=-100)


def trl_cpo_simpo_loss(
    chosen: Tensor, rejected: Tensor, *, beta: float, simpo_gamma: float, label_smoothing: float
) -> Tensor:
    logits = (chosen - rejected) - simpo_gamma / beta
    return (
        -F.logsigmoid(beta * logits) * (1 - label_smoothing)
        - F.logsigmoid(-beta * logits) * label_smoothing
    )


def compare(batch: Batch, ours: Tensor, theirs: Tensor, leaves: tuple[Tensor, Tensor]) -> None:
    ours.backward()
    theirs.backward()
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if batch.logits.dtype == torch.float64 else {}
    torch.testing.assert_close(ours.detach(), theirs.detach(), **tolerance)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("average", [True, False])
def test_sequence_logps_is_princeton_s_get_batch_logps(dtype: torch.dtype, average: bool) -> None:
    batch = make_batch(pairs=4, time=17, vocabulary=101, dtype=dtype)
    leaves = batch.logits.clone().requires_grad_(), batch.logits.clone().requires_grad_()
    weights = torch.linspace(-1, 1, 8, dtype=dtype)
    ours = simpo_ext.sequence_logps(leaves[0], batch.labels, average_log_prob=average)
    theirs = princeton_get_batch_logps(leaves[1], batch.labels, average)
    compare(batch, (ours * weights).sum(), (theirs * weights).sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("loss_type", "label_smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.1), ("hinge", 0.0)]
)
@pytest.mark.parametrize("sft_weight", [0.0, 0.25])
def test_simpo_loss_is_princeton_s_training_loss(
    dtype: torch.dtype, loss_type: str, label_smoothing: float, sft_weight: float
) -> None:
    batch = make_batch(pairs=4, time=17, vocabulary=101, dtype=dtype)
    leaves = batch.logits.clone().requires_grad_(), batch.logits.clone().requires_grad_()
    options = {
        "beta": 2.5,
        "gamma_beta_ratio": 0.55,
        "loss_type": loss_type,
        "label_smoothing": label_smoothing,
    }
    out = simpo_ext.simpo_loss(
        leaves[0], batch.labels, sft_weight=sft_weight, sft_reduction="token", **options
    )
    logps = princeton_get_batch_logps(leaves[1], batch.labels, average_log_prob=True)
    chosen, rejected = logps.split(4)
    losses, chosen_rewards, rejected_rewards = princeton_simpo_loss(chosen, rejected, **options)
    theirs = losses.mean() + sft_weight * token_mean_nll(leaves[1], batch.labels)
    torch.testing.assert_close(out.chosen_rewards, chosen_rewards)
    torch.testing.assert_close(out.rejected_rewards, rejected_rewards)
    metrics = out.metrics()
    accuracies = (chosen_rewards > rejected_rewards).double().mean().item()
    assert metrics["rewards/accuracies"] == accuracies
    assert metrics["rewards/margins"] == pytest.approx(
        (chosen_rewards - rejected_rewards).mean().item(), rel=1e-5
    )
    compare(batch, out.loss, theirs, leaves)


@pytest.mark.parametrize("cpo_alpha", [0.0, 1.0])
def test_simpo_loss_is_trl_s_cpo_loss(cpo_alpha: float) -> None:
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
    logps = princeton_get_batch_logps(leaves[1], batch.labels, average_log_prob=True)
    chosen, rejected = logps.split(4)
    losses = trl_cpo_simpo_loss(chosen, rejected, beta=0.1, simpo_gamma=0.5, label_smoothing=0.05)
    theirs = losses.mean() + cpo_alpha * token_mean_nll(leaves[1], batch.labels)
    compare(batch, out.loss, theirs, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_give_a_loss_far_closer_to_float64_than_the_trainers(
    dtype: torch.dtype,
) -> None:
    # The trainers average log-probs that log_softmax has rounded to the model's dtype.
    batch = make_batch(pairs=8, time=64, vocabulary=512, dtype=dtype)
    truth = princeton_get_batch_logps(batch.logits.double(), batch.labels, average_log_prob=True)
    theirs = princeton_get_batch_logps(batch.logits, batch.labels, average_log_prob=True)
    ours = simpo_ext.sequence_logps(*batch)
    assert (ours - truth).abs().max() < 1e-6
    assert (ours - truth).abs().max() < 1e-3 * (theirs - truth).abs().max()
