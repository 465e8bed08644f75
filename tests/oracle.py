"""Closed-form float64 oracle of the SimPO preference loss and its gradient.

Everything is NumPy in float64, each gradient is a formula derived by hand, and sums are rounded
once (`math.fsum`). Nothing here is fast or differentiable; it is there to be compared with.

Shapes: B sequences, T positions, V vocabulary entries, P pairs. Preference functions take B = 2P
rows: the chosen sequences are rows 0..P-1 and the rejected ones rows P..2P-1.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Ints: TypeAlias = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class PreferenceOptions:
    """The keywords of `preference_loss`, `preference_grad` and `simpo_loss`."""

    # Reward scale, and the target margin gamma / beta, subtracted from chosen - rejected.
    beta: float = 2.0
    gamma_beta_ratio: float = 0.5
    # "sigmoid" or "hinge".
    loss_type: str = "sigmoid"
    # Probability in [0, 0.5] that a preference is flipped; sigmoid only.
    label_smoothing: float = 0.0
    # Weight of the chosen sequences' cross entropy; "sequence" (-chosen_logps of each pair) or
    # "token" (all chosen tokens of the batch).
    sft_weight: float = 0.0
    sft_reduction: str = "sequence"
    # Divide a sequence's log probability by its token count.
    average_log_prob: bool = True
    # "mean", "sum" or "none".
    reduction: str = "mean"
    # Denominator of reduction "mean" in place of the counted pairs; a tuple (pairs, tokens) also
    # replaces the token count of sft_reduction "token".
    normalizer: float | tuple[float, float] | None = None
    # A pair with an empty sequence is left out ("drop") or is NaN ("nan").
    empty: str = "drop"

    def __post_init__(self) -> None:
        """Raises ValueError for a value or a combination that has no meaning."""
        for name, choices in (
            ("loss_type", ("sigmoid", "hinge")),
            ("sft_reduction", ("sequence", "token")),
            ("reduction", ("mean", "sum", "none")),
            ("empty", ("drop", "nan")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if not 0.0 <= self.label_smoothing <= 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5], got {self.label_smoothing}")
        if self.loss_type == "hinge" and self.label_smoothing > 0.0:
            raise ValueError("label_smoothing has no meaning with the hinge loss")
        if not self.sft_weight >= 0.0:
            raise ValueError(f"sft_weight must not be negative, got {self.sft_weight}")
        if self.sft_reduction == "token" and self.reduction == "none":
            raise ValueError("sft_reduction 'token' has no value per pair: reduction 'none'")
        if self.normalizer is not None and self.reduction != "mean":
            raise ValueError("normalizer replaces the denominator of reduction 'mean' only")
        plain = self.normalizer is not None and not isinstance(self.normalizer, tuple)
        if plain and self.sft_reduction == "token" and self.sft_weight > 0.0:
            raise ValueError("sft_reduction 'token' needs normalizer=(pairs, tokens)")


@dataclasses.dataclass(frozen=True)
class Preference:
    """Result of `preference_loss`; every array is float64."""

    loss: Floats  # 0-d, or [P] for reduction "none"; with the sft term when sft_weight > 0.
    losses: Floats  # [P], without the sft term; 0 at dropped pairs.
    chosen_logps: Floats  # [P], NaN for an empty sequence; so are the next three.
    rejected_logps: Floats
    chosen_rewards: Floats  # beta * chosen_logps.
    rejected_rewards: Floats  # beta * rejected_logps.
    sft_loss: Floats  # 0-d, or [P] for reduction "none"; before the factor sft_weight.
    metrics: dict[str, float]  # Scalars over the counted pairs, by name.


def _total(values: Floats) -> float:
    """Exact sum of a 1-d array: NaN if it holds NaN or both infinities, else IEEE."""
    if np.isfinite(values).all():
        try:
            return math.fsum(values.tolist())
        except OverflowError:
            pass
    return float(np.sum(values))


def _sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)) without overflow, relatively accurate in both tails."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0.0, 1.0, small) / (1.0 + small)


def _softplus(x: Floats) -> Floats:
    """log(1 + exp(x)) = -log sigmoid(-x), without overflow."""
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))


def _targets(
    labels: npt.ArrayLike, vocabulary: int, ignore_index: int, shift: bool
) -> tuple[Ints, Bools]:
    """Label scored at each logits position ([B,T] int64; 0 where masked) and validity ([B,T])."""
    given = np.asarray(labels, dtype=np.int64)
    targets = np.full_like(given, ignore_index)
    targets[:, : given.shape[1] - shift] = given[:, int(shift) :]
    valid = targets != ignore_index
    for b, t in np.argwhere(valid & ((targets < 0) | (targets >= vocabulary))):
        raise IndexError(
            f"label {targets[b, t]} at ({b}, {t + shift}) is outside [0, {vocabulary})"
        )
    return np.where(valid, targets, 0), valid


@np.errstate(all="ignore")
def _rows(
    x: Floats, targets: Ints, logit_scale: float, softcap: float | None
) -> tuple[Floats, Floats, Floats]:
    """Evaluates logits rows x [N,V] with targets [N]: logps [N], lse [N], dlogps/dlogits [N,V].

    With top = max_j z_j, reached at k, and rest = sum_{j != k} exp(z_j - top):
    lse = top + log1p(rest), logp = (z_target - top) - log1p(rest), both free of cancellation, and
    softmax_j = exp(z_j - top) / (1 + rest).
    """
    rows = np.arange(len(x))
    z, slope = logit_scale * x, np.full_like(x, logit_scale)
    if softcap:
        u = z / softcap
        z = softcap * np.tanh(u)
        # 1 - tanh(u)^2 = sech(u)^2, written so that it neither overflows nor cancels.
        decay = np.exp(-2.0 * np.abs(u))
        slope *= 4.0 * decay / (1.0 + decay) ** 2
    k = np.argmax(z, axis=-1)  # The first NaN, where there is one.
    top = z[rows, k]
    shares = np.exp(z - top[:, None])
    others = shares.copy()
    others[rows, k] = 0.0
    rest = np.array([_total(row) for row in others])
    ordinary = np.isfinite(top)
    lse = np.where(ordinary, top + np.log1p(rest), np.where(top == -np.inf, -np.inf, np.nan))
    logps = np.where(ordinary, (z[rows, targets] - top) - np.log1p(rest), np.nan)
    factor = -shares / (1.0 + rest)[:, None]
    factor[rows, targets] = -np.expm1(logps)
    return logps, lse, np.where(ordinary[:, None], factor * slope, np.nan)


def token_logps(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    ignore_index: int = -100,
    shift: bool = True,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Floats, Floats, Bools]:
    """Log probability of every label: log softmax(z)[label].

    z = logit_scale * logits, then z = softcap * tanh(z / softcap) if softcap is set. A row whose z
    holds NaN or +inf has lse and logp NaN; one all -inf has lse -inf and logp NaN.

    Args:
        logits: [B,T,V], any float dtype; the values are taken as they are.
        labels: [B,T] integers.
        ignore_index: Label of a masked position. Masked rows are not evaluated.
        shift: Score position t with labels[:, t + 1], masking the last position.
        logit_scale: Factor on the logits.
        softcap: Bound of z; None or 0 leaves z unbounded.

    Returns:
        logps [B,T] and lse [B,T], float64, both 0 where masked; valid [B,T], bool. All stand at
        the position of the logits.

    Raises:
        IndexError: A label that is read is neither ignore_index nor in [0, V).
    """
    x = np.asarray(logits, dtype=np.float64)
    targets, valid = _targets(labels, x.shape[-1], ignore_index, shift)
    logps, lse = np.zeros(valid.shape), np.zeros(valid.shape)
    if valid.any():
        logps[valid], lse[valid], _ = _rows(x[valid], targets[valid], logit_scale, softcap)
    return logps, lse, valid


@np.errstate(all="ignore")
def token_logps_grad(
    grad_logps: npt.ArrayLike,
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    ignore_index: int = -100,
    shift: bool = True,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Floats:
    """Gradient of sum(grad_logps * logps) with respect to the logits, [B,T,V] float64.

    dlogits_j = grad * (1[j = label] - softmax_j) * dz_j/dlogits_j; the label's factor is
    -expm1(logp). Masked rows and rows whose grad_logps ([B,T]) is 0 are exactly 0, whatever they
    hold; other rows that are no distribution (lse NaN or -inf) are NaN throughout.
    The keywords are those of `token_logps`.
    """
    x = np.asarray(logits, dtype=np.float64)
    grad = np.asarray(grad_logps, dtype=np.float64)
    targets, valid = _targets(labels, x.shape[-1], ignore_index, shift)
    active = valid & (grad != 0.0)
    dlogits = np.zeros_like(x)
    if active.any():
        _, _, factor = _rows(x[active], targets[active], logit_scale, softcap)
        dlogits[active] = grad[active][:, None] * factor
    return dlogits


@np.errstate(all="ignore")
def sequence_logps(
    token_logps: npt.ArrayLike, valid: npt.ArrayLike, *, average_log_prob: bool = True
) -> tuple[Floats, Ints]:
    """Sums or averages log probabilities over the valid tokens of each sequence.

    Args:
        token_logps: [B,T]; not read where invalid.
        valid: [B,T] bool.
        average_log_prob: Divide the sum by the count.

    Returns:
        logps [B] float64 (NaN for an empty sequence in both forms) and counts [B] int64.
    """
    values = np.asarray(token_logps, dtype=np.float64)
    mask = np.asarray(valid, dtype=np.bool_)
    counts = mask.sum(axis=-1, dtype=np.int64)
    logps = np.full(len(values), np.nan)
    for b in np.flatnonzero(counts):
        logps[b] = _total(values[b, mask[b]]) / (counts[b] if average_log_prob else 1)
    return logps, counts


class _Pairs:
    """P pairs of sequences; `logps` and `counts` are [2,P] (chosen, rejected), `z` is [P]."""

    def __init__(
        self, token_logps: npt.ArrayLike, valid: npt.ArrayLike, options: PreferenceOptions
    ) -> None:
        self.values = np.asarray(token_logps, dtype=np.float64)
        self.valid = np.asarray(valid, dtype=np.bool_)
        if self.values.ndim != 2 or self.values.shape != self.valid.shape or len(self.valid) % 2:
            raise ValueError(f"need two [2P,T], got {self.values.shape} and {self.valid.shape}")
        logps, counts = sequence_logps(
            self.values, self.valid, average_log_prob=options.average_log_prob
        )
        self.logps, self.counts = logps.reshape(2, -1), counts.reshape(2, -1)
        self.z: Floats = (self.logps[0] - self.logps[1]) - options.gamma_beta_ratio
        self.counted: Bools = (self.counts[0] > 0) & (self.counts[1] > 0)
        if options.empty == "nan":
            self.counted[:] = True
        # Divisors of sums over the counted pairs and over their chosen tokens.
        divisors = float(self.counted.sum()), float(self.counts[0, self.counted].sum())
        given = options.normalizer
        if options.reduction != "mean":
            divisors = 1.0, 1.0
        elif given is not None:
            divisors = given if isinstance(given, tuple) else (given, divisors[1])
        self.divisors: tuple[float, float] = divisors


@np.errstate(all="ignore")
def preference_loss(token_logps: npt.ArrayLike, valid: npt.ArrayLike, **options: Any) -> Preference:
    """SimPO loss of P pairs.

    sigmoid: -log sigmoid(beta z) (1 - eps) - log sigmoid(-beta z) eps; hinge: max(0, 1 - beta z);
    z = chosen_logps - rejected_logps - gamma_beta_ratio. A term of weight 0 is left out, so it
    cannot turn an infinite z into NaN. With nothing counted a mean is 0 for empty="drop" and
    0 / denominator (NaN for a denominator of 0) for empty="nan".

    token_logps [2P,T] is not read where valid [2P,T] is false; the fields of `PreferenceOptions`
    are the keywords.
    """
    opts = PreferenceOptions(**options)
    pairs = _Pairs(token_logps, valid, opts)
    counted, (chosen, rejected) = pairs.counted, pairs.logps
    num_pairs, eps = int(counted.sum()), opts.label_smoothing
    x = opts.beta * pairs.z
    if opts.loss_type == "hinge":
        losses = np.maximum(1.0 - x, 0.0)
    else:
        losses = _softplus(-x) * (1.0 - eps)
        if eps:
            losses = losses + _softplus(x) * eps
    losses = np.where(counted, losses, 0.0)

    pair_divisor, token_divisor = pairs.divisors

    def reduce(terms: Floats, divisor: float) -> Floats:
        if not len(terms) and opts.empty == "drop":
            return np.zeros(())
        return np.asarray(np.float64(_total(terms)) / divisor)

    loss = losses.copy() if opts.reduction == "none" else reduce(losses[counted], pair_divisor)
    if opts.sft_reduction == "token":
        p = len(counted)
        sft = reduce(-pairs.values[:p][pairs.valid[:p] & counted[:, None]], token_divisor)
    elif opts.reduction == "none":
        sft = np.where(counted, -chosen, 0.0)
    else:
        sft = reduce(-chosen[counted], pair_divisor)
    if opts.sft_weight:
        loss = np.asarray(loss + opts.sft_weight * sft)

    rewards = opts.beta * pairs.logps
    metrics: dict[str, float] = {
        name: float(np.float64(_total(terms[counted])) / num_pairs)
        for name, terms in (
            ("rewards/chosen", rewards[0]),
            ("rewards/rejected", rewards[1]),
            ("rewards/accuracies", (rewards[0] > rewards[1]).astype(np.float64)),
            ("rewards/margins", rewards[0] - rewards[1]),
            ("logps/chosen", chosen),
            ("logps/rejected", rejected),
        )
    }
    metrics["num_pairs"] = num_pairs
    metrics["dropped_pairs"] = len(counted) - num_pairs
    metrics["num_tokens"] = int(pairs.counts[:, counted].sum())
    return Preference(loss, losses, chosen, rejected, rewards[0], rewards[1], sft, metrics)


@np.errstate(all="ignore")
def preference_grad(
    token_logps: npt.ArrayLike,
    valid: npt.ArrayLike,
    *,
    grad_loss: npt.ArrayLike = 1.0,
    **options: Any,
) -> Floats:
    """Gradient of sum(grad_loss * loss) with respect to the token log probabilities.

    dlosses/dz is -beta sigmoid(-beta z) (1 - eps) + beta sigmoid(beta z) eps for sigmoid; for hinge
    -beta where beta z < 1, else 0 (also at the kink), and NaN where z is. dz/dchosen_logps = 1,
    dz/drejected_logps = -1, dlogps/dtoken = 1 / count (1 for sums). The sft term adds
    -sft_weight to that of chosen_logps ("sequence") or of every chosen token ("token").

    grad_loss is a number, or [P] for reduction "none"; the rest is as in `preference_loss`. The
    result is [2P,T] float64, exactly 0 at invalid positions and throughout dropped pairs.
    """
    opts = PreferenceOptions(**options)
    pairs = _Pairs(token_logps, valid, opts)
    p, eps, x = len(pairs.z), opts.label_smoothing, opts.beta * pairs.z
    if opts.loss_type == "hinge":
        slope = np.where(np.isnan(x), np.nan, np.where(1.0 - x > 0.0, -opts.beta, 0.0))
    else:
        slope = -opts.beta * _sigmoid(-x) * (1.0 - eps)
        if eps:
            slope = slope + opts.beta * _sigmoid(x) * eps
    upstream = np.asarray(grad_loss, dtype=np.float64)
    if upstream.ndim and opts.reduction != "none":
        raise ValueError("grad_loss must be a number for this reduction")
    upstream = np.broadcast_to(upstream, (p,))
    pair_divisor, token_divisor = pairs.divisors
    per_sequence = np.stack([slope, -slope])
    if opts.sft_reduction == "sequence":
        per_sequence[0] -= opts.sft_weight
    grad = np.zeros_like(pairs.values)
    for i in np.flatnonzero(pairs.counted):
        for side, row in ((0, i), (1, p + i)):
            length = pairs.counts[side, i] if opts.average_log_prob else 1
            token = upstream[i] * per_sequence[side, i] / pair_divisor / length
            if side == 0 and opts.sft_reduction == "token" and opts.sft_weight:
                token -= upstream[i] * opts.sft_weight / token_divisor
            grad[row, pairs.valid[row]] = token
    return grad


def simpo_loss(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    ignore_index: int = -100,
    shift: bool = True,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Preference, Floats]:
    """SimPO loss of logits [2P,T,V] and labels [2P,T], and its gradient.

    The keywords are those of `token_logps` and, in **options, of `PreferenceOptions`. The gradient
    is d loss / d logits (of loss.sum() for reduction "none"), [2P,T,V] float64.
    """
    scoring: dict[str, Any] = dict(
        ignore_index=ignore_index, shift=shift, logit_scale=logit_scale, softcap=softcap
    )
    logps, _, valid = token_logps(logits, labels, **scoring)
    grad_logps = preference_grad(logps, valid, **options)
    dlogits = token_logps_grad(grad_logps, logits, labels, **scoring)
    return preference_loss(logps, valid, **options), dlogits
