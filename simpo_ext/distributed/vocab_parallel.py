"""Log-probabilities of a vocabulary that is divided over ranks.

Public as part of :mod:`simpo_ext.distributed`.
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from .._calls import resolve_token_options
from .._inputs.batch import linear_batch, logits_batch
from .._inputs.checks import is_dtensor
from .._ops.sequences import sequence_targets
from .._ops.vocab import linear_token_logps_of_shards, token_logps_of_shards
from ..options import LinearKeywords, LogitsKeywords, takes
from .dtensor import VocabLayout, replicated
from .shard import VocabShard

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


@takes(LogitsKeywords)
def vocab_parallel_token_logps(
    logits: Tensor,  # [B, T, V_k]
    labels: Tensor,  # [B, T]
    shard: VocabShard | None = None,
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    **options: Unpack[LogitsKeywords],
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
        **options: See :class:`simpo_ext.options.LogitsKeywords`.

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
    call = resolve_token_options(LogitsKeywords, **options)
    if is_dtensor(logits):
        layout = VocabLayout("logits", logits, logits.dim() - 1, shard)
        layout.take_rows_of("logits", logits, call.tokens.shift, is_packed=cu_seqlens is not None)
        labels = layout.local_rows("labels", labels)
        logits, shard = layout.local("logits", logits), layout.shard
    else:
        labels = replicated("labels", labels)
    batch = logits_batch(logits, labels, cu_seqlens, call.inplace_backward)
    shard = _checked_shard(shard, "logits", batch.tokens.shape[2])
    targets, tokens = sequence_targets(
        batch.labels, batch.layout.cu_seqlens, shard.vocab_size, call.tokens
    )
    logps = token_logps_of_shards(batch.tokens, targets, shard, tokens, call.inplace_backward)
    return batch.as_given(logps)


@takes(LinearKeywords)
def vocab_parallel_linear_token_logps(
    hidden: Tensor,  # [B, T, H]
    weight: Tensor,  # [V_k, H]
    labels: Tensor,  # [B, T]
    shard: VocabShard | None = None,
    *,
    bias: Tensor | None = None,  # [V_k]
    cu_seqlens: Tensor | None = None,  # [S + 1]
    **options: Unpack[LinearKeywords],
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
        **options: See :class:`simpo_ext.options.LinearKeywords`.

    Returns:
        As :func:`vocab_parallel_token_logps`.

    Raises:
        TypeError: As :func:`simpo_ext.linear_token_logps` and :func:`vocab_parallel_token_logps`.
        ValueError: As these.
        IndexError: As these.
    """
    num_valid_tokens = options.pop("num_valid_tokens", None)
    call = resolve_token_options(LinearKeywords, **options).with_count(num_valid_tokens)
    if is_dtensor(weight):
        layout = VocabLayout("weight", weight, 0, shard)
        layout.check_replicated()
        if is_dtensor(hidden):
            is_packed = cu_seqlens is not None
            layout.take_rows_of("hidden", hidden, call.tokens.shift, is_packed=is_packed)
        hidden = layout.local_rows("hidden", hidden)
        labels = layout.local_rows("labels", labels)
        bias = None if bias is None else layout.local("bias", bias)
        weight, shard = layout.local("weight", weight), layout.shard
    else:
        hidden, labels = replicated("hidden", hidden), replicated("labels", labels)
    linear = linear_batch(hidden, weight, labels, bias, cu_seqlens)
    batch = linear.batch
    shard = _checked_shard(shard, "weights", linear.weight.shape[0])
    targets, tokens = sequence_targets(
        batch.labels, batch.layout.cu_seqlens, shard.vocab_size, call.tokens
    )
    logps = linear_token_logps_of_shards(
        batch.tokens,
        linear.weight,
        linear.bias,
        targets,
        shard,
        tokens,
        call.logits_budget_bytes,
        call.num_valid_tokens,
    )
    return batch.as_given(logps)
