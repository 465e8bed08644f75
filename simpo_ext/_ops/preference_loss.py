"""The op from token log-probabilities to the preference loss and its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .records import ENUMS, METRIC_NAMES, Layout, LossOptions, LossOutputs, gradient_arguments
from .registry import (
    Ctx,
    call,
    check_no_tangent,
    check_same_device,
    no_double_backward,
    ops,
    refuse_create_graph,
    register_autograd,
    register_fake,
)
from .sequences import num_sequences

_REDUCTION = LossOptions._fields.index("reduction")
_NO_REDUCTION = ENUMS["reduction"].index("none")


@register_fake("preference_loss")
def _(
    token_logps: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    pairs: Tensor | None,
    pair_weight: Tensor | None,
    *options: Any,
) -> Sequence[Tensor]:
    check_same_device(token_logps, labels, cu_seqlens, pairs, pair_weight)
    sequences = num_sequences(token_logps, cu_seqlens)
    num_pairs = sequences // 2 if pairs is None else pairs.shape[0]
    reduced = (num_pairs,) if options[_REDUCTION] == _NO_REDUCTION else ()
    new_empty = token_logps.new_empty
    return (
        new_empty(reduced),
        new_empty((num_pairs,)),
        new_empty((2 * num_pairs,)),
        new_empty((2 * num_pairs,)),
        new_empty(reduced),
        new_empty((len(METRIC_NAMES),), dtype=torch.float64),
        new_empty((2 * num_pairs,)),  # slopes
        new_empty((sequences,), dtype=torch.int64),  # counts
    )


@register_fake("preference_loss_backward")
def _(
    grad_loss: Tensor | None,
    grad_losses: Tensor | None,
    grad_logps: Tensor | None,
    grad_sft_loss: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    pairs: Tensor | None,
    pair_weight: Tensor | None,
    slopes: Tensor,
    counts: Tensor,
    *_options: Any,
) -> Tensor:
    grads = (grad_loss, grad_losses, grad_logps, grad_sft_loss)
    check_same_device(slopes, labels, cu_seqlens, pairs, pair_weight, counts, *grads)
    return slopes.new_empty(labels.shape)


def _setup(ctx: Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, labels, cu_seqlens, pairs, pair_weight, *ctx.arguments = inputs
    _, _, _, rewards, _, metrics, slopes, counts = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rewards, metrics, slopes, counts)
    ctx.save_for_backward(labels, cu_seqlens, pairs, pair_weight, slopes, counts)


def token_logps_gradient(
    grads: Sequence[Tensor | None],  # of LossOutputs, and possibly more
    saved: Sequence[Tensor | None],  # labels, the fields of a Layout, slopes, counts
    arguments: Sequence[Any],  # of the forward op
) -> Tensor:
    """The gradient of the token log-probabilities."""
    refuse_create_graph()
    grad_loss, grad_losses, grad_logps, _, grad_sft_loss, *_ = grads
    grad_token_logps: Tensor = ops.preference_loss_backward.default(
        grad_loss, grad_losses, grad_logps, grad_sft_loss, *saved, *gradient_arguments(arguments)
    )
    return grad_token_logps


def _backward(ctx: Ctx, *grads: Tensor | None) -> tuple[Any, ...]:
    gradient = token_logps_gradient(grads, ctx.saved_tensors, ctx.arguments)
    return gradient, *[None] * (4 + len(ctx.arguments))


register_autograd("preference_loss", _backward, _setup)
register_autograd("preference_loss_backward", no_double_backward)


def preference_loss(
    token_logps: Tensor,  # [B, T]
    labels: Tensor,  # [B, T]
    layout: Layout,
    options: LossOptions,
) -> LossOutputs:
    """The preference loss of token log-probabilities, and its other outputs."""
    check_no_tangent(token_logps)
    *out, _slopes, _counts = forward(token_logps, labels, layout, options.arguments)
    return LossOutputs(*out)


def forward(
    token_logps: Tensor, labels: Tensor, layout: Layout, arguments: Sequence[Any]
) -> Sequence[Tensor]:
    """The op's outputs: LossOutputs, slopes and counts."""
    outputs: Sequence[Tensor] = call(
        ops.preference_loss.default, token_logps, labels, *layout, *arguments
    )
    return outputs
