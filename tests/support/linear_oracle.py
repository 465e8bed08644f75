"""Closed-form float64 oracle of losses from hidden states and an output layer.

`oracle` computes the loss of ``logits = hidden @ weight.T + bias`` and its gradient dlogits. Then
``dhidden = dlogits @ weight``, ``dweight = dlogits.T @ hidden``, and ``dbias`` is the sum of
dlogits over the positions.

The shapes are those of `oracle`. Hidden states are [B,T,H], or [N,H] or [1,N,H] with cu_seqlens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from support import oracle
from support.oracle import Bools, Floats, Preference


class Gradients(NamedTuple):
    """Gradients with respect to the three inputs, float64."""

    # The shape of the hidden states. Exactly 0 at masked positions and at those without a gradient.
    hidden: Floats
    weight: Floats  # [V,H]
    bias: Floats  # [V], even for an output layer without a bias.


@np.errstate(all="ignore")
def linear(
    hidden: npt.ArrayLike, weight: npt.ArrayLike, bias: npt.ArrayLike | None = None
) -> Floats:
    """Logits [...,V] of hidden states [...,H], weight [V,H] and bias [V]."""
    x, w = np.asarray(hidden, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    logits: Floats = np.einsum("...h,vh->...v", x, w)
    return logits if bias is None else logits + np.asarray(bias, dtype=np.float64)


@np.errstate(all="ignore")
def linear_grad(dlogits: Floats, hidden: npt.ArrayLike, weight: npt.ArrayLike) -> Gradients:
    """Gradients of the inputs of `linear` from dlogits [...,V].

    A position whose dlogits are all 0 adds nothing, even if its hidden state is NaN.
    """
    x, w = np.asarray(hidden, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    active = (dlogits != 0.0).any(axis=-1)
    rows, dhidden = dlogits[active], np.zeros_like(x)
    dhidden[active] = rows @ w
    return Gradients(dhidden, rows.T @ x[active], rows.sum(axis=0))


def linear_token_logps(
    hidden: npt.ArrayLike,
    weight: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    bias: npt.ArrayLike | None = None,
    **scoring: Any,
) -> tuple[Floats, Floats, Bools]:
    """`oracle.token_logps` (logps, lse, valid) of the logits, with its keywords."""
    return oracle.token_logps(linear(hidden, weight, bias), labels, **scoring)


def linear_token_logps_grad(
    grad_logps: npt.ArrayLike,
    hidden: npt.ArrayLike,
    weight: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    bias: npt.ArrayLike | None = None,
    **scoring: Any,
) -> Gradients:
    """Gradients of sum(grad_logps * logps), with the keywords of `oracle.token_logps`."""
    logits = linear(hidden, weight, bias)
    dlogits = oracle.token_logps_grad(grad_logps, logits, labels, **scoring)
    return linear_grad(dlogits, hidden, weight)


def linear_simpo_loss(
    hidden: npt.ArrayLike,
    weight: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    bias: npt.ArrayLike | None = None,
    **options: Any,
) -> tuple[Preference, Gradients]:
    """`oracle.simpo_loss` of the logits, and the gradients, with its keywords."""
    preference, dlogits = oracle.simpo_loss(linear(hidden, weight, bias), labels, **options)
    return preference, linear_grad(dlogits, hidden, weight)
