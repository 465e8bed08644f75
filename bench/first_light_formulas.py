"""Differentiable float64 formulas in plain torch, with which first light compares.

Positions are flat, [N]: N is B * T, or the number of packed positions. A sequence is a slice of
them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Scored:
    """The log-probs of a batch's tokens."""

    z: Tensor  # [N, V]: the logits after scale and softcap, detached
    logps: Tensor  # [N], 0 where masked
    is_valid: Tensor  # [N]
    sequences: Sequence[slice]

    def sequence_logps(self, *, average: bool = True) -> Tensor:
        """[S]: the mean over the valid tokens of each sequence, or their sum."""
        sums = torch.stack([self.logps[each].sum() for each in self.sequences])
        return sums / self._counts() if average else sums

    def side_means(self, values: Tensor, pairs: Tensor, is_counted: Tensor) -> Tensor:
        """[2]: the mean of counted values over the chosen sequences, and over the rejected."""
        counted = torch.where(is_counted, values, 0.0)
        sums = torch.stack([counted[each].sum() for each in self.sequences])
        counts = torch.stack([is_counted[each].sum() for each in self.sequences])
        return sums[pairs].sum(0) / counts[pairs].sum(0)

    def _counts(self) -> Tensor:
        return torch.stack([self.is_valid[each].sum() for each in self.sequences])


def score(
    logits: Tensor,  # [..., V] float64
    labels: Tensor,  # [B, T] or [N]
    *,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Scored:
    """Scores each label with the logits of its position or, with a shift, of the one before."""
    edges = (
        range(0, labels.numel() + 1, labels.shape[-1])
        if cu_seqlens is None
        else cu_seqlens.tolist()
    )
    sequences = [slice(first, end) for first, end in itertools.pairwise(edges)]
    flat = labels.flatten()
    targets = torch.full_like(flat, IGNORE_INDEX)
    for each in sequences:
        of_sequence = flat[each]
        targets[each.start : each.stop - shift] = of_sequence[1:] if shift else of_sequence

    z = logits.reshape(flat.numel(), -1) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    is_valid = targets != IGNORE_INDEX
    of_label = z[is_valid].log_softmax(1).gather(1, targets[is_valid].unsqueeze(1)).squeeze(1)
    logps = torch.zeros_like(z[:, 0]).index_put((is_valid,), of_label)
    return Scored(z.detach(), logps, is_valid, sequences)


def rounded_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype
) -> Tensor:
    """The logits hidden @ weight.T + bias, rounded to a dtype. The gradient ignores it."""
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    exact = logits.detach()
    return logits + (exact.to(dtype).double() - exact)


def simpo(
    scored: Scored,
    pairs: Tensor,  # [P, 2]
    *,
    weights: Tensor | None = None,  # [P]
    loss_type: str = "sigmoid",
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.5,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> Mapping[str, Tensor]:
    """The outputs of simpo_loss, by name."""
    chosen, rejected = scored.sequence_logps()[pairs].unbind(1)
    rewards = [-torch.expm1(-alpha * x) / alpha if alpha else x for x in (chosen, rejected)]
    z = rewards[0] - rewards[1] - gamma_beta_ratio
    if loss_type == "sigmoid":
        losses = -logsigmoid(beta * z) * (1.0 - label_smoothing)
        losses = losses - logsigmoid(-beta * z) * label_smoothing
    elif loss_type == "hinge":
        losses = torch.relu(1.0 - beta * z)
    else:
        losses = (z - 1.0 / (2.0 * beta)) ** 2
    factors = torch.ones_like(losses) if weights is None else weights
    losses = losses * factors
    sft_loss = (-chosen * factors).mean()
    return {
        "loss": losses.mean() + sft_weight * sft_loss,
        "losses": losses,
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "chosen_rewards": beta * rewards[0].detach(),
        "rejected_rewards": beta * rewards[1].detach(),
        "sft_loss": sft_loss,
    }


def reported(scored: Scored, pairs: Tensor, names: Sequence[str]) -> Tensor:
    """The metrics that a report adds: for each name, the chosen's and the rejected's."""
    mean_logits, log_softmax = scored.z.mean(1), scored.z.log_softmax(1)
    entropies = -(log_softmax.exp() * log_softmax).sum(1)
    means = {
        "logits": (mean_logits, scored.is_valid),
        "logits_all": (mean_logits, torch.ones_like(scored.is_valid)),
        "entropy": (entropies, scored.is_valid),
    }
    return torch.cat([scored.side_means(means[n][0], pairs, means[n][1]) for n in names])
