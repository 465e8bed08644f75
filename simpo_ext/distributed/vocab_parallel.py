"""Log-probabilities from logits or an lm_head that are sharded over the vocabulary.

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
    """Checks that ``shard`` is a VocabShard for the ``columns`` labels of ``name``."""
    if not isinstance(shard, VocabShard):
        raise TypeError(
            f"shard: expected a VocabShard with a plain tensor for {name} (see "
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
    """Computes :func:`simpo_ext.token_logps` from logits that are sharded over the vocabulary.

    The forward exchanges three float64 numbers for each token, in one step. The backward exchanges
    nothing. Every rank gets the same bits. They differ from the result for unsharded logits only by
    rounding.

    Args:
        logits: [B, T, V_k], this rank's shard. V_k may differ between ranks and may be 0. Or a
            DTensor [B, T, V] whose vocabulary is sharded over one dimension of its mesh. Other mesh
            dimensions may shard its batch, and each rank then gets the result of its sequences.
        labels: [B, T], labels of the whole vocabulary, the same on every rank. Or a DTensor that is
            replicated over the mesh dimension of the vocabulary, with the placements of ``logits``
            over the others.
        shard: The labels of this rank, and the collectives. None with a DTensor.
        cu_seqlens: See :func:`simpo_ext.token_logps`; the same on every rank. With ``cu_seqlens``,
            the rows of a DTensor must not be sharded.
        **options: See :class:`simpo_ext.options.LogitsKeywords`.

    Returns:
        [B, T] float32 (float64 for float64 logits), a plain tensor; 0 at masked positions, and NaN
        at positions whose label differs between ranks.

    Raises:
        TypeError: See :func:`simpo_ext.token_logps`; or ``logits`` is a plain tensor and ``shard``
            is None.
        ValueError: See :func:`simpo_ext.token_logps`; or the placements of a DTensor do not fit; or
            V_k does not fit ``shard``; or ranks have different B or T (see
            :meth:`VocabShard.of_group`).
        IndexError: See :func:`simpo_ext.token_logps`. The same holds for all other errors.
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
    """Computes :func:`simpo_ext.linear_token_logps` with an lm_head sharded over the vocabulary.

    The forward exchanges three float64 numbers for each scored token. The backward adds up the
    ranks' gradients of the scored tokens' hidden states, [R, H] float32 (float64 for float64
    arguments), and rounds the sum once. Every rank gets the same bits of both. The gradients of
    ``weight`` and ``bias`` need no exchange.

    Args:
        hidden: [B, T, H], the same on every rank. Its gradient is already the sum over the ranks:
            do not reduce it again. Or a DTensor that is replicated over the mesh dimension of the
            vocabulary.
        weight: [V_k, H], this rank's rows of lm_head. Or a DTensor [V, H], ``Shard(0)`` over one
            dimension of its mesh and replicated over the others. Its gradient has the same
            placements, with one exception: it is ``Partial`` over a mesh dimension that shards the
            batch of a DTensor ``hidden``.
        labels: [B, T], labels of the whole vocabulary, the same on every rank. Or a DTensor with
            the placements of ``hidden``.
        shard: See :func:`vocab_parallel_token_logps`.
        bias: [V_k], or a DTensor with the placements of ``weight``, or None.
        cu_seqlens: See :func:`vocab_parallel_token_logps`.
        **options: See :class:`simpo_ext.options.LinearKeywords`.

    Returns:
        See :func:`vocab_parallel_token_logps`.

    Raises:
        TypeError: See :func:`simpo_ext.linear_token_logps` and :func:`vocab_parallel_token_logps`.
        ValueError: See the same functions.
        IndexError: See the same functions.
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
    shard = _checked_shard(shard, "weight", linear.weight.shape[0])
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
