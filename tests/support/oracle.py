"""Closed-form float64 oracle of the SimPO preference loss and its gradient.

Everything is NumPy in float64, each gradient is a formula derived by hand, and sums are rounded
once (`math.fsum`). Nothing here is fast or differentiable; it is there to be compared with.

Shapes: S sequences, T positions, V vocabulary entries, P pairs. Sequences are the B rows of [B,T],
or, with cu_seqlens [S+1], the positions cu_seqlens[s]..cu_seqlens[s+1]-1 of [N] (or [1,N]), where
positions before the first and from the last entry on belong to none. Preference functions take
pairs [P,2] of (chosen, rejected) sequences; without, S = 2P and the pairs are (p, P + p).
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
class PreferenceOptions:
    """The keywords of `preference_loss`, `preference_grad` and `simpo_loss`."""

    # Reward scale, and the target margin gamma / beta, subtracted from chosen - rejected; None: 0
    # for "ipo" and 0.5 for the others.
    beta: float = 2.0
    gamma_beta_ratio: float | None = None
    # "sigmoid", "hinge" or "ipo".
    loss_type: str = "sigmoid"
    # Exponent of AlphaPO's reward r(l) = (1 - exp(l)^-alpha) / alpha; 0: r(l) = l.
    alpha: float = 0.0
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
    # [P] factors of the pairs' losses and sft terms, or None; a factor of 0 leaves the pair out of
    # them, but not out of a denominator or a metric.
    pair_weight: npt.ArrayLike | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a value or a combination that has no meaning."""
        for name, choices in (
            ("loss_type", ("sigmoid", "hinge", "ipo")),
            ("sft_reduction", ("sequence", "token")),
            ("reduction", ("mean", "sum", "none")),
            ("empty", ("drop", "nan")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if not 0.0 <= self.label_smoothing <= 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5], got {self.label_smoothing}")
        if self.loss_type != "sigmoid" and self.label_smoothing > 0.0:
            raise ValueError(f"label_smoothing has no meaning with the {self.loss_type} loss")
        if not self.sft_weight >= 0.0:
            raise ValueError(f"sft_weight must not be negative, got {self.sft_weight}")
        if self.sft_reduction == "token" and self.reduction == "none":
            raise ValueError("sft_reduction 'token' has no value per pair: reduction 'none'")
        if self.normalizer is not None and self.reduction != "mean":
            raise ValueError("normalizer replaces the denominator of reduction 'mean' only")
        plain = self.normalizer is not None and not isinstance(self.normalizer, tuple)
        if plain and self.sft_reduction == "token" and self.sft_weight > 0.0:
            raise ValueError("sft_reduction 'token' needs normalizer=(pairs, tokens)")

    @property
    def margin(self) -> float:
        """gamma_beta_ratio, or the default of the loss type."""
        if self.gamma_beta_ratio is None:
            return 0.0 if self.loss_type == "ipo" else 0.5
        return self.gamma_beta_ratio


@dataclasses.dataclass(frozen=True)
class Preference:
    """Result of `preference_loss`; every array is float64."""

    loss: Floats  # 0-d, or [P] for reduction "none"; with the sft term when sft_weight > 0.
    losses: Floats  # [P], weighted, without the sft term; 0 at dropped pairs.
    chosen_logps: Floats  # [P], NaN for an empty sequence; so are the next three.
    rejected_logps: Floats
    chosen_rewards: Floats  # beta * r(chosen_logps).
    rejected_rewards: Floats  # beta * r(rejected_logps).
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


def _spans(shape: tuple[int, ...], cu_seqlens: npt.ArrayLike | None) -> list[slice]:
    """Where each sequence stands among the positions of [B,T], or of [N] or [1,N], laid flat."""
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


def _targets(
    labels: npt.ArrayLike,
    vocabulary: int,
    ignore_index: int,
    shift: bool,
    cu_seqlens: npt.ArrayLike | None,
) -> tuple[Ints, Bools]:
    """Label scored at each logits position (int64; 0 where masked) and validity, as labels."""
    given = np.asarray(labels, dtype=np.int64)
    targets = np.full(given.shape, ignore_index)  # of rows that can be written as one
    flat, flat_targets = given.reshape(-1), targets.reshape(-1)
    for span in _spans(given.shape, cu_seqlens):
        sequence = flat[span]
        flat_targets[span][: len(sequence) - shift] = sequence[int(shift) :]
    valid = targets != ignore_index
    for at in np.argwhere(valid & ((targets < 0) | (targets >= vocabulary))):
        *row, t = at.tolist()
        raise IndexError(
            f"label {targets[tuple(at)]} at {(*row, t + shift)} is outside [0, {vocabulary})"
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
    cu_seqlens: npt.ArrayLike | None = None,
) -> tuple[Floats, Floats, Bools]:
    """Log probability of every label: log softmax(z)[label].

    z = logit_scale * logits, then z = softcap * tanh(z / softcap) if softcap is set. A row whose z
    holds NaN or +inf has lse and logp NaN; one all -inf has lse -inf and logp NaN.

    Args:
        logits: [B,T,V], or [N,V] or [1,N,V] with cu_seqlens, any float dtype; the values are taken
            as they are.
        labels: [B,T], or [N] or [1,N], integers.
        ignore_index: Label of a masked position. Masked rows are not evaluated.
        shift: Score position t with the label at t + 1 of the same sequence, masking the last
            position of each.
        logit_scale: Factor on the logits.
        softcap: Bound of z; None or 0 leaves z unbounded.
        cu_seqlens: [S+1], where the sequences begin and end, or None.

    Returns:
        logps and lse, float64, both 0 where masked; valid, bool. All are of the shape of labels and
        stand at the position of the logits.

    Raises:
        IndexError: A label that is read is neither ignore_index nor in [0, V).
    """
    x = np.asarray(logits, dtype=np.float64)
    targets, valid = _targets(labels, x.shape[-1], ignore_index, shift, cu_seqlens)
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
    cu_seqlens: npt.ArrayLike | None = None,
) -> Floats:
    """Gradient of sum(grad_logps * logps) with respect to the logits, float64, in their shape.

    dlogits_j = grad * (1[j = label] - softmax_j) * dz_j/dlogits_j; the label's factor is
    -expm1(logp). Masked rows and rows whose grad_logps (in the shape of labels) is 0 are exactly 0,
    whatever they hold; other rows that are no distribution (lse NaN or -inf) are NaN throughout.
    The keywords are those of `token_logps`.
    """
    x = np.asarray(logits, dtype=np.float64)
    grad = np.asarray(grad_logps, dtype=np.float64)
    targets, valid = _targets(labels, x.shape[-1], ignore_index, shift, cu_seqlens)
    active = valid & (grad != 0.0)
    dlogits = np.zeros_like(x)
    if active.any():
        _, _, factor = _rows(x[active], targets[active], logit_scale, softcap)
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
    """Sums or averages log probabilities over the valid tokens of each sequence.

    Args:
        token_logps: [B,T], or [N] or [1,N] with cu_seqlens; not read where invalid.
        valid: Bool, as token_logps.
        average_log_prob: Divide the sum by the count.
        cu_seqlens: [S+1], where the sequences begin and end, or None.

    Returns:
        logps [S] float64 (NaN for an empty sequence in both forms) and counts [S] int64.
    """
    values = np.asarray(token_logps, dtype=np.float64)
    mask = np.asarray(valid, dtype=np.bool_).reshape(-1)
    spans = _spans(values.shape, cu_seqlens)
    flat = values.reshape(-1)
    counts = np.array([mask[span].sum() for span in spans], dtype=np.int64)
    logps = np.full(len(spans), np.nan)
    for s in np.flatnonzero(counts):
        total = _total(flat[spans[s]][mask[spans[s]]])
        logps[s] = total / (counts[s] if average_log_prob else 1)
    return logps, counts


