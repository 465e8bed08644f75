"""The specification's formulas and numerical derivatives, which the oracle is compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
P, T, V = 3, 6, 7
IGNORE = -100
SCORINGS: list[dict[str, Any]] = [
    {},
    {"shift": False},
    {"logit_scale": 0.7},
    {"softcap": 3.0, "logit_scale": 1.5},
]


def batch(seed: int = 0) -> tuple[Array, Array]:
    """Logits [2P,T,V] and labels [2P,T] with a masked prompt, a hole and padding."""
    rng = np.random.default_rng(seed)
    logits = 2.0 * rng.standard_normal((2 * P, T, V))
    labels = rng.integers(0, V, (2 * P, T))
    labels[:, 0] = labels[1, 3] = labels[2, 4:] = labels[4, 2:4] = IGNORE
    return logits, labels


def specified_token_logps(
    logits: Array,
    labels: Array,
    *,
    shift: bool = True,
    logit_scale: float = 1.0,
    softcap: Any = None,
) -> tuple[Array, Array]:
    """log_softmax(logits).gather(labels) and its mask, analytic in the logits."""
    z = logit_scale * logits
    if softcap is not None:
        z = softcap * np.tanh(z / softcap)
    if shift:
        z, labels = z[:, :-1], labels[:, 1:]
    mask = labels != IGNORE
    log_softmax = z - np.log(np.exp(z).sum(-1, keepdims=True))
    per_token = np.take_along_axis(log_softmax, np.where(mask, labels, 0)[..., None], -1)[..., 0]
    return per_token * mask, mask


def specified_loss(
    per_token: Array,
    mask: Array,
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    sft_reduction: str = "sequence",
    average_log_prob: bool = True,
    reduction: str = "mean",
    normalizer: Any = None,
    alpha: float = 0.0,
    pairs: Any = None,
    pair_weight: Any = 1.0,
) -> Any:
    """The loss as the specification writes it, analytic in per_token."""
    logps = per_token.sum(-1) / (mask.sum(-1) if average_log_prob else 1)
    p = len(logps) // 2
    chosen, rejected = (range(p), range(p, 2 * p)) if pairs is None else np.transpose(pairs)
    rewards = (1 - np.exp(logps) ** -alpha) / alpha if alpha else logps
    logits = rewards[chosen] - rewards[rejected] - (0 if loss_type == "ipo" else 0.5)
    if loss_type == "hinge":
        losses = np.where((1 - beta * logits).real > 0, 1 - beta * logits, 0)
    elif loss_type == "ipo":
        losses = (logits - 1 / (2 * beta)) ** 2
    else:
        losses = np.log(1 + np.exp(-beta * logits)) * (1 - label_smoothing)
        losses = losses + np.log(1 + np.exp(beta * logits)) * label_smoothing
    losses = losses * pair_weight
    count, tokens = len(chosen), mask[chosen].sum()
    if normalizer is not None:
        count, tokens = normalizer if isinstance(normalizer, tuple) else (normalizer, tokens)
    if reduction != "mean":
        count = tokens = 1
    if sft_reduction == "token":
        sft = -(per_token[chosen].sum(-1) * pair_weight).sum() / tokens
        return losses.sum() / count + sft_weight * sft
    total = losses - sft_weight * logps[chosen] * pair_weight
    return total if reduction == "none" else total.sum() / count


def complex_step(function: Any, x: Array) -> Array:
    """Gradient of a real scalar function that is analytic in x, exact to rounding."""
    grad = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):
        moved = x.astype(np.complex128)
        moved[index] += 1e-30j
        grad[index] = function(moved).imag / 1e-30
    return grad


def central_differences(function: Any, x: Array, step: float = 1e-5) -> Array:
    """Gradient of a real scalar function by central differences, error O(step^2)."""
    grad = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        grad[index] = (function(up) - function(down)) / (2 * step)
    return grad
