"""Log-probabilities of a vocabulary that is divided over ranks.

Public as part of :mod:`simpo_ext.distributed`.
"""

from __future__ import annotations

from torch import Tensor

from . import _checks, _linear, _ops, _vocab_ops
from ._layout import as_batch
from ._options import resolve_linear_options, resolve_token_options
from ._vocab_dtensor import VocabLayout, replicated
from ._vocab_shard import VocabShard

__all__ = ["VocabShard", "vocab_parallel_linear_token_logps", "vocab_parallel_token_logps"]


def _checked_shard(shard: object, name: str, columns: int) -> VocabShard:
    """A shard that ``columns`` of the vocabulary, those of ``name``, belong to."""
    if not isinstance(shard, VocabShard):
        raise TypeError(
            f"shard: expected a VocabShard beside {name} that are no DTensor (see "
            f"simpo_ext.distributed.VocabShard.of_group), got {type(shard).__name__}"
        )
    shard.check(columns)
    return shard


def vocab_parallel_token_logps(
    logits: Tensor,  # [B, T, V_k]
    labels: Tensor,  # [B, T]
    shard: VocabShard | None = None,
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    ignore_index: int = -100,
    shift: bool = True,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> Tensor:  # [B, T]
    """:func:`simpo_ext.token_logps` of logits of whose vocabulary each rank has a part.

    Ranks exchange three float64 numbers of each token, once, in the forward; the gradient of a
    rank's logits needs no exchange. Every rank gets the same bits, and they differ from those of
    the whole vocabulary by rounding alone.

    Args:
        logits: [B, T, V_k], this rank's part; or a DTensor [B, T, V] whose vocabulary is sharded
            over one dimension of its mesh. Over others its batch may be sharded, and what is
            returned is then that of this rank's sequences. V_k may differ between ranks, and be 0.
        labels: [B, T], of the whole vocabulary, the same on every rank; or a DTensor that is
            replicated where the vocabulary is sharded, and else laid out as ``logits``.
        shard: Which labels this rank has, and how it reaches the others; None with a DTensor, which
            says so itself.
        cu_seqlens: See :func:`simpo_ext.token_logps`; the same on every rank. Packed rows of
            DTensors must not be sharded.
        ignore_index: See :func:`simpo_ext.token_logps`.
        shift: See :func:`simpo_ext.token_logps`.
        logit_scale: See :func:`simpo_ext.token_logps`.
        softcap: See :func:`simpo_ext.token_logps`.
        inplace_backward: See :func:`simpo_ext.token_logps`.

    Returns:
        [B, T] float32 (float64 for float64 logits), a plain tensor; 0 where masked. NaN where
        ranks disagree on the label.

    Raises:
        TypeError: As :func:`simpo_ext.token_logps`; or plain ``logits`` came without a ``shard``.
        ValueError: As :func:`simpo_ext.token_logps`; or the layout of a DTensor does not fit,
            ``logits`` are not those of ``shard``, or ranks disagree on B and T (see
            :meth:`VocabShard.of_group`).
        IndexError: As :func:`simpo_ext.token_logps`, as are all errors not listed here.
    """
    if _checks.is_dtensor(logits):
        layout = VocabLayout("logits", logits, logits.dim() - 1, shard)
        layout.take_rows_of("logits", logits, shift, is_packed=cu_seqlens is not None)
        labels = layout.local_rows("labels", labels)
        logits, shard = layout.local("logits", logits), layout.shard
    else:
        labels = replicated("labels", labels)
    shape = labels.shape if cu_seqlens is not None else None
    logits, labels, cu_seqlens = as_batch("logits", logits, labels, cu_seqlens)
    logits, labels = _checks.check_logits_and_labels(logits, labels)
    shard = _checked_shard(shard, "logits", logits.shape[2])
    options = resolve_token_options(
        ignore_index=ignore_index, shift=shift, logit_scale=logit_scale, softcap=softcap
    )
    _checks.check_inplace_backward(inplace_backward, logits)
    targets, options = _ops.sequence_targets(labels, cu_seqlens, shard.vocab_size, options)
    logps = _vocab_ops.token_logps_of_shards(logits, targets, shard, options, inplace_backward)
    return logps if shape is None else logps.view(shape)


def vocab_parallel_linear_token_logps(
    hidden: Tensor,  # [B, T, H]
    weight: Tensor,  # [V_k, H]
    labels: Tensor,  # [B, T]
    shard: VocabShard | None = None,
    *,
    bias: Tensor | None = None,  # [V_k]
    cu_seqlens: Tensor | None = None,  # [S + 1]
    ignore_index: int = -100,
    shift: bool = True,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    logits_budget_bytes: int | None = None,
    num_valid_tokens: int | None = None,
) -> Tensor:  # [B, T]
    """:func:`simpo_ext.linear_token_logps` with an lm_head of which each rank has a part.

    Ranks exchange three float64 numbers of each valid token in the forward and, in the backward,
    add up the gradients of the valid tokens' hidden states: [R, H] float32 (float64 for float64
    arguments), which are rounded once, after that. Every rank gets the same bits of both. Gradients
    of ``weight`` and ``bias`` need no exchange.

    Args:
        hidden: [B, T, H], the same on every rank; its gradient is that of all ranks' logits
            together, so that it must not be added up once more. Or a DTensor that is replicated
            where the vocabulary is sharded.
        weight: [V_k, H], this rank's rows of lm_head; or a DTensor [V, H], ``Shard(0)`` over one
            dimension of its mesh and replicated over others. Its gradient has the same layout; if
            the batch of ``hidden``, a DTensor, is sharded over one of the others, it is ``Partial``
            there.
        labels: [B, T], of the whole vocabulary, the same on every rank; or a DTensor laid out as
            ``hidden``.
        shard: See :func:`vocab_parallel_token_logps`.
        bias: [V_k], or a DTensor sharded as ``weight``, or None.
        cu_seqlens: See :func:`vocab_parallel_token_logps`.
        ignore_index: See :func:`simpo_ext.token_logps`.
        shift: See :func:`simpo_ext.token_logps`.
        logit_scale: See :func:`simpo_ext.token_logps`.
        softcap: See :func:`simpo_ext.token_logps`.
        logits_budget_bytes: See :func:`simpo_ext.linear_token_logps`; of each rank.
        num_valid_tokens: See :func:`simpo_ext.linear_token_logps`; the same on every rank.

    Returns:
        As :func:`vocab_parallel_token_logps`.

    Raises:
        TypeError: As :func:`simpo_ext.linear_token_logps` and :func:`vocab_parallel_token_logps`.
        ValueError: As these.
        IndexError: As these.
    """
    if _checks.is_dtensor(weight):
        layout = VocabLayout("weight", weight, 0, shard)
        layout.check_replicated()
        if _checks.is_dtensor(hidden):
            layout.take_rows_of("hidden", hidden, shift, is_packed=cu_seqlens is not None)
        hidden = layout.local_rows("hidden", hidden)
        labels = layout.local_rows("labels", labels)
        bias = None if bias is None else layout.local("bias", bias)
        weight, shard = layout.local("weight", weight), layout.shard
    else:
        hidden, labels = replicated("hidden", hidden), replicated("labels", labels)
    shape = labels.shape if cu_seqlens is not None else None
    hidden, labels, cu_seqlens = as_batch("hidden", hidden, labels, cu_seqlens)
    hidden, weight, labels, bias = _linear._checked(hidden, weight, labels, bias)
    shard = _checked_shard(shard, "weights", weight.shape[0])
    options = resolve_token_options(
        ignore_index=ignore_index, shift=shift, logit_scale=logit_scale, softcap=softcap
    )
    budget, count = resolve_linear_options(logits_budget_bytes, num_valid_tokens)
    targets, options = _ops.sequence_targets(labels, cu_seqlens, shard.vocab_size, options)
    logps = _vocab_ops.linear_token_logps_of_shards(
        hidden, weight, bias, targets, shard, options, budget, count
    )
    return logps if shape is None else logps.view(shape)