def _pairs_or_default(pairs: npt.ArrayLike | None, sequences: int) -> Ints:
    """Pairs [P,2] (chosen, rejected), by default of the first half with the second."""
    if pairs is None:
        if sequences % 2:
            raise ValueError(f"need pairs, or an even number of sequences, got {sequences}")
        return np.arange(sequences).reshape(2, -1).T
    given = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    for at in np.argwhere((given < 0) | (given >= sequences)):
        raise IndexError(f"pair {at.tolist()} is of sequence {given[tuple(at)]} of {sequences}")
    return given


def count_pairs(
    labels: npt.ArrayLike,
    *,
    cu_seqlens: npt.ArrayLike | None = None,
    pairs: npt.ArrayLike | None = None,
    empty: str = "drop",
    ignore_index: int = -100,
    shift: bool = True,
) -> tuple[int, int]:
    """The counted pairs, and the scored tokens of their chosen sequences, counted once per pair."""
    given = np.asarray(labels, dtype=np.int64)
    num_pairs = num_tokens = 0
    flat = given.reshape(-1).tolist()
    scored = [
        sum(label != ignore_index for label in flat[span][int(shift) :])
        for span in _spans(given.shape, cu_seqlens)
    ]
    for chosen, rejected in _pairs_or_default(pairs, len(scored)):
        if empty == "nan" or (scored[chosen] and scored[rejected]):
            num_pairs += 1
            num_tokens += scored[chosen]
    return num_pairs, num_tokens


