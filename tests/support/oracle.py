"""Closed-form float64 oracle of the SimPO preference loss and its gradient.

Log-probabilities and shapes are those of `token_oracle`. Preference functions take pairs [P,2] of
(chosen, rejected) sequences. Without pairs, S = 2P and the pairs are (p, P + p).
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from support.token_oracle import (
    Bools,
    Floats,
    Ints,
    TokenOptions,
    exact_sum,
    sequence_logps,
    spans_of,
    token_logps,
    token_logps_grad,
)


@dataclasses.dataclass(frozen=True)
class PreferenceOptions:
    """The keywords of `preference_loss`, `preference_grad` and `simpo_loss`."""

    # Scale of the rewards, and the target margin gamma / beta, which is subtracted from chosen -
    # rejected. None means 0 for "ipo" and 0.5 for the others.
    beta: float = 2.0
    gamma_beta_ratio: float | None = None
    # "sigmoid", "hinge" or "ipo".
    loss_type: str = "sigmoid"
    # Exponent of AlphaPO's reward r(l) = (1 - exp(l)^-alpha) / alpha. 0 means r(l) = l.
    alpha: float = 0.0
    # Probability in [0, 0.5] that a preference is flipped, for the sigmoid loss only.
    label_smoothing: float = 0.0
    # Weight of the chosen sequences' cross entropy: -chosen_logps of each pair ("sequence"), or
    # the mean over all chosen tokens of the batch ("token").
    sft_weight: float = 0.0
    sft_reduction: str = "sequence"
    # Divide the log-probability of a sequence by its token count.
    average_log_prob: bool = True
    # "mean", "sum" or "none".
    reduction: str = "mean"
    # Denominator of reduction "mean" instead of the number of counted pairs. A tuple (pairs,
    # tokens) also replaces the token count of sft_reduction "token".
    normalizer: float | tuple[float, float] | None = None
    # A pair with an empty sequence is dropped ("drop") or NaN ("nan").
    empty: str = "drop"
    # Factors [P] of the pairs' losses and sft terms, or None. A factor of 0 removes the pair from
    # them, but not from denominators and metrics.
    pair_weight: npt.ArrayLike | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for an invalid value or combination."""
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
    """Result of `preference_loss`. Every array is float64."""

    loss: Floats  # 0-d, or [P] for reduction "none". With the sft term if sft_weight > 0.
    losses: Floats  # [P], weighted, without the sft term. 0 for dropped pairs.
    chosen_logps: Floats  # [P], NaN for an empty sequence, like the next three.
    rejected_logps: Floats
    chosen_rewards: Floats  # beta * r(chosen_logps).
    rejected_rewards: Floats  # beta * r(rejected_logps).
    sft_loss: Floats  # 0-d, or [P] for reduction "none". Without the factor sft_weight.
    metrics: dict[str, float]  # Of the counted pairs.


def _sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)) without overflow, with a small relative error in both tails."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0.0, 1.0, small) / (1.0 + small)


def _softplus(x: Floats) -> Floats:
    """log(1 + exp(x)) = -log sigmoid(-x), without overflow."""
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))


def _pairs_or_default(pairs: npt.ArrayLike | None, sequences: int) -> Ints:
    """Pairs [P,2] (chosen, rejected). The default pairs the first half with the second."""
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
    """The number of counted pairs, and that of their scored chosen tokens."""
    given = np.asarray(labels, dtype=np.int64)
    num_pairs = num_tokens = 0
    flat = given.reshape(-1).tolist()
    scored = [
        sum(label != ignore_index for label in flat[span][int(shift) :])
        for span in spans_of(given.shape, cu_seqlens)
    ]
    for chosen, rejected in _pairs_or_default(pairs, len(scored)):
        if empty == "nan" or (scored[chosen] and scored[rejected]):
            num_pairs += 1
            num_tokens += scored[chosen]
    return num_pairs, num_tokens


