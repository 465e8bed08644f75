"""SimPO as functions of hidden states and lm_head, without all logits in memory."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from typing_extensions import Unpack

from ._calls import TokenCall, resolve_loss_options, resolve_normalizer, resolve_token_options
from ._inputs.batch import LinearBatch, linear_batch
from ._metrics.output import Report, SimPOOutput, compose_output
from ._metrics.report import ReportName, mean_logits
from ._ops.linear import linear_token_logps as _linear_token_logps
from ._ops.preference_loss import preference_loss
from ._ops.records import LossOptions, LossOutputs
from ._ops.sequences import sequence_targets
from .options import LinearKeywords, LinearLossKeywords, takes

__all__ = ["linear_simpo_loss", "linear_token_logps"]


class ScoredTokens(NamedTuple):
    """Token log-probabilities [B, T], and what a report needs; None where it needs nothing."""

    logps: Tensor
    mean_logit: Tensor | None = None  # 0 where masked, like entropy
    entropy: Tensor | None = None
    all_mean_logits: Tensor | None = None  # also at masked positions


def score_tokens(
    linear: LinearBatch,
    targets: Tensor,  # [B, T]
    call: TokenCall,
    report: tuple[ReportName, ...] = (),
) -> ScoredTokens:
    """Computes the log-probabilities of targets, and the values of tokens for ``report``."""
    hidden, weight, bias = linear.batch.tokens, linear.weight, linear.bias
    scored = ScoredTokens(
        *_linear_token_logps(
            hidden,
            weight,
            bias,
            targets,
            call.tokens,
            call.logits_budget_bytes,
            call.num_valid_tokens,
            with_report="logits" in report or "entropy" in report,
        )
    )
    if "logits_all" not in report:
        return scored
    means = mean_logits(hidden, weight, bias, call.tokens.logit_scale)
    return scored._replace(all_mean_logits=means)


@takes(LinearKeywords)
def linear_token_logps(
    hidden: Tensor,  # [B, T, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [B, T]
    *,
    bias: Tensor | None = None,  # [V]
    cu_seqlens: Tensor | None = None,  # [S + 1]
    **options: Unpack[LinearKeywords],
) -> Tensor:  # [B, T]
    """Log-probability of each label, from hidden states and lm_head.

    The result is that of :func:`token_logps` for ``logits = hidden @ weight.T + bias``, rounded to
    the dtype of ``hidden``. The logits are never all in memory. Masked positions cost nothing,
    since the R valid positions are gathered first. The vocabulary is processed in chunks of at most
    4096 columns (8192 on a GPU). The budget limits how many chunks of logits are kept for the
    backward; the backward recomputes the others. If no gradient is needed, nothing is kept.

    Forward and backward cost 6 R V H operations, and 2 R V H more for logits that are not kept.
    Besides arguments and gradients, they need memory for the kept logits, at least one chunk, and
    for three arrays [R, H] (two on a GPU), one of them float32.

    Under ``torch.autocast``, ``hidden``, ``weight`` and ``bias`` are cast to its dtype, unless they
    are float64.

    Args:
        hidden: [B, T, H] float64, float32, bfloat16 or float16: the input of lm_head. Any strides;
            hidden states whose last dimension is not contiguous are copied.
        weight: [V, H] of the dtype of ``hidden``: the weight of lm_head. Any strides.
        labels: [B, T] of an integer dtype, each ``ignore_index`` or in [0, V).
        bias: [V] of the dtype of ``hidden``, or None.
        cu_seqlens: [S + 1], for packed hidden states [N, H] or [1, N, H] and labels [N] or [1, N]:
            see :func:`token_logps`.
        **options: See :class:`simpo_ext.options.LinearKeywords`.

    Returns:
        [B, T], or the shape of packed labels, float32 (float64 for float64 arguments). The entry at
        t belongs to the hidden state at t; it is 0 where masked.

    Raises:
        TypeError: An argument is of the wrong type, or a tensor of the wrong dtype or layout.
        ValueError: A shape, a device or a number does not fit, or CPU tensors have more valid
            tokens than ``num_valid_tokens``. On a GPU, the log-probabilities of the excess tokens
            are NaN.
        IndexError: See :func:`token_logps`, also for other errors.
    """
    num_valid_tokens = options.pop("num_valid_tokens", None)
    call = resolve_token_options(LinearKeywords, **options).with_count(num_valid_tokens)
    linear = linear_batch(hidden, weight, labels, bias, cu_seqlens)
    targets, tokens = sequence_targets(
        linear.batch.labels, linear.batch.layout.cu_seqlens, linear.weight.shape[0], call.tokens
    )
    scored = score_tokens(linear, targets, call._replace(tokens=tokens))
    return linear.batch.as_given(scored.logps)


@takes(LinearLossKeywords)
def linear_simpo_loss(
    hidden: Tensor,  # [2P, T, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [2P, T]
    *,
    bias: Tensor | None = None,  # [V]
    cu_seqlens: Tensor | None = None,  # [S + 1]
    pairs: Tensor | None = None,  # [P, 2]
    pair_weight: Tensor | None = None,  # [P]
    **options: Unpack[LinearLossKeywords],
) -> SimPOOutput:
    """SimPO's loss from hidden states and lm_head, without the logits in memory.

    Formula, options and result are those of :func:`simpo_loss` for ``logits = hidden @ weight.T +
    bias``. :func:`linear_token_logps` describes the chunks of logits and their memory.

    ``report`` with ``"logits_all"`` computes no logits of masked positions. It reads ``hidden`` and
    ``weight`` once more, for the mean row of ``weight``. It does not work with a softcap.

    Args:
        hidden: [2P, T, H]; chosen rows first. See :func:`linear_token_logps`.
        weight: [V, H].
        labels: [2P, T] of an integer dtype; ``ignore_index`` at prompt and padding.
        bias: [V], or None.
        cu_seqlens: See :func:`linear_token_logps`.
        pairs: See :func:`simpo_loss`.
        pair_weight: See :func:`simpo_loss`.
        **options: See :class:`simpo_ext.options.LinearLossKeywords`.

    Returns:
        A :class:`SimPOOutput`.

    Raises:
        TypeError: See :func:`linear_token_logps` and :func:`simpo_loss`.
        ValueError: See the same functions.
        IndexError: See the same functions.
    """
    normalizer = options.pop("normalizer", None)
    num_valid_tokens = options.pop("num_valid_tokens", None)
    call = resolve_loss_options(LinearLossKeywords, **options)
    denominators = resolve_normalizer(normalizer, call.loss)
    linear = linear_batch(hidden, weight, labels, bias, cu_seqlens)
    batch = linear.batch.paired(pairs, pair_weight)
    targets, tokens = sequence_targets(
        batch.labels, batch.layout.cu_seqlens, linear.weight.shape[0], call.tokens
    )
    token_call = TokenCall(tokens, False, call.logits_budget_bytes).with_count(num_valid_tokens)
    scored = score_tokens(linear, targets, token_call, call.report)

    def loss(loss_options: LossOptions) -> LossOutputs:
        out = preference_loss(scored.logps, targets, batch.layout, loss_options)
        return out._replace(mean_logit=scored.mean_logit, entropy=scored.entropy)

    report = (
        Report(call.report, targets, batch.layout, scored.all_mean_logits) if call.report else None
    )
    return compose_output(call.loss._replace(shift=tokens.shift), denominators, loss, report)
