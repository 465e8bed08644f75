"""The ops from hidden states and lm_head to token log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .logits_plan import bound_of_valid_tokens, budget_of_call, kept_logits_shape
from .records import TokenOptions, compute_dtype
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


def kept_logits(
    hidden: Tensor, weight: Tensor, logits_budget_bytes: int, num_valid_tokens: int
) -> Tensor:  # [K, R, C]
    """Fake: the logits that a forward keeps for its backward."""
    batch, time, _ = hidden.shape
    rows = batch * time if num_valid_tokens == -1 else num_valid_tokens
    shape = kept_logits_shape(
        rows, weight.shape[0], hidden.element_size(), logits_budget_bytes, hidden.device.type
    )
    return hidden.new_empty(shape)


@register_fake("linear_token_logps")
def _fake_linear_token_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_same_device(hidden, weight, bias, labels)
    kept = kept_logits(hidden, weight, *options[-2:])  # logits_budget_bytes, num_valid_tokens
    dtype = compute_dtype(hidden.dtype)
    rows = kept.shape[1:2]
    return (
        hidden.new_empty(hidden.shape[:2], dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=torch.float64),
        kept,
    )


@register_fake("linear_token_logps_report")
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    mean_logit = hidden.new_empty(labels.shape, dtype=torch.float64)
    entropy = hidden.new_empty(labels.shape, dtype=torch.float64)
    outputs = _fake_linear_token_logps(hidden, weight, bias, labels, *options)
    return *outputs, mean_logit, entropy


def fake_gradients(
    hidden: Tensor,
    weight: Tensor,
    needs: Sequence[bool],
    dhidden_shape: Sequence[int],
    dhidden_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fake: dhidden, dweight and dbias. Gradients that are not needed have shape [0]."""
    needs_hidden, needs_weight, needs_bias = needs
    nothing = hidden.new_empty((0,))
    return (
        hidden.new_empty(dhidden_shape, dtype=dhidden_dtype) if needs_hidden else nothing,
        hidden.new_empty(weight.shape if needs_weight else (0,)),
        hidden.new_empty(weight.shape[:1] if needs_bias else (0,)),
    )


@register_fake("linear_token_logps_backward")
def _(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    max: Tensor,
    sum_exp: Tensor,
    kept_logits: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    check_same_device(hidden, grad_logps, weight, bias, labels, max, sum_exp, kept_logits)
    return fake_gradients(hidden, weight, options[-3:], hidden.shape, hidden.dtype)


def _setup(ctx: Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, *ctx.options, _budget, _count = inputs
    _, row_max, sum_exp, kept, *report = output
    ctx.set_materialize_grads(False)  # avoids zeros of the size of kept_logits
    ctx.mark_non_differentiable(row_max, sum_exp, kept, *report)
    ctx.save_for_backward(hidden, weight, bias, labels, row_max, sum_exp, kept)


def _backward(ctx: Ctx, grad_logps: Tensor | None, *_: None) -> tuple[Any, ...]:
    refuse_create_graph()
    if grad_logps is None:
        return (None,) * 10
    needs = ctx.needs_input_grad[:3]
    grads = ops.linear_token_logps_backward.default(
        grad_logps, *ctx.saved_tensors, *ctx.options, *needs
    )
    return *wanted(grads, needs), *([None] * 7)


def wanted(grads: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Replaces the gradients that autograd does not need by None."""
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


for _name in ("linear_token_logps", "linear_token_logps_report"):
    register_autograd(_name, _backward, _setup)
register_autograd("linear_token_logps_backward", no_double_backward)


def linear_token_logps(
    hidden: Tensor,  # [B, T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [B, T]
    options: TokenOptions,
    logits_budget_bytes: int | None,
    num_valid_tokens: int | None,
    *,
    with_report: bool = False,
) -> tuple[Tensor, ...]:  # [B, T] each
    """token_logps of hidden @ weight.T + bias, then mean_logit and entropy if there is a report.

    The report is float64, detached, and 0 at masked positions.
    """
    check_no_tangent(hidden, weight, bias)
    op = ops.linear_token_logps_report if with_report else ops.linear_token_logps
    logps, _, _, _, *report = call(
        op.default,
        hidden,
        weight,
        bias,
        labels,
        *options,
        budget_of_call(logits_budget_bytes, hidden, weight, bias),
        bound_of_valid_tokens(labels, options.validity, num_valid_tokens),
    )
    return logps, *report
