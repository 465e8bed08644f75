"""The ops for sequences: targets of packed tokens, sums and counts of sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .records import TokenOptions, Validity
from .registry import (
    Ctx,
    call,
    check_same_device,
    no_double_backward,
    ops,
    register_autograd,
    register_fake,
)


@register_fake("sequence_targets")
def _(labels: Tensor, cu_seqlens: Tensor, *_options: Any) -> Tensor:
    check_same_device(labels, cu_seqlens)
    return labels.new_empty(labels.shape)


def sequence_targets(
    labels: Tensor,  # [1, N]
    cu_seqlens: Tensor | None,  # [S + 1]
    num_labels: int,
    options: TokenOptions,
) -> tuple[Tensor, TokenOptions]:  # [1, N]
    """The label that each packed position is scored with, and the options for these labels.

    Without ``cu_seqlens``, both are returned unchanged.
    """
    if cu_seqlens is None:
        return labels, options
    op = ops.sequence_targets.default
    targets = call(op, labels, cu_seqlens, num_labels, *options.validity)
    return targets, options._replace(shift=False)


def num_sequences(tokens: Tensor, cu_seqlens: Tensor | None) -> int:
    """S, the number of sequences in tokens [B, T, ...]."""
    return tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


@register_fake("sequence_logps")
def _(
    token_logps: Tensor, labels: Tensor, cu_seqlens: Tensor | None, *_options: Any
) -> tuple[Tensor, Tensor]:
    check_same_device(token_logps, labels, cu_seqlens)
    shape = (num_sequences(token_logps, cu_seqlens),)
    return token_logps.new_empty(shape), token_logps.new_empty(shape, dtype=torch.int64)


@register_fake("sequence_logps_backward")
def _(
    grad_logps: Tensor, labels: Tensor, cu_seqlens: Tensor | None, counts: Tensor, *_options: Any
) -> Tensor:
    check_same_device(grad_logps, labels, cu_seqlens, counts)
    return grad_logps.new_empty(labels.shape)


def _setup(ctx: Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, labels, cu_seqlens, *ctx.options = inputs
    _, counts = output
    ctx.save_for_backward(labels, cu_seqlens, counts)


def _backward(ctx: Ctx, grad_logps: Tensor, _grad_counts: Tensor) -> tuple[Any, ...]:
    grad = ops.sequence_logps_backward.default(grad_logps, *ctx.saved_tensors, *ctx.options)
    return grad, *[None] * (2 + len(ctx.options))


register_autograd("sequence_logps", _backward, _setup)
register_autograd("sequence_logps_backward", no_double_backward)


def sequence_logps(
    token_logps: Tensor,  # [B, T]
    labels: Tensor,  # [B, T]
    cu_seqlens: Tensor | None,  # [S + 1]
    validity: Validity,
    average_log_prob: bool,
) -> tuple[Tensor, Tensor]:  # [S], [S] int64
    """Sum or mean of the valid tokens' log-probabilities, NaN if there are none, and their number.

    The sequences are those of ``cu_seqlens``, or the rows.
    """
    op = ops.sequence_logps.default
    logps, counts = call(op, token_logps, labels, cu_seqlens, *validity, average_log_prob)
    return logps, counts
