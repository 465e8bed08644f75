"""SimPO as functions of hidden states and lm_head, whose logits are never all in memory.

Public as part of :mod:`simpo_ext.functional`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _linear_ops, _ops
from ._layout import as_batch, resolve_layout
from ._options import (
    EmptyPolicy,
    Normalizer,
    PreferenceOptions,
    Reduction,
    ReportName,
    SftReduction,
    TokenOptions,
    resolve_linear_options,
    resolve_normalizer,
    resolve_preference_options,
    resolve_token_options,
)
from ._output import Report, SimPOOutput, compose_output
from ._presets import Preset, TrainerLossType
from ._report import check_linear_report, mean_logits


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As torch casts the arguments of F.linear under autocast."""
    device_type = next(tensor.device.type for tensor in tensors if tensor is not None)
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
        for tensor in tensors
    )


def _checked(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The arguments, found to belong together, at the dtype to compute with."""
    hidden, weight, bias, labels = _checks.check_linear_arguments(hidden, weight, bias, labels)
    cast_hidden, cast_weight, cast_bias = _autocast(hidden, weight, bias)
    assert cast_hidden is not None and cast_weight is not None
    _checks.check_one_dtype(cast_hidden, weight=cast_weight, bias=cast_bias)
    return cast_hidden, cast_weight, labels, cast_bias


def linear_token_logps(
    hidden: Tensor,  # [B, T, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [B, T]
    *,
    bias: Tensor | None = None,  # [V]
    cu_seqlens: Tensor | None = None,  # [S + 1]
    ignore_index: int = -100,
    shift: bool = True,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    logits_budget_bytes: int | None = None,
    num_valid_tokens: int | None = None,
) -> Tensor:  # [B, T]
    """Log-probability of each label, from hidden states and lm_head.

    :func:`token_logps` of ``logits = hidden @ weight.T + bias``, rounded to the dtype of
    ``hidden``, without ever holding all of them. Masked positions cost nothing: the R valid ones
    are put together first. The vocabulary is worked on in chunks of at most 4096 columns (8192 on
    a GPU), of which as many are kept for the backward as the budget allows; the others are computed
    again there. Without a gradient to come nothing is kept, and nothing else is done for one.

    With logits [R, V] of e bytes, forward and backward cost 6 R V H operations, and 2 R V H more
    for the part that is not kept. Memory, besides arguments and gradients: the logits that the
    budget allows, one chunk at least, and three times [R, H] (twice on a GPU), one of them float32.

    Args:
        hidden: [B, T, H] float64, float32, bfloat16 or float16: the last hidden states, as they go
            into lm_head. Any strides, though a last dimension that is not contiguous is copied.
        weight: [V, H] of the dtype of ``hidden``: lm_head's. Any strides.
        labels: [B, T] of an integer dtype, each ``ignore_index`` or in [0, V).
        bias: [V] of the dtype of ``hidden``, or None.
        cu_seqlens: [S + 1], for packed hidden states [N, H] or [1, N, H] and labels [N] or [1, N]:
            see :func:`token_logps`.
        ignore_index: The label of positions that are not scored.
        shift: True: the hidden state at t is scored with ``labels[:, t + 1]``, and the last
            position is masked. False: with ``labels[:, t]``.
        logit_scale: Factor on the logits, at least 1e-30.
        softcap: Bound of the logits, in [1e-30, 1e30], or None.
        logits_budget_bytes: How much of the logits may be held at a time, >= 0. Default: a
            sixteenth of the GPU's memory, and 1 GiB on CPUs.
        num_valid_tokens: An upper bound of the number of valid tokens. On a GPU, nothing waits for
            the device if it is given, and the call can be captured in a graph; rows are computed
            for so many. Without it they are counted, or, in a capture and under ``torch.compile``,
            taken to be all that have a label.

    Under ``torch.autocast``, ``hidden``, ``weight`` and ``bias`` take its dtype, unless they are
    float64.

    Returns:
        [B, T], or the shape of packed labels, float32 (float64 for float64 arguments), at the
        position of the hidden state; 0 where masked.

    Raises:
        TypeError: An argument is of the wrong type, or a tensor of the wrong dtype or layout.
        ValueError: A shape, a device or a number does not fit; on CPUs, there are more valid tokens
            than ``num_valid_tokens``. On a GPU, log-probabilities of those too many are NaN.
        IndexError: As :func:`token_logps`, as are all errors not listed here.
    """
    shape = labels.shape if cu_seqlens is not None else None
    hidden, labels, cu_seqlens = as_batch("hidden", hidden, labels, cu_seqlens)
    logps = score_labels(
        hidden,
        weight,
        labels,
        bias=bias,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        shift=shift,
        logit_scale=logit_scale,
        softcap=softcap,
        logits_budget_bytes=logits_budget_bytes,
        num_valid_tokens=num_valid_tokens,
    ).logps
    return logps if shape is None else logps.view(shape)


class ScoredTokens(NamedTuple):
    """Token log-probabilities [B, T], and what a report of them needs; None where not asked for."""

    logps: Tensor
    mean_logit: Tensor | None = None  # 0 where masked, as entropy
    entropy: Tensor | None = None
    all_mean_logits: Tensor | None = None  # of masked positions, too


def _score(
    hidden: Tensor,  # [B, T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [B, T]
    options: TokenOptions,
    budget: int | None,
    count: int | None,
    report: tuple[str, ...],
) -> ScoredTokens:
    arguments = hidden, weight, bias, targets, options, budget, count
    if "logits" in report or "entropy" in report:
        scored = ScoredTokens(*_linear_ops.linear_token_logps_report(*arguments))
    else:
        scored = ScoredTokens(_linear_ops.linear_token_logps(*arguments))
    if "logits_all" not in report:
        return scored
    return scored._replace(all_mean_logits=mean_logits(hidden, weight, bias, options.logit_scale))


def score_labels(
    hidden: Tensor,  # [B, T, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [B, T]
    *,
    bias: Tensor | None = None,  # [V]
    cu_seqlens: Tensor | None = None,  # [S + 1]
    ignore_index: int = -100,
    shift: bool = True,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    logits_budget_bytes: int | None = None,
    num_valid_tokens: int | None = None,
    report: Collection[ReportName] = (),
) -> ScoredTokens:
    """:func:`linear_token_logps` with what :func:`linear_simpo_loss` reports, by token.

    Of a batch: a flat layout has become one of one row.
    """
    hidden, weight, labels, bias = _checked(hidden, weight, labels, bias)
    options = resolve_token_options(
        ignore_index=ignore_index, shift=shift, logit_scale=logit_scale, softcap=softcap
    )
    budget, count = resolve_linear_options(logits_budget_bytes, num_valid_tokens)
    names = check_linear_report(report, softcap)
    targets, options = _ops.sequence_targets(labels, cu_seqlens, weight.shape[0], options)
    return _score(hidden, weight, bias, targets, options, budget, count, names)


def linear_simpo_loss(
    hidden: Tensor,  # [2P, T, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [2P, T]
    *,
    bias: Tensor | None = None,  # [V]
    cu_seqlens: Tensor | None = None,  # [S + 1]
    pairs: Tensor | None = None,  # [P, 2]
    pair_weight: Tensor | None = None,  # [P]
    preset: Preset | None = None,
    beta: float | None = None,
    gamma_beta_ratio: float | None = None,
    gamma: float | None = None,
    loss_type: TrainerLossType | None = None,
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
    sft_weight: float | None = None,
    sft_reduction: SftReduction | None = None,
    average_log_prob: bool | None = None,
    reduction: Reduction = "mean",
    normalizer: Normalizer = None,
    empty: EmptyPolicy | None = None,
    ignore_index: int = -100,
    shift: bool | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
    logits_budget_bytes: int | None = None,
    num_valid_tokens: int | None = None,
    report: Collection[ReportName] = (),
) -> SimPOOutput:
    """SimPO's loss from hidden states and lm_head, without their logits in memory.

    :func:`simpo_loss` of ``logits = hidden @ weight.T + bias``; formulas, options and result are
    its. How the logits are gone through is :func:`linear_token_logps`'s.

    Args:
        hidden: [2P, T, H]; chosen rows first. See :func:`linear_token_logps`, as for all arguments
            of its.
        weight: [V, H].
        labels: [2P, T] of an integer dtype; ``ignore_index`` at prompt and padding.
        bias: [V], or None.
        cu_seqlens: See :func:`linear_token_logps`.
        pairs: See :func:`simpo_loss`, as for all arguments not listed here.
        pair_weight: See :func:`simpo_loss`.
        preset: See :func:`simpo_loss`.
        beta: See :func:`simpo_loss`.
        gamma_beta_ratio: See :func:`simpo_loss`.
        gamma: See :func:`simpo_loss`.
        loss_type: See :func:`simpo_loss`.
        label_smoothing: See :func:`simpo_loss`.
        alpha: See :func:`simpo_loss`.
        sft_weight: See :func:`simpo_loss`.
        sft_reduction: See :func:`simpo_loss`.
        average_log_prob: See :func:`simpo_loss`.
        reduction: See :func:`simpo_loss`.
        normalizer: See :func:`simpo_loss`.
        empty: See :func:`simpo_loss`.
        ignore_index: See :func:`linear_token_logps`.
        shift: See :func:`linear_token_logps`.
        logit_scale: See :func:`linear_token_logps`.
        softcap: See :func:`linear_token_logps`.
        inplace_backward: Without effect, as there are no logits of the caller's to overwrite; taken
            so that options of :func:`simpo_loss` can be passed on.
        logits_budget_bytes: See :func:`linear_token_logps`.
        num_valid_tokens: See :func:`linear_token_logps`.
        report: See :func:`simpo_loss`. No logits of masked positions are formed for
            ``"logits_all"``, which follows from the means of ``hidden`` and ``weight``: these are
            read once more. Not with a softcap.

    Returns:
        A :class:`SimPOOutput`.

    Raises:
        TypeError: As :func:`linear_token_logps` and :func:`simpo_loss`.
        ValueError: As these.
        IndexError: As these.
    """
    hidden, labels, cu_seqlens = as_batch("hidden", hidden, labels, cu_seqlens)
    hidden, weight, labels, bias = _checked(hidden, weight, labels, bias)
    layout = resolve_layout("hidden", hidden, cu_seqlens, pairs, pair_weight)
    options = resolve_preference_options(
        preset=preset,
        beta=beta,
        gamma_beta_ratio=gamma_beta_ratio,
        gamma=gamma,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        alpha=alpha,
        sft_weight=sft_weight,
        sft_reduction=sft_reduction,
        average_log_prob=average_log_prob,
        reduction=reduction,
        empty=empty,
        ignore_index=ignore_index,
        shift=shift,
    )
    denominators = resolve_normalizer(normalizer, options)
    token_options = resolve_token_options(
        ignore_index=ignore_index, shift=options.shift, logit_scale=logit_scale, softcap=softcap
    )
    _checks.check_bool("inplace_backward", inplace_backward)
    budget, count = resolve_linear_options(logits_budget_bytes, num_valid_tokens)
    names = check_linear_report(report, softcap)
    targets, token_options = _ops.sequence_targets(
        labels, cu_seqlens, weight.shape[0], token_options
    )
    scored = _score(hidden, weight, bias, targets, token_options, budget, count, names)

    def loss(op_options: PreferenceOptions) -> _ops.PreferenceOutputs:
        out = _ops.preference_loss(scored.logps, targets, layout, op_options)
        if not names:
            return out
        return out._replace(mean_logit=scored.mean_logit, entropy=scored.entropy)

    return compose_output(
        options._replace(shift=token_options.shift),
        denominators,
        loss,
        Report(names, targets, layout, scored.all_mean_logits) if names else None,
    )