class _Pairs:
    """P pairs of sequences; `logps`, `rewards` and `counts` are [2,P] (chosen, rejected)."""

    def __init__(
        self,
        token_logps: npt.ArrayLike,
        valid: npt.ArrayLike,
        pairs: npt.ArrayLike | None,
        cu_seqlens: npt.ArrayLike | None,
        options: PreferenceOptions,
    ) -> None:
        self.values = np.asarray(token_logps, dtype=np.float64)
        self.valid = np.asarray(valid, dtype=np.bool_)
        if self.values.shape != self.valid.shape:
            raise ValueError(f"need one shape, got {self.values.shape} and {self.valid.shape}")
        self.spans = _spans(self.values.shape, cu_seqlens)
        self.sequences = _pairs_or_default(pairs, len(self.spans)).T  # [2,P]
        logps, counts = sequence_logps(
            self.values,
            self.valid,
            average_log_prob=options.average_log_prob,
            cu_seqlens=cu_seqlens,
        )
        self.logps, self.counts = logps[self.sequences], counts[self.sequences]
        alpha = options.alpha
        # r(l), before its factor beta, and dr/dl.
        self.rewards = -np.expm1(-alpha * self.logps) / alpha if alpha else self.logps
        self.reward_slopes = np.exp(-alpha * self.logps) if alpha else np.ones_like(self.logps)
        self.z: Floats = (self.rewards[0] - self.rewards[1]) - options.margin
        self.counted: Bools = (self.counts[0] > 0) & (self.counts[1] > 0)
        if options.empty == "nan":
            self.counted[:] = True
        self.weight = np.ones_like(self.z)
        if options.pair_weight is not None:
            self.weight = np.asarray(options.pair_weight, dtype=np.float64)
            if self.weight.shape != self.z.shape:
                raise ValueError(f"need pair_weight {self.z.shape}, got {self.weight.shape}")
        # Divisors of sums over the counted pairs and over their chosen tokens.
        divisors = float(self.counted.sum()), float(self.counts[0, self.counted].sum())
        given = options.normalizer
        if options.reduction != "mean":
            divisors = 1.0, 1.0
        elif given is not None:
            divisors = given if isinstance(given, tuple) else (given, divisors[1])
        self.divisors: tuple[float, float] = divisors

    def weighted(self, terms: Floats) -> Floats:
        """Terms [P] times the pairs' weights; 0 for a weight of 0 and for a dropped pair."""
        return np.where(self.counted & (self.weight != 0.0), self.weight * terms, 0.0)

    def tokens(self, sequence: int) -> Floats:
        """The log probabilities of a sequence's valid tokens."""
        span = self.spans[sequence]
        return self.values.reshape(-1)[span][self.valid.reshape(-1)[span]]


