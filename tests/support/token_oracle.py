"""Closed-form float64 oracle of log-probabilities and their gradients.

Everything is NumPy in float64, each gradient is a formula derived by hand, and sums are rounded
once (`math.fsum`). The code is neither fast nor differentiable.

Shapes: S sequences, T positions, V vocabulary entries. Sequences are the B rows of [B,T]. With
cu_seqlens [S+1], sequence s has the positions cu_seqlens[s]..cu_seqlens[s+1]-1 of [N] or [1,N],
and all other positions are padding.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Ints: TypeAlias = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class TokenOptions:
    """The keywords of `token_logps` and `token_logps_grad`."""

    # Label of a masked position. Masked rows are not evaluated.
    ignore_index: int = -100
    # Score position t with the label at t + 1 of the same sequence. The last position of each
    # sequence is masked.
    shift: bool = True
    # Factor of the logits.
    logit_scale: float = 1.0
    # Bound of z. None or 0 means none.
    softcap: float | None = None
    # [S+1], the boundaries of packed sequences, or None.
    cu_seqlens: npt.ArrayLike | None = None


def exact_sum(values: Floats) -> float:
    """Sum of a 1-d array, rounded once. IEEE's result if a term is not finite."""
    if np.isfinite(values).all():
        try:
            return math.fsum(values.tolist())
        except OverflowError:
            pass
    return float(np.sum(values))


def spans_of(shape: tuple[int, ...], cu_seqlens: npt.ArrayLike | None) -> list[slice]:
    """The positions of each sequence in flattened [B,T], [N] or [1,N]."""
    if cu_seqlens is None:
        if len(shape) != 2:
            raise ValueError(f"need [B,T], got {shape}")
        edges = [b * shape[1] for b in range(shape[0] + 1)]
    else:
        edges = [int(edge) for edge in np.asarray(cu_seqlens)]
        if len(shape) != 1 and shape[:-1] != (1,):
            raise ValueError(f"need [N] or [1,N], got {shape}")
        if not edges or [0, *edges, shape[-1]] != sorted([0, *edges, shape[-1]]):
            raise ValueError(f"cu_seqlens {edges} do not divide {shape[-1]} positions")
    return [slice(first, end) for first, end in itertools.pairwise(edges)]


def _targets(labels: npt.ArrayLike, vocabulary: int, options: TokenOptions) -> tuple[Ints, Bools]:
    """The label scored at each position (0 if masked) and its validity, in the shape of labels."""
    given = np.asarray(labels, dtype=np.int64)
    targets = np.full(given.shape, options.ignore_index)  # contiguous, so that reshape gives a view
    flat, flat_targets = given.reshape(-1), targets.reshape(-1)
    for span in spans_of(given.shape, options.cu_seqlens):
        sequence = flat[span]
        flat_targets[span][: len(sequence) - options.shift] = sequence[int(options.shift) :]
    valid = targets != options.ignore_index
    for at in np.argwhere(valid & ((targets < 0) | (targets >= vocabulary))):
        *row, t = at.tolist()
        label, place = targets[tuple(at)], (*row, t + options.shift)
        raise IndexError(f"label {label} at {place} is outside [0, {vocabulary})")
    return np.where(valid, targets, 0), valid


@np.errstate(all="ignore")
def _rows(x: Floats, targets: Ints, options: TokenOptions) -> tuple[Floats, Floats, Floats]:
    """logps [N], lse [N] and dlogps/dlogits [N,V] of rows x [N,V] with targets [N].

    With top = max_j z_j = z_k and rest = sum_{j != k} exp(z_j - top):
    lse = top + log1p(rest), logp = (z_target - top) - log1p(rest), which do not cancel, and
    softmax_j = exp(z_j - top) / (1 + rest).
    """
    logit_scale, softcap = options.logit_scale, options.softcap
    rows = np.arange(len(x))
    z, slope = logit_scale * x, np.full_like(x, logit_scale)
    if softcap:
        u = z / softcap
        z = softcap * np.tanh(u)
        # 1 - tanh(u)^2 = sech(u)^2 in a form that neither overflows nor cancels.
        decay = np.exp(-2.0 * np.abs(u))
        slope *= 4.0 * decay / (1.0 + decay) ** 2
    k = np.argmax(z, axis=-1)  # The first NaN, if there is one.
    top = z[rows, k]
    shares = np.exp(z - top[:, None])
    others = shares.copy()
    others[rows, k] = 0.0
    rest = np.array([exact_sum(row) for row in others])
    ordinary = np.isfinite(top)
    lse = np.where(ordinary, top + np.log1p(rest), np.where(top == -np.inf, -np.inf, np.nan))
    logps = np.where(ordinary, (z[rows, targets] - top) - np.log1p(rest), np.nan)
    factor = -shares / (1.0 + rest)[:, None]
    factor[rows, targets] = -np.expm1(logps)
    return logps, lse, np.where(ordinary[:, None], factor * slope, np.nan)


