"""The truth that candidates are held to: closed forms in float64, on all rows, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from workload import IGNORE_INDEX, Workload

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
        z = logits[rows].double()
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
    than the upstream gradient. What is not 0 in a masked row is infinitely wrong.
    """
    workload = reference.workload
    logits, labels = workload.logits.flatten(0, 1), workload.labels.flatten()
    gradient, upstream = gradient.reshape(logits.shape), upstream.double().flatten()
    worst = torch.zeros((), dtype=torch.float64, device=labels.device)
    for rows in _chunks(workload):
        valid = labels[rows] != IGNORE_INDEX
        expected = logits[rows].double().sub_(reference.logsumexp[rows].unsqueeze(1)).exp_().neg_()
        label = labels[rows].clamp(min=0).unsqueeze(1)
        expected.scatter_add_(1, label, torch.ones_like(label, dtype=torch.float64))
        expected *= (upstream[rows] * valid).unsqueeze(1)
        error = expected.sub_(gradient[rows]).abs_().amax(1)
        scale = upstream[rows].abs()
        relative = torch.where(
            valid, error / scale.clamp(min=1e-300), torch.where(error == 0.0, 0.0, torch.inf)
        )
        worst = torch.maximum(worst, relative.max())  # NaN if either is
    return worst.item()
