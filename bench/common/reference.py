"""The truth that candidates are held to: closed forms in float64, of all rows.

Of a loss with slope[t] = d loss / d log-probability of the label after t,

    d loss / d logits[t]    = slope[t] * (onehot(label[t]) - p[t])
    d loss / d hidden[t]    = slope[t] * (weight[label[t]] - sum_v p[t, v] weight[v])
    d loss / d weight[v]    = sum_{t: label[t] = v} slope[t] hidden[t] - sum_t slope[t] p[t, v] hidden[t]
"""  # noqa: E501

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bench.common.cases import IGNORE_INDEX, Tensors, following

# Of the SimPO loss that is measured. Its hyperparameters do not change the work.
BETA = 2.0
GAMMA_BETA_RATIO = 0.5

SIMPO, CROSS_ENTROPY = "SimPO", "cross entropy"

ROW_ELEMENTS = 2**24  # of the logits that are verified at a time
WEIGHT_ELEMENTS = 2**20  # 8 MiB of the weight in float64; larger chunks leave the caches


def simpo_loss(token_logps: Tensor, labels: Tensor) -> Tensor:
    """The SimPO loss of log-probabilities [B, T], chosen sequences first.

    With an odd number of sequences, the negative mean over them.
    """
    averages = token_logps.sum(1) / (labels != IGNORE_INDEX).sum(1)
    if len(averages) % 2:
        return -averages.mean()
    chosen, rejected = averages.chunk(2)
    return -logsigmoid(BETA * (chosen - rejected - GAMMA_BETA_RATIO)).mean()


def _loss_error(loss: Tensor, expected: float) -> float:
    return abs(loss.item() - expected) / max(1.0, abs(expected))


# ---- from logits -----------------------------------------------------------------------------


