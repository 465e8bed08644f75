"""The ops from hidden states and lm_head as PyTorch sees them; :mod:`simpo_ext._ops` for others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._ops import (
    Ctx,
    _call,
    _check_no_tangent,
    _check_same_device,
    _no_double_backward,
    _ops,
    _refuse_create_graph,
    _register_fake,
    compute_dtype,
    is_plain_call,
)
from ._options import TokenOptions, default_logits_budget

# Of numbers that a compiler may hold as symbols, without a guard on their order.
_sym_max: Callable[[int, int], int] = torch.sym_max
_sym_min: Callable[[int, int], int] = torch.sym_min

# kChunkColumns of the devices in csrc/ops.
_CHUNK_COLUMNS = {"cpu": 4096, "cuda": 8192}
_CHUNK_ALIGNMENT = 64


def _kept_logits_shape(
    rows: int, vocabulary: int, element_size: int, budget_bytes: int, device_type: str
) -> tuple[int, int, int]:
    """LogitsPlan in csrc/ops/linear_ops.h."""
    columns = _CHUNK_COLUMNS.get(device_type, _CHUNK_COLUMNS["cpu"])
    chunks = -(-vocabulary // columns)
    width = 0 if chunks == 0 else -(-vocabulary // chunks)
    width = -(-width // _CHUNK_ALIGNMENT) * _CHUNK_ALIGNMENT
    chunk_bytes = _sym_max(rows * width * element_size, 1)
    kept = _sym_min(_sym_max(budget_bytes // chunk_bytes - 1, 0), chunks)
    return kept, rows, width


@_register_fake("linear_token_logps")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    shift: bool,
    logit_scale: float,
    softcap: float,
    logits_budget_bytes: int,
    num_valid_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_linear_token_logps(
        hidden, weight, bias, labels, logits_budget_bytes, num_valid_tokens
    )


def _fake_linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logits_budget_bytes: int,
    num_valid_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_same_device(hidden, weight, bias, labels)
    batch, time, _ = hidden.shape
    rows = batch * time if num_valid_tokens == -1 else num_valid_tokens
    kept = _kept_logits_shape(
        rows, weight.shape[0], hidden.element_size(), logits_budget_bytes, hidden.device.type
    )
    dtype = compute_dtype(hidden.dtype)
    return (
        hidden.new_empty((batch, time), dtype=dtype),
        hidden.new_empty((rows,), dtype=dtype),
        hidden.new_empty((rows,), dtype=torch.float64),
        hidden.new_empty(kept),
    )


@_register_fake("linear_token_logps_report")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    shift: bool,
    logit_scale: float,
    softcap: float,
    logits_budget_bytes: int,
    num_valid_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        *_fake_linear_token_logps(
            hidden, weight, bias, labels, logits_budget_bytes, num_valid_tokens
        ),
        hidden.new_empty(labels.shape, dtype=torch.float64),
        hidden.new_empty(labels.shape, dtype=torch.float64),
    )


@_register_fake("linear_token_logps_backward")
def _(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    max: Tensor,
    sum_exp: Tensor,
    kept_logits: Tensor,
    ignore_index: int,
    shift: bool,
    logit_scale: float,
    softcap: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_same_device(hidden, grad_logps, weight, bias, labels, max, sum_exp, kept_logits)
    return (
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        hidden.new_empty(weight.shape if needs_weight else (0,)),
        hidden.new_empty(weight.shape[:1] if needs_bias else (0,)),
    )


def _linear_setup(ctx: Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, *options, _, _ = inputs
    _, row_max, sum_exp, kept_logits, *report = output
    ctx.options = options
    ctx.set_materialize_grads(False)  # which would make zeros of the size of kept_logits
    ctx.mark_non_differentiable(row_max, sum_exp, kept_logits, *report)
    ctx.save_for_backward(hidden, weight, bias, labels, row_max, sum_exp, kept_logits)


def _linear_backward(ctx: Ctx, grad_logps: Tensor | None, *_: None) -> tuple[Any, ...]:
    _refuse_create_graph()
    if grad_logps is None:
        return (None,) * 10
    needs = ctx.needs_input_grad[:3]
    grads = _ops.linear_token_logps_backward.default(
        grad_logps, *ctx.saved_tensors, *ctx.options, *needs
    )
    asked_for = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return *asked_for, *([None] * 7)


for name in ("linear_token_logps", "linear_token_logps_report"):
    torch.library.register_autograd(
        f"simpo_ext::{name}", _linear_backward, setup_context=_linear_setup
    )
torch.library.register_autograd("simpo_ext::linear_token_logps_backward", _no_double_backward)


def linear_token_logps(
    hidden: Tensor,  # [B, T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [B, T]
    options: TokenOptions,
    logits_budget_bytes: int | None,
    num_valid_tokens: int | None,
) -> Tensor:  # [B, T]
    """token_logps of the logits hidden @ weight.T + bias."""
    logps, *_ = _call_linear_token_logps(
        _ops.linear_token_logps.default,
        hidden,
        weight,
        bias,
        labels,
        options,
        logits_budget_bytes,
        num_valid_tokens,
    )
    return logps


def linear_token_logps_report(
    hidden: Tensor,  # [B, T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [B, T]
    options: TokenOptions,
    logits_budget_bytes: int | None,
    num_valid_tokens: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, T] each
    """linear_token_logps, mean_logit and entropy; the latter float64, detached, 0 where masked."""
    logps, _, _, _, mean_logit, entropy = _call_linear_token_logps(
        _ops.linear_token_logps_report.default,
        hidden,
        weight,
        bias,
        labels,
        options,
        logits_budget_bytes,
        num_valid_tokens,
    )
    return logps, mean_logit, entropy


def _call_linear_token_logps(
    op: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    options: TokenOptions,
    logits_budget_bytes: int | None,
    num_valid_tokens: int | None,
) -> tuple[Tensor, ...]:
    for tensor in (hidden, weight, bias):
        if tensor is not None:
            _check_no_tangent(tensor)
    needs_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    outputs: tuple[Tensor, ...] = _call(
        op,
        hidden,
        weight,
        bias,
        labels,
        *options,
        budget_of_call(logits_budget_bytes, hidden.device, needs_gradient),
        _bound_of_valid_tokens(labels, options, num_valid_tokens),
    )
    return outputs


def budget_of_call(given: int | None, device: torch.device, needs_gradient: bool) -> int:
    """The op's ``logits_budget_bytes``: without a backward to come, nothing is kept for one."""
    if not needs_gradient:
        return 0
    return default_logits_budget(device) if given is None else given


def _bound_of_valid_tokens(labels: Tensor, options: TokenOptions, given: int | None) -> int:
    """Their number, unless counting would wait for what must not be waited for."""
    scored = labels[:, 1:] if options.shift else labels
    most = scored.numel()
    if given is not None:
        return min(given, most)
    if labels.is_meta or not is_plain_call(labels):
        return most
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return most
    return int(torch.count_nonzero(scored != options.ignore_index))
