"""The truth about a linear batch: loss and both gradients in float64, on all rows.

Hidden has only K distinct rows (linear_batch.py), so the softmax of each is made once, [K, V], and
every row of hidden's gradient and of the weight's follows from sums over the rows of a state:

    d loss / d hidden[t] = slope[t] * (weight[label[t]] - sum_v p[k(t), v] weight[v])
    d loss / d weight[v] = sum_{t: label[t] = v} slope[t] hidden[t]
                         - sum_k (sum_{t: k(t) = k} slope[t]) p[k, v] states[k]

with slope[t] = d loss / d log-probability of the label after t.

The error of a row is relative to what its terms add up to without regard to sign, since rounding is
relative to the terms: the norm of the whole row may be much smaller by cancellation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench import reference
from bench.linear_batch import Tensors
from bench.workload import IGNORE_INDEX

SIMPO, CROSS_ENTROPY = "SimPO", "cross entropy"

CHUNK_ELEMENTS = 2**20  # 8 MiB in float64: larger chunks leave the caches


@dataclass(frozen=True)
class Truth:
    """What the loss of one mask and one kind of work is, and its slopes. float64."""

    loss: float
    slopes: Tensor  # [B, T]; 0 where not scored
    following: Tensor  # [B, T] the label after t, or IGNORE_INDEX


@dataclass(frozen=True)
class Errors:
    """Relative to float64; infinite where there is something that has to be 0."""

    loss: float
    hidden_row: float  # of the worst row
    weight_row: float
    norm: float  # of the worse gradient as a whole

    @property
    def gradient(self) -> float:
        """Of the worst row of all; NaN where there is one."""
        return torch.tensor([self.hidden_row, self.weight_row]).max().item()


class LinearReference:
    """What is costly and does not depend on the mask, once."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._states = tensors.states.double()
        vocabulary, width = tensors.weight.shape
        self._step = max(1, CHUNK_ELEMENTS // width)
        logits = self._states.new_empty(len(self._states), vocabulary)
        for chunk in self._chunks():
            logits[:, chunk] = self._states @ self._weight(chunk).t()
        logps = logits.log_softmax(1)
        self._logps = logps  # [K, V]
        self._p = logps.exp()
        self._mean_weight = torch.zeros_like(self._states)  # [K, H]: sum_v p weight[v]
        self._weight_norms = self._states.new_empty(vocabulary)
        for chunk in self._chunks():
            weight = self._weight(chunk)
            self._mean_weight += self._p[:, chunk] @ weight
            self._weight_norms[chunk] = weight.norm(dim=1)
        self._state_norms = self._states.norm(dim=1)
        self._mean_weight_norm = self._p @ self._weight_norms  # [K]

    def _chunks(self) -> list[slice]:
        vocabulary = len(self._tensors.weight)
        return [slice(start, start + self._step) for start in range(0, vocabulary, self._step)]

    def _weight(self, rows: slice | Tensor) -> Tensor:
        return self._tensors.weight.detach()[rows].double()

    def truth(self, labels: Tensor, work: str) -> Truth:
        """With the labels [B, T] that are not IGNORE_INDEX scored, the first of a sequence never.

        ``work`` is the loss: SimPO's of the pairs, or the mean cross entropy of what is scored.
        """
        following = torch.full_like(labels, IGNORE_INDEX)
        following[:, :-1] = labels[:, 1:]
        scored = following != IGNORE_INDEX
        logps = self._logps[self._tensors.state_of, following.clamp(min=0)] * scored
        logps = logps.requires_grad_()
        if work == SIMPO:
            loss = reference.simpo_loss(logps, following)
        else:
            loss = -logps.sum() / scored.sum()
        (slopes,) = torch.autograd.grad(loss, logps)
        return Truth(loss.item(), slopes * scored, following)

    def errors(self, truth: Truth, loss: Tensor, hidden: Tensor, weight: Tensor) -> Errors:
        """Of a loss [] and the gradients of hidden [B, T, H] and weight [V, H]."""
        loss_error = abs(loss.item() - truth.loss) / max(1.0, abs(truth.loss))
        hidden_row, hidden_norm = self._hidden_errors(truth, hidden)
        weight_row, weight_norm = self._weight_errors(truth, weight)
        norm = torch.tensor([hidden_norm, weight_norm]).max().item()  # NaN if either is
        return Errors(loss_error, hidden_row, weight_row, norm)

    def _hidden_errors(self, truth: Truth, gradient: Tensor) -> tuple[float, float]:
        slopes = truth.slopes.flatten()
        scored = slopes != 0.0
        gradient = gradient.detach().flatten(0, 1)
        if gradient[~scored].ne(0.0).any():
            return torch.inf, torch.inf
        slopes, label = slopes[scored], truth.following.flatten()[scored]
        state = self._tensors.state_of.flatten()[scored]
        expected = self._weight(label).sub_(self._mean_weight[state]).mul_(slopes.unsqueeze(1))
        error = gradient[scored].double().sub_(expected).norm(dim=1)
        scale = (self._weight_norms[label] + self._mean_weight_norm[state]) * slopes.abs()
        return (error / scale).max().item(), (error.norm() / expected.norm()).item()

    def _weight_errors(self, truth: Truth, gradient: Tensor) -> tuple[float, float]:
        slopes = truth.slopes.flatten()
        scored = slopes != 0.0
        slopes, label = slopes[scored], truth.following.flatten()[scored]
        state = self._tensors.state_of.flatten()[scored]
        of_state = torch.zeros_like(self._state_norms).index_add_(0, state, slopes)
        scale = torch.zeros_like(self._state_norms).index_add_(0, state, slopes.abs())
        scale = (scale * self._state_norms) @ self._p
        scale.index_add_(0, label, slopes.abs() * self._state_norms[state])
        weighted = (self._states * of_state.neg().unsqueeze(1)).t().contiguous()  # [H, K]
        worst, error_squares, squares = (slopes.new_zeros(()) for _ in range(3))
        for chunk in self._chunks():
            expected = (weighted @ self._p[:, chunk]).t()
            inside = (label >= chunk.start) & (label < chunk.stop)
            terms = self._states[state[inside]] * slopes[inside].unsqueeze(1)
            expected = expected.contiguous().index_add_(0, label[inside] - chunk.start, terms)
            squares += expected.norm() ** 2
            error = expected.sub_(gradient[chunk]).norm(dim=1)
            error_squares += error.norm() ** 2
            worst = torch.maximum(worst, (error / scale[chunk]).max())
        return worst.item(), (error_squares / squares).sqrt().item()