def token_logps(
    logits: npt.ArrayLike, labels: npt.ArrayLike, **options: Any
) -> tuple[Floats, Floats, Bools]:
    """Log-probability of every label: log softmax(z)[label].

    z = logit_scale * logits, then z = softcap * tanh(z / softcap) if softcap is set. A row of z
    with NaN or +inf has lse and logp NaN. A row of -inf has lse -inf and logp NaN.

    Args:
        logits: [B,T,V], or [N,V] or [1,N,V] with cu_seqlens, any float dtype.
        labels: [B,T], or [N] or [1,N], integers.
        **options: Those of `TokenOptions`.

    Returns:
        logps and lse, float64 and 0 at masked positions, and valid, bool. All have the shape of
        labels and the positions of the logits.

    Raises:
        IndexError: A scored label is neither ignore_index nor in [0, V).
    """
    opts = TokenOptions(**options)
    x = np.asarray(logits, dtype=np.float64)
    targets, valid = _targets(labels, x.shape[-1], opts)
    logps, lse = np.zeros(valid.shape), np.zeros(valid.shape)
    if valid.any():
        logps[valid], lse[valid], _ = _rows(x[valid], targets[valid], opts)
    return logps, lse, valid


@np.errstate(all="ignore")
def token_logps_grad(
    grad_logps: npt.ArrayLike, logits: npt.ArrayLike, labels: npt.ArrayLike, **options: Any
) -> Floats:
    """Gradient of sum(grad_logps * logps) with respect to the logits, float64, in their shape.

    dlogits_j = grad * (1[j = label] - softmax_j) * dz_j/dlogits_j, where 1 - softmax_label is
    computed as -expm1(logp). Masked rows and rows whose grad_logps is 0 are exactly 0, even if
    their logits are NaN. Other rows whose lse is NaN or -inf are NaN. grad_logps has the shape of
    labels. The options are those of `TokenOptions`.
    """
    opts = TokenOptions(**options)
    x = np.asarray(logits, dtype=np.float64)
    grad = np.asarray(grad_logps, dtype=np.float64)
    targets, valid = _targets(labels, x.shape[-1], opts)
    active = valid & (grad != 0.0)
    dlogits = np.zeros_like(x)
    if active.any():
        _, _, factor = _rows(x[active], targets[active], opts)
        dlogits[active] = grad[active][:, None] * factor
    return dlogits


@np.errstate(all="ignore")
def sequence_logps(
    token_logps: npt.ArrayLike,
    valid: npt.ArrayLike,
    *,
    average_log_prob: bool = True,
    cu_seqlens: npt.ArrayLike | None = None,
) -> tuple[Floats, Ints]:
    """Sums or averages log-probabilities over the valid tokens of each sequence.

    Args:
        token_logps: [B,T], or [N] or [1,N] with cu_seqlens. Invalid positions are not read.
        valid: Bool, in the shape of token_logps.
        average_log_prob: Divide the sum by the count.
        cu_seqlens: [S+1], the boundaries of packed sequences, or None.

    Returns:
        logps [S] float64, NaN for an empty sequence even if summed, and counts [S] int64.
    """
    values = np.asarray(token_logps, dtype=np.float64)
    mask = np.asarray(valid, dtype=np.bool_).reshape(-1)
    spans = spans_of(values.shape, cu_seqlens)
    flat = values.reshape(-1)
    counts = np.array([mask[span].sum() for span in spans], dtype=np.int64)
    logps = np.full(len(spans), np.nan)
    for s in np.flatnonzero(counts):
        total = exact_sum(flat[spans[s]][mask[spans[s]]])
        logps[s] = total / (counts[s] if average_log_prob else 1)
    return logps, counts
