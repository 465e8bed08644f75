"""The ops from logits to token log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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


@register_fake("token_logps")
def _fake_token_logps(
    logits: Tensor, labels: Tensor, *_options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    check_same_device(logits, labels)
    shape = logits.shape[:2]
    dtype = compute_dtype(logits.dtype)
    return (
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape, dtype=torch.float64),
    )


@register_fake("token_logps_report")
def _(logits: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, ...]:
    shape = logits.shape[:2]
    mean_logit = logits.new_empty(shape, dtype=torch.float64)
    entropy = logits.new_empty(shape, dtype=torch.float64)
    return *_fake_token_logps(logits, labels, *options), mean_logit, entropy


@register_fake("token_logps_backward")
def _(grad_logps: Tensor, logits: Tensor, *others: Any) -> Tensor:
    check_same_device(logits, grad_logps, *others[:3])  # labels, max, sum_exp
    return logits.new_empty(logits.shape)


@register_fake("token_logps_backward_")
def _(grad_logps: Tensor, logits: Tensor, *others: Any) -> None:
    check_same_device(logits, grad_logps, *others[:3])  # labels, max, sum_exp


def _setup(ctx: Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, *ctx.options = inputs
    _, row_max, sum_exp = output
    ctx.mark_non_differentiable(row_max, sum_exp)
    ctx.save_for_backward(logits, labels, row_max, sum_exp)


def _setup_report(ctx: Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, *ctx.options, _all_positions = inputs
    _, row_max, sum_exp, *report = output
    ctx.mark_non_differentiable(row_max, sum_exp, *report)
    ctx.save_for_backward(logits, labels, row_max, sum_exp)


def logits_gradient(
    grad_logps: Tensor,
    saved: Sequence[Tensor],  # logits, labels, max, sum_exp
    options: Sequence[Any],
) -> Tensor:
    """The gradient of the logits, in new memory."""
    dlogits: Tensor = ops.token_logps_backward.default(grad_logps, *saved, *options)
    return dlogits


def logits_gradient_in_place(
    grad_logps: Tensor, saved: Sequence[Tensor], options: Sequence[Any]
) -> Tensor:
    """The gradient of the logits, in the memory of the logits."""
    logits, *others = saved
    dlogits = logits.detach()
    ops.token_logps_backward_.default(grad_logps, dlogits, *others, *options)
    # Any other node that saved the logits now finds a newer version and raises an error.
    torch.autograd.graph.increment_version(logits)
    return dlogits


def _backward(ctx: Ctx, grad_logps: Tensor, *_: Tensor) -> tuple[Any, ...]:
    dlogits = logits_gradient(grad_logps, ctx.saved_tensors, ctx.options)
    return dlogits, *[None] * (1 + len(ctx.options))


def _backward_report(ctx: Ctx, *grads: Tensor) -> tuple[Any, ...]:
    return *_backward(ctx, *grads), None


register_autograd("token_logps", _backward, _setup)
register_autograd("token_logps_report", _backward_report, _setup_report)
register_autograd("token_logps_backward", no_double_backward)


class _TokenLogpsInplace(torch.autograd.Function):
    """token_logps whose backward overwrites the logits with their gradient."""

    @staticmethod
    def forward(
        ctx: Ctx,
        logits: Tensor,
        labels: Tensor,
        options: TokenOptions,
        all_positions: bool | None,
    ) -> tuple[Tensor, ...]:
        logps, row_max, sum_exp, *report = forward(logits, labels, options, all_positions)
        ctx.options = options
        ctx.mark_non_differentiable(*report)
        ctx.save_for_backward(logits, labels, row_max, sum_exp)
        return logps, *report

    @staticmethod
    def backward(ctx: Ctx, grad_logps: Tensor, *_: Tensor) -> tuple[Any, ...]:
        refuse_create_graph()
        dlogits = logits_gradient_in_place(grad_logps, ctx.saved_tensors, ctx.options)
        return dlogits, None, None, None


def token_logps(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    options: TokenOptions,
    inplace_backward: bool,
) -> Tensor:  # [B, T]
    """Log-probability of each position's label; 0 where it is masked."""
    logps, *_ = token_logps_report(logits, labels, options, inplace_backward, None)
    return logps


def token_logps_report(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    options: TokenOptions,
    inplace_backward: bool,
    all_positions: bool | None,
) -> tuple[Tensor, ...]:  # [B, T] each
    """token_logps and its report: mean_logit and entropy, float64, detached.

    Both are 0 at masked positions; with ``all_positions``, mean_logit is computed there, too. If
    ``all_positions`` is None, there is no report.
    """
    check_no_tangent(logits)
    # torch.compile plans a backward's memory, and does not let it change saved tensors.
    needs_gradient = torch.is_grad_enabled() and logits.requires_grad
    if inplace_backward and needs_gradient and not torch.compiler.is_compiling():
        outputs: tuple[Tensor, ...] = _TokenLogpsInplace.apply(  # type: ignore[no-untyped-call]
            logits, labels, options, all_positions
        )
        return outputs
    logps, _, _, *report = forward(logits, labels, options, all_positions)
    return logps, *report


def forward(
    logits: Tensor, labels: Tensor, options: TokenOptions, all_positions: bool | None
) -> tuple[Tensor, ...]:
    """The op's outputs: logps, max, sum_exp and, with a report, mean_logit and entropy."""
    outputs: tuple[Tensor, ...]
    if all_positions is None:
        outputs = call(ops.token_logps.default, logits, labels, *options)
    else:
        outputs = call(ops.token_logps_report.default, logits, labels, *options, all_positions)
    return outputs
