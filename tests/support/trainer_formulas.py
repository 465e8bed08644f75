"""The trainers' losses in eager PyTorch, written from their public definitions.

Arguments and defaults are those of the trainers:

- Princeton: get_batch_logps, simpo_loss and get_batch_loss_metrics of SimPOTrainer;
- TRL: get_batch_logps, cpo_loss and get_batch_loss_metrics of CPOTrainer;
- Liger: chunk_forward, _compute_loss, preference_loss_fn of LigerFusedLinearSimPOFunction;
- LLaMA-Factory: concatenated_forward, simpo_loss, get_batch_loss_metrics of CustomDPOTrainer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TrainerLoss(NamedTuple):
    loss: Tensor
    losses: Tensor  # [P], without the SFT term
    chosen_rewards: Tensor  # [P]
    rejected_rewards: Tensor  # [P]


def get_batch_logps(logits: Tensor, labels: Tensor, average_log_prob: bool) -> Tensor:
    """Princeton's and TRL's function. LLaMA-Factory uses its sums."""
    return aligned_logps(logits[:, :-1, :], labels[:, 1:], average_log_prob)


def aligned_logps(logits: Tensor, labels: Tensor, average_log_prob: bool = True) -> Tensor:
    """Liger's function. The others do the same after the shift."""
    loss_mask = labels != -100
    index = torch.where(loss_mask, labels, 0).unsqueeze(2)
    per_token = torch.gather(logits.log_softmax(-1), dim=2, index=index).squeeze(2)
    if average_log_prob:
        return (per_token * loss_mask).sum(-1) / loss_mask.sum(-1)
    return (per_token * loss_mask).sum(-1)


def token_mean_nll(logits: Tensor, labels: Tensor, shift: bool = True) -> Tensor:
    """The SFT term, except LLaMA-Factory's: the cross entropy of the chosen half of the batch."""
    pairs = logits.shape[0] // 2
    chosen, targets = logits[:pairs], labels[:pairs]
    if shift:
        chosen, targets = chosen[:, :-1], targets[:, 1:]
    return F.cross_entropy(
        chosen.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-100
    )


def smoothed_logsigmoid(x: Tensor, label_smoothing: float) -> Tensor:
    return -F.logsigmoid(x) * (1 - label_smoothing) - F.logsigmoid(-x) * label_smoothing


def princeton_simpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.25,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = (chosen - rejected) - gamma_beta_ratio
    if loss_type == "sigmoid":
        losses = smoothed_logsigmoid(beta * logits, label_smoothing)
    else:
        losses = torch.relu(1 - beta * logits)
    return losses, beta * chosen.detach(), beta * rejected.detach()


def princeton_loss(
    logits: Tensor, labels: Tensor, *, sft_weight: float = 0.0, beta: float = 2.0, **options: object
) -> TrainerLoss:
    logps = get_batch_logps(logits, labels, average_log_prob=True)
    losses, *rewards = princeton_simpo_loss(*logps.chunk(2), beta=beta, **options)
    loss = losses.mean()
    if sft_weight > 0.0:
        loss = sft_weight * token_mean_nll(logits, labels) + loss
    return TrainerLoss(loss, losses, *rewards)


def trl_cpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 0.1,
    simpo_gamma: float = 0.5,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    loss_type: str = "simpo",
) -> tuple[Tensor, Tensor, Tensor]:
    if alpha != 0.0:
        chosen = (1 - chosen.exp().pow(-alpha)) / alpha
        rejected = (1 - rejected.exp().pow(-alpha)) / alpha
    logits = chosen - rejected
    if loss_type == "simpo":
        losses = smoothed_logsigmoid(beta * (logits - simpo_gamma / beta), label_smoothing)
    elif loss_type == "sigmoid":
        losses = smoothed_logsigmoid(beta * logits, label_smoothing)
    elif loss_type == "hinge":
        losses = torch.relu(1 - beta * logits)
    else:
        losses = (logits - 1 / (2 * beta)) ** 2
    return losses, beta * chosen.detach(), beta * rejected.detach()


def trl_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    cpo_alpha: float = 1.0,
    loss_type: str = "simpo",
    **options: float,
) -> TrainerLoss:
    if loss_type == "alphapo":
        loss_type, cpo_alpha = "simpo", 0.0
    logps = get_batch_logps(logits, labels, average_log_prob=loss_type in ("ipo", "simpo"))
    losses, *rewards = trl_cpo_loss(*logps.chunk(2), loss_type=loss_type, **options)
    nll = token_mean_nll(logits, labels) if cpo_alpha != 0 else 0.0
    return TrainerLoss(losses.mean() + cpo_alpha * nll, losses, *rewards)


def liger_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 0.1,
    gamma: float = 0.5,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    compute_nll_loss: bool = True,
) -> TrainerLoss:
    chosen, rejected = aligned_logps(logits, labels).chunk(2)
    losses = smoothed_logsigmoid(beta * (chosen - rejected) - gamma, label_smoothing)
    nll = token_mean_nll(logits, labels, shift=False) if compute_nll_loss else 0.0
    loss = alpha * nll + losses.sum() / (labels.shape[0] // 2)
    return TrainerLoss(loss, losses, beta * chosen.detach(), beta * rejected.detach())


def llamafactory_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    pref_beta: float = 0.1,
    simpo_gamma: float = 0.5,
    pref_ftx: float = 0.0,
) -> TrainerLoss:
    valid_length = (labels[:, 1:] != -100).sum(-1)
    logps = get_batch_logps(logits, labels, average_log_prob=False) / valid_length
    chosen, rejected = logps.chunk(2)
    losses = -F.logsigmoid(pref_beta * (chosen - rejected - simpo_gamma / pref_beta))
    total = losses + pref_ftx * -chosen if pref_ftx > 1e-6 else losses
    rewards = pref_beta * chosen.detach(), pref_beta * rejected.detach()
    return TrainerLoss(total.mean(), losses, *rewards)
