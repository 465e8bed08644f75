"""The truth that candidates are held to: closed forms in float64, on all rows, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bench.workload import IGNORE_INDEX, Workload

# Of the SimPO loss that is measured; its hyperparameters do not change the work.
BETA = 2.0
GAMMA_BETA_RATIO = 0.5

CHUNK_ELEMENTS = 2**26  # 0.5 GiB in float64


@dataclass(frozen=True)
class Reference:
    """What the results of one workload have to be."""

    workload: Workload
    logsumexp: Tensor  # [N] float64
    token_logps: Tensor  # [N] float64; 0 where masked
    simpo_loss: Tensor  # [] float64
    simpo_upstream: Tensor  # [N] float64: d simpo_loss / d token_logps


def _chunks(workload: Workload) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // workload.size.vocabulary)
    for start in range(0, workload.size.rows, step):
        yield slice(start, min(start + step, workload.size.rows))


def _capped(z: Tensor, softcap: float | None) -> Tensor:
    """Softcap * tanh(z / softcap), in the memory of z."""
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def simpo_loss(token_logps: Tensor, labels: Tensor) -> Tensor:
    """The SimPO loss of log-probabilities [B, T], chosen sequences first."""
    counts = (labels != IGNORE_INDEX).sum(1)
    chosen, rejected = (token_logps.sum(1) / counts).chunk(2)
    return -logsigmoid(BETA * (chosen - rejected - GAMMA_BETA_RATIO)).mean()


def make_reference(workload: Workload) -> Reference:
    """Computes the truth of a workload."""
    logits, labels = workload.logits.flatten(0, 1), workload.labels.flatten()
    logsumexp = torch.empty(labels.shape, dtype=torch.float64, device=labels.device)
    token_logps = torch.empty_like(logsumexp)
    for rows in _chunks(workload):
        z = _capped(logits[rows].double(), workload.softcap)
        logsumexp[rows] = z.logsumexp(1)
        label_z = z.gather(1, labels[rows].clamp(min=0).unsqueeze(1)).squeeze(1)
        token_logps[rows] = label_z - logsumexp[rows]
    token_logps.masked_fill_(labels == IGNORE_INDEX, 0.0)

    leaf = token_logps.view_as(workload.labels).clone().requires_grad_()
    loss = simpo_loss(leaf, workload.labels)
    (simpo_upstream,) = torch.autograd.grad(loss, leaf)
    return Reference(workload, logsumexp, token_logps, loss.detach(), simpo_upstream.flatten())


def value_error(value: Tensor, expected: Tensor) -> float:
    """Largest |value - expected| / max(1, |expected|); NaN where there is one."""
    difference = (value.double().flatten() - expected.flatten()).abs()
    return (difference / expected.flatten().abs().clamp(min=1.0)).max().item()


def gradient_error(gradient: Tensor, upstream: Tensor, reference: Reference) -> float:
    """Largest error of a row of the gradient, relative to that row's upstream gradient.

    The gradient of a row is upstream * (onehot(label) - softmax), so no element of it is larger
    than the upstream gradient; a softcap makes it smaller. In a masked row, the error
    of an element that is not 0 is infinite.
    """
    workload = reference.workload
    logits, labels = workload.logits.flatten(0, 1), workload.labels.flatten()
    gradient, upstream = gradient.reshape(logits.shape), upstream.double().flatten()
    worst = torch.zeros((), dtype=torch.float64, device=labels.device)
    for rows in _chunks(workload):
        valid = labels[rows] != IGNORE_INDEX
        z = _capped(logits[rows].double(), workload.softcap)
        expected = z.sub(reference.logsumexp[rows].unsqueeze(1)).exp_().neg_()
        label = labels[rows].clamp(min=0).unsqueeze(1)
        expected.scatter_add_(1, label, torch.ones_like(label, dtype=torch.float64))
        expected *= (upstream[rows] * valid).unsqueeze(1)
        if workload.softcap is not None:
            expected *= 1.0 - z.div_(workload.softcap).square_()
        error = expected.sub_(gradient[rows]).abs_().amax(1)
        scale = upstream[rows].abs()
        relative = torch.where(
            valid, error / scale.clamp(min=1e-300), torch.where(error == 0.0, 0.0, torch.inf)
        )
        worst = torch.maximum(worst, relative.max())  # NaN if either is
    return worst.item()


# ---- the loss of sequences, with the labels' shift -------------------------------------------


@dataclass(frozen=True)
class LossTruth:
    """What the loss of one batch and one mask is, and its gradient. float64."""

    loss: float
    slopes: Tensor  # [B, T] d loss / d log-probability of the label after t; 0 where not scored


class SequenceReference:
    """The truth about logits [B, T, V] whose labels [B, T] are not shifted, for any mask.

    What is costly, softmax and logsumexp of each row, is made once. Of the softmax float32 is
    kept: its rounding, 6e-8, is far below every tolerance here.
    """

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        """Labels are masked where no later mask scores anything."""
        self._time, vocabulary = labels.shape[1], logits.shape[2]
        following = torch.full_like(labels, IGNORE_INDEX)
        following[:, :-1] = labels[:, 1:]
        self._rows = (following != IGNORE_INDEX).flatten().nonzero().squeeze(1)  # [R]
        self._logps = torch.zeros(labels.numel(), dtype=torch.float64)
        self._slot = torch.full((labels.numel(),), -1)
        self._slot[self._rows] = torch.arange(len(self._rows))
        # onehot(label) - softmax: d log-probability / d logits.
        self._jacobian = torch.empty(len(self._rows), vocabulary)  # [R, V] float32
        flat_logits, flat_labels = logits.detach().flatten(0, 1), following.flatten()
        step = max(1, CHUNK_ELEMENTS // 8 // vocabulary)
        for start in range(0, len(self._rows), step):
            rows = self._rows[start : start + step]
            z = flat_logits[rows].double()
            label = flat_labels[rows].unsqueeze(1)
            label_z = z.gather(1, label)
            logsumexp = z.logsumexp(1, keepdim=True)
            self._logps[rows] = (label_z - logsumexp).squeeze(1)
            jacobian = z.sub_(logsumexp).exp_().neg_()
            jacobian.scatter_add_(1, label, torch.ones_like(label, dtype=torch.float64))
            self._jacobian[start : start + step] = jacobian

    def truth(self, prompts: Sequence[int], ends: Sequence[int]) -> LossTruth:
        """With labels scored from prompts[b] to ends[b], the first one of a sequence never."""
        logps = self._logps.view(-1, self._time).clone().requires_grad_()
        means = []
        for row, prompt, end in zip(logps, prompts, ends, strict=True):
            scored = row[max(prompt, 1) - 1 : end - 1]
            means.append(scored.sum() / len(scored))
        averages = torch.stack(means)
        if len(means) % 2:
            loss = -averages.mean()
        else:
            chosen, rejected = averages.chunk(2)
            loss = -logsigmoid(BETA * (chosen - rejected - GAMMA_BETA_RATIO)).mean()
        (slopes,) = torch.autograd.grad(loss, logps)
        return LossTruth(loss.item(), slopes)

    def gradient_error(self, gradient: Tensor, truth: LossTruth) -> float:
        """Largest error of an element of a row, relative to the slope of that row.

        Infinite if a row that is not scored has a gradient; NaN where there is one.
        """
        flat, slopes = gradient.detach().flatten(0, 1), truth.slopes.flatten()
        worst = torch.zeros((), dtype=torch.float32)
        step = max(1, CHUNK_ELEMENTS // 4 // flat.shape[1])
        for start in range(0, len(flat), step):
            slope = slopes[start : start + step]
            scored = slope != 0.0
            block = flat[start : start + step]
            if block[~scored].ne(0.0).any():
                return torch.inf
            if scored.any():
                slots = self._slot[start : start + step][scored]
                scale = slope[scored].float().unsqueeze(1)
                error = block[scored].float() - self._jacobian[slots] * scale
                worst = torch.maximum(worst, (error.abs_().amax(1, True) / scale.abs()).max())
        return worst.item()