class LogitsTruth:
    """The loss of logits [B, T, V] and labels [B, T] that are not shifted, and its gradient.

    A softcap makes softcap * tanh(logits / softcap) of the logits.
    The softmax is kept in float32, whose rounding of 6e-8 is far below every tolerance.
    """

    def __init__(self, logits: Tensor, labels: Tensor, softcap: float | None = None) -> None:
        after = following(labels)
        self._scored = (after != IGNORE_INDEX).flatten()
        rows = self._scored.nonzero().squeeze(1)  # [R]
        vocabulary = logits.shape[2]
        logps = torch.zeros(labels.numel(), dtype=torch.float64, device=labels.device)
        # [R, V] onehot(label) - p, times the derivative of the softcap
        self._jacobian = logits.new_empty(len(rows), vocabulary, dtype=torch.float32)
        self._step = max(1, ROW_ELEMENTS // vocabulary)
        for start in range(0, len(rows), self._step):
            chunk = slice(start, start + self._step)
            z = logits.detach().flatten(0, 1)[rows[chunk]].double()
            if softcap is not None:
                z = (z / softcap).tanh_()
                slope, z = 1.0 - z.square(), z * softcap
            label = after.flatten()[rows[chunk]].unsqueeze(1)
            logsumexp = z.logsumexp(1, keepdim=True)
            logps[rows[chunk]] = (z.gather(1, label) - logsumexp).squeeze(1)
            jacobian = z.sub_(logsumexp).exp_().neg_()
            jacobian.scatter_add_(1, label, torch.ones_like(label, dtype=torch.float64))
            self._jacobian[chunk] = jacobian if softcap is None else jacobian * slope
        leaf = logps.view_as(labels).requires_grad_()
        loss = simpo_loss(leaf, after)
        (slopes,) = torch.autograd.grad(loss, leaf)
        self._slopes = slopes.flatten()[rows].float()  # [R]
        self.loss = loss.item()

    def errors(self, loss: Tensor, gradient: Tensor) -> tuple[float, float]:
        """Of the loss; and the largest of an element of the gradient, relative to its row's slope.

        The latter is infinite if a row that is not scored has a gradient, and NaN where there is
        one.
        """
        flat = gradient.detach().flatten(0, 1)
        worst, slot = self._slopes.new_zeros(()), 0
        for start in range(0, len(flat), self._step):
            rows = slice(start, start + self._step)
            scored, block = self._scored[rows], flat[rows]
            if block[~scored].ne(0.0).any():
                return _loss_error(loss, self.loss), torch.inf
            if not scored.any():
                continue
            slots = slice(slot, slot + int(scored.sum()))
            slot = slots.stop
            slope = self._slopes[slots].unsqueeze(1)
            error = block[scored].float() - self._jacobian[slots] * slope
            worst = torch.maximum(worst, (error.abs_().amax(1, True) / slope.abs()).max())
        return _loss_error(loss, self.loss), worst.item()


# ---- from hidden states ----------------------------------------------------------------------


class _Slopes(NamedTuple):
    """What depends on the loss. float64."""

    loss: float
    slopes: Tensor  # [R]


class LinearErrors(NamedTuple):
    """Relative to float64."""

    loss: float
    row: float  # of the worst row of either gradient
    norm: float  # of the worse gradient as a whole


class LinearTruth:
    """The losses of hidden states, weight and labels [B, T] that are not shifted, and gradients.

    Hidden has only K distinct rows (cases.py), so there are only K softmaxes.

    The error of a row is relative to what its terms add up to without regard to sign, because
    rounding is relative to the terms. The row itself may be much smaller by cancellation.
    """

    def __init__(self, tensors: Tensors, labels: Tensor) -> None:
        self._tensors, self._after = tensors, following(labels)
        self._scored = self._after != IGNORE_INDEX
        self._label = self._after[self._scored]  # [R]
        self._state = tensors.state_of[self._scored]  # [R]
        self._states = tensors.states.double()
        self._state_norms = self._states.norm(dim=1)
        vocabulary, width = tensors.weight.shape
        step = max(1, WEIGHT_ELEMENTS // width)
        self._chunks = [slice(start, start + step) for start in range(0, vocabulary, step)]
        logits = self._states.new_empty(len(self._states), vocabulary)
        for chunk in self._chunks:
            logits[:, chunk] = self._states @ self._weight(chunk).t()
        self._logps = logits.log_softmax(1)  # [K, V]
        self._p = self._logps.exp()
        self._mean_weight = torch.zeros_like(self._states)  # [K, H]: sum_v p weight[v]
        self._weight_norms = self._states.new_empty(vocabulary)
        for chunk in self._chunks:
            weight = self._weight(chunk)
            self._mean_weight += self._p[:, chunk] @ weight
            self._weight_norms[chunk] = weight.norm(dim=1)
        self._mean_weight_norm = self._p @ self._weight_norms  # [K]
        self._of_work: dict[str, _Slopes] = {}

    def _weight(self, rows: slice | Tensor) -> Tensor:
        return self._tensors.weight.detach()[rows].double()

    def of(self, work: str) -> _Slopes:
        """SimPO's loss of the pairs, or the mean cross entropy of what is scored."""
        if work not in self._of_work:
            logps = self._logps[self._tensors.state_of, self._after.clamp(min=0)] * self._scored
            logps = logps.requires_grad_()
            if work == SIMPO:
                loss = simpo_loss(logps, self._after)
            else:
                loss = -logps.sum() / self._scored.sum()
            (slopes,) = torch.autograd.grad(loss, logps)
            self._of_work[work] = _Slopes(loss.item(), slopes[self._scored])
        return self._of_work[work]

    def errors(self, work: str, loss: Tensor, hidden: Tensor, weight: Tensor) -> LinearErrors:
        """Of a loss [] and the gradients of hidden [B, T, H] and weight [V, H].

        Infinite if a row of hidden that is not scored has a gradient; NaN where there is one.
        """
        expected, slopes = self.of(work)
        if hidden.detach()[~self._scored].ne(0.0).any():
            return LinearErrors(_loss_error(loss, expected), torch.inf, torch.inf)
        found = torch.tensor([
            self._hidden_errors(slopes, hidden.detach()[self._scored]),
            self._weight_errors(slopes, weight),
        ])  # fmt: skip
        row, norm = found.amax(0).tolist()  # NaN if either is
        return LinearErrors(_loss_error(loss, expected), row, norm)

    def _hidden_errors(self, slopes: Tensor, gradient: Tensor) -> tuple[float, float]:
        label, state = self._label, self._state
        expected = self._weight(label).sub_(self._mean_weight[state]).mul_(slopes.unsqueeze(1))
        error = gradient.double().sub_(expected).norm(dim=1)
        scale = (self._weight_norms[label] + self._mean_weight_norm[state]) * slopes.abs()
        return (error / scale).max().item(), (error.norm() / expected.norm()).item()

    def _weight_errors(self, slopes: Tensor, gradient: Tensor) -> tuple[float, float]:
        label, state = self._label, self._state
        of_state = torch.zeros_like(self._state_norms).index_add_(0, state, slopes)
        scale = torch.zeros_like(self._state_norms).index_add_(0, state, slopes.abs())
        scale = (scale * self._state_norms) @ self._p
        scale.index_add_(0, label, slopes.abs() * self._state_norms[state])
        weighted = (self._states * of_state.neg().unsqueeze(1)).t().contiguous()  # [H, K]
        worst, error_squares, squares = (slopes.new_zeros(()) for _ in range(3))
        for chunk in self._chunks:
            expected = (weighted @ self._p[:, chunk]).t()
            inside = (label >= chunk.start) & (label < chunk.stop)
            terms = self._states[state[inside]] * slopes[inside].unsqueeze(1)
            expected = expected.contiguous().index_add_(0, label[inside] - chunk.start, terms)
            squares += expected.norm() ** 2
            error = expected.sub_(gradient[chunk]).norm(dim=1)
            error_squares += error.norm() ** 2
            worst = torch.maximum(worst, (error / scale[chunk]).max())
        return worst.item(), (error_squares / squares).sqrt().item()