class _Pairs:
    """P pairs of sequences. `logps`, `rewards` and `counts` are [2,P] (chosen, rejected)."""

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
        self.spans = spans_of(self.values.shape, cu_seqlens)
        self.sequences = _pairs_or_default(pairs, len(self.spans)).T  # [2,P]
        logps, counts = sequence_logps(
            self.values,
            self.valid,
            average_log_prob=options.average_log_prob,
            cu_seqlens=cu_seqlens,
        )
        self.logps, self.counts = logps[self.sequences], counts[self.sequences]
        alpha = options.alpha
        # r(l) without its factor beta, and dr/dl.
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
        # Denominators of sums over the counted pairs, and over their chosen tokens.
        divisors = float(self.counted.sum()), float(self.counts[0, self.counted].sum())
        given = options.normalizer
        if options.reduction != "mean":
            divisors = 1.0, 1.0
        elif given is not None:
            divisors = given if isinstance(given, tuple) else (given, divisors[1])
        self.divisors: tuple[float, float] = divisors

    def weighted(self, terms: Floats) -> Floats:
        """Terms [P] times the pairs' weights. Exactly 0 for a weight of 0 or a dropped pair."""
        return np.where(self.counted & (self.weight != 0.0), self.weight * terms, 0.0)

    def tokens(self, sequence: int) -> Floats:
        """The log-probabilities of a sequence's valid tokens."""
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

    With z = r(chosen_logps) - r(rejected_logps) - gamma_beta_ratio, the losses are

    - sigmoid: -log sigmoid(beta z) (1 - eps) - log sigmoid(-beta z) eps
    - hinge: max(0, 1 - beta z)
    - ipo: (z - 1 / (2 beta))^2

    A term of weight 0 is omitted, so it cannot turn an infinite z into NaN. Without counted pairs,
    a mean is 0 for empty="drop" and 0 / denominator, which may be NaN, for empty="nan".

    token_logps is [2P,T], [S,T] with pairs, or [N] or [1,N] with cu_seqlens. valid has its shape.
    Invalid positions are not read. The keywords are the fields of `PreferenceOptions`.
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
        return np.asarray(np.float64(exact_sum(terms)) / divisor)

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
        name: float(np.float64(exact_sum(terms[counted])) / num_pairs)
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

    dlosses/dz is

    - sigmoid: -beta sigmoid(-beta z) (1 - eps) + beta sigmoid(beta z) eps
    - hinge: -beta if beta z < 1, else 0 (also at the kink), and NaN if z is NaN
    - ipo: 2 (z - 1 / (2 beta))

    dz/dchosen_logps = r'(chosen_logps) and dz/drejected_logps = -r'(rejected_logps), with
    r'(l) = exp(-alpha l). A slope of 0 stays 0 even if r' is infinite. dlogps/dtoken is 1 / count,
    or 1 for sums. The sft term adds -sft_weight to the gradient of chosen_logps ("sequence") or of
    every chosen token ("token"). The gradients of all pairs of a sequence add up.

    grad_loss and grad_sft_loss are numbers, or [P] for reduction "none". The other gradients are
    numbers or [P]. All else is as in `preference_loss`. The result is float64 in the shape of
    token_logps, and exactly 0 at invalid positions. Dropped pairs contribute only through the
    gradients of their logps.
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
    # The factors of a pair's loss, of its sft term and of its two logps in the sum.
    to_loss = np.broadcast_to(of_loss / pair_divisor + of_losses, (p,))
    to_sft = np.broadcast_to((opts.sft_weight * of_loss + of_sft) / sft_divisor, (p,))
    to_logps = np.broadcast_to(of_chosen, (p,)), np.broadcast_to(of_rejected, (p,))

    grad = np.zeros_like(batch.values)
    # All tokens of a sequence have the same gradient, the sum of these terms.
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
        flat[span][mask[span]] = exact_sum(np.array(parts, dtype=np.float64))
    return grad


def simpo_loss(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    pairs: npt.ArrayLike | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    **options: Any,
) -> tuple[Preference, Floats]:
    """SimPO loss of logits [2P,T,V] and labels [2P,T], and its gradient.

    With pairs [P,2], there may be any number of rows. With cu_seqlens, the logits are [N,V] or
    [1,N,V] and the labels [N] or [1,N]. The options are those of `TokenOptions` and of
    `PreferenceOptions`, and the gradients of `preference_grad`. The returned gradient is that of
    the loss, or of loss.sum() for reduction "none", in float64 and in the shape of the logits.
    """
    fields = {field.name for field in dataclasses.fields(TokenOptions)}
    scoring = {name: options.pop(name) for name in fields & options.keys()}
    gradients = {name: options.pop(name) for name in [*options] if name.startswith("grad_")}
    scoring["cu_seqlens"] = cu_seqlens
    layout: dict[str, Any] = dict(pairs=pairs, cu_seqlens=cu_seqlens)
    logps, _, valid = token_logps(logits, labels, **scoring)
    grad_logps = preference_grad(logps, valid, **gradients, **layout, **options)
    dlogits = token_logps_grad(grad_logps, logits, labels, **scoring)
    return preference_loss(logps, valid, **layout, **options), dlogits