@np.errstate(all="ignore")
def preference_loss(
    token_logps: npt.ArrayLike,
    valid: npt.ArrayLike,
    *,
    pairs: npt.ArrayLike | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    **options: Any,
) -> Preference:
    """SimPO loss of P pairs.

    sigmoid: -log sigmoid(beta z) (1 - eps) - log sigmoid(-beta z) eps; hinge: max(0, 1 - beta z);
    ipo: (z - 1 / (2 beta))^2; z = r(chosen_logps) - r(rejected_logps) - gamma_beta_ratio. A term of
    weight 0 is left out, so it cannot turn an infinite z into NaN. With nothing counted a mean is 0
    for empty="drop" and 0 / denominator (NaN for a denominator of 0) for empty="nan".

    token_logps ([2P,T], or [S,T] with pairs, or [N] or [1,N] with cu_seqlens) is not read where
    valid, of the same shape, is false; the fields of `PreferenceOptions` are the keywords.
    """
    opts = PreferenceOptions(**options)
    batch = _Pairs(token_logps, valid, pairs, cu_seqlens, opts)
    counted, (chosen, rejected) = batch.counted, batch.logps
    num_pairs, eps = int(counted.sum()), opts.label_smoothing
    x = opts.beta * batch.z
    if opts.loss_type == "hinge":
        losses = np.maximum(1.0 - x, 0.0)
    elif opts.loss_type == "ipo":
        losses = (batch.z - 0.5 / opts.beta) ** 2
    else:
        losses = _softplus(-x) * (1.0 - eps)
        if eps:
            losses = losses + _softplus(x) * eps
    losses = batch.weighted(losses)

    pair_divisor, token_divisor = batch.divisors

    def reduce(terms: Floats, divisor: float) -> Floats:
        if not len(terms) and opts.empty == "drop":
            return np.zeros(())
        return np.asarray(np.float64(_total(terms)) / divisor)

    loss = losses.copy() if opts.reduction == "none" else reduce(losses[counted], pair_divisor)
    if opts.sft_reduction == "token":
        terms = [
            -batch.weight[p] * batch.tokens(batch.sequences[0, p])
            for p in np.flatnonzero(counted & (batch.weight != 0.0))
        ]
        sft = reduce(np.concatenate([np.zeros(num_pairs), *terms]), token_divisor)
    elif opts.reduction == "none":
        sft = batch.weighted(-chosen)
    else:
        sft = reduce(batch.weighted(-chosen)[counted], pair_divisor)
    if opts.sft_weight:
        loss = np.asarray(loss + opts.sft_weight * sft)

    rewards = opts.beta * batch.rewards
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
    metrics["num_tokens"] = int(batch.counts[:, counted].sum())
    return Preference(loss, losses, chosen, rejected, rewards[0], rewards[1], sft, metrics)


@np.errstate(all="ignore")
def preference_grad(
    token_logps: npt.ArrayLike,
    valid: npt.ArrayLike,
    *,
    grad_loss: npt.ArrayLike = 1.0,
    grad_losses: npt.ArrayLike = 0.0,
    grad_chosen_logps: npt.ArrayLike = 0.0,
    grad_rejected_logps: npt.ArrayLike = 0.0,
    grad_sft_loss: npt.ArrayLike = 0.0,
    pairs: npt.ArrayLike | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    **options: Any,
) -> Floats:
    """Gradient of the sum of grad_x * x over the results x, with respect to the token logps.

    dlosses/dz is -beta sigmoid(-beta z) (1 - eps) + beta sigmoid(beta z) eps for sigmoid; for hinge
    -beta where beta z < 1, else 0 (also at the kink), and NaN where z is; 2 (z - 1 / (2 beta)) for
    ipo. dz/dchosen_logps = r'(chosen_logps), dz/drejected_logps = -r'(rejected_logps), with
    r'(l) = exp(-alpha l); a slope of 0 stays 0 where r' is infinite. dlogps/dtoken = 1 / count (1
    for sums). The sft term adds -sft_weight to that of chosen_logps ("sequence") or of every chosen
    token ("token"). A sequence has the sum of what its pairs give it.

    grad_loss and grad_sft_loss are numbers, or [P] for reduction "none"; the other gradients are
    numbers or [P]; the rest is as in `preference_loss`. The result is float64 in the shape of
    token_logps, exactly 0 at invalid positions; dropped pairs have a part in it through their logps
    only.
    """
    opts = PreferenceOptions(**options)
    batch = _Pairs(token_logps, valid, pairs, cu_seqlens, opts)
    p, eps, x = len(batch.z), opts.label_smoothing, opts.beta * batch.z
    if opts.loss_type == "hinge":
        slope = np.where(np.isnan(x), np.nan, np.where(1.0 - x > 0.0, -opts.beta, 0.0))
    elif opts.loss_type == "ipo":
        slope = 2.0 * (batch.z - 0.5 / opts.beta)
    else:
        slope = -opts.beta * _sigmoid(-x) * (1.0 - eps)
        if eps:
            slope = slope + opts.beta * _sigmoid(x) * eps
    of_loss, of_losses, of_chosen, of_rejected, of_sft = (
        np.asarray(grad, dtype=np.float64)
        for grad in (grad_loss, grad_losses, grad_chosen_logps, grad_rejected_logps, grad_sft_loss)
    )
    if (of_loss.ndim or of_sft.ndim) and opts.reduction != "none":
        raise ValueError("grad_loss and grad_sft_loss must be numbers for this reduction")
    pair_divisor, token_divisor = batch.divisors
    sft_divisor = token_divisor if opts.sft_reduction == "token" else pair_divisor
    # What a pair's loss, its sft term and its two logps are multiplied with in the sum.
    to_loss = np.broadcast_to(of_loss / pair_divisor + of_losses, (p,))
    to_sft = np.broadcast_to((opts.sft_weight * of_loss + of_sft) / sft_divisor, (p,))
    to_logps = np.broadcast_to(of_chosen, (p,)), np.broadcast_to(of_rejected, (p,))

    grad = np.zeros_like(batch.values)
    # All tokens of a sequence have the same gradient: the sum of these.
    terms: list[list[float]] = [[] for _ in batch.spans]
    for i, side in itertools.product(range(p), (0, 1)):
        sequence, sign = terms[batch.sequences[side, i]], 1.0 - 2.0 * side
        length = batch.counts[side, i] if opts.average_log_prob else 1
        sequence.append(to_logps[side][i] / length)
        if not batch.counted[i] or batch.weight[i] == 0.0:
            continue
        if slope[i] != 0.0 and to_loss[i] != 0.0:
            along = slope[i] * sign * batch.reward_slopes[side, i]
            sequence.append(to_loss[i] * batch.weight[i] * along / length)
        if side == 0 and to_sft[i] != 0.0:
            in_sft = 1 if opts.sft_reduction == "token" else length
            sequence.append(-to_sft[i] * batch.weight[i] / in_sft)
    flat, mask = grad.reshape(-1), batch.valid.reshape(-1)
    for span, parts in zip(batch.spans, terms, strict=True):
        flat[span][mask[span]] = _total(np.array(parts, dtype=np.float64))
    return grad


def simpo_loss(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    ignore_index: int = -100,
    shift: bool = True,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    pairs: npt.ArrayLike | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    **options: Any,
) -> tuple[Preference, Floats]:
    """SimPO loss of logits [2P,T,V] and labels [2P,T], and its gradient.

    With pairs [P,2] the rows may be any number, and with cu_seqlens the logits are [N,V] or [1,N,V]
    and the labels [N] or [1,N]. The keywords are those of `token_logps` and, in **options, of
    `PreferenceOptions`, and the gradients of `preference_grad`. The gradient is d loss / d logits
    (of loss.sum() for reduction "none"), float64, in the logits' shape.
    """
    scoring: dict[str, Any] = dict(
        ignore_index=ignore_index,
        shift=shift,
        logit_scale=logit_scale,
        softcap=softcap,
        cu_seqlens=cu_seqlens,
    )
    gradients = {name: value for name, value in options.items() if name.startswith("grad_")}
    options = {name: value for name, value in options.items() if name not in gradients}
    layout: dict[str, Any] = dict(pairs=pairs, cu_seqlens=cu_seqlens)
    logps, _, valid = token_logps(logits, labels, **scoring)
    grad_logps = preference_grad(logps, valid, **gradients, **layout, **options)
    dlogits = token_logps_grad(grad_logps, logits, labels, **scoring)
    return preference_loss(logps, valid, **layout, **options), dlogits
