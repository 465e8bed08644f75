"""The ops of a vocabulary in shards as PyTorch sees them, around the collectives of their caller.

:mod:`simpo_ext._ops` for the ops of a whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ._linear_ops import _bound_of_valid_tokens, _kept_logits_shape, budget_of_call
from ._ops import (
    Ctx,
    _call,
    _check_no_tangent,
    _check_same_device,
    _ops,
    _refuse_create_graph,
    _register_fake,
    compute_dtype,
)
from ._options import TokenOptions


class Shard(Protocol):
    """What is asked of a :class:`simpo_ext.distributed.VocabShard`."""

    @property
    def first_label(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def all_gather(self) -> Callable[[Tensor], Tensor]: ...
    @property
    def all_reduce(self) -> Callable[[Tensor], Tensor]: ...


def _gather(shard: Shard, tensor: Tensor) -> Tensor:
    gathered = shard.all_gather(tensor)
    if gathered.shape[1:] != tensor.shape:
        raise ValueError(
            f"shard.all_gather: expected [K, {', '.join(map(str, tensor.shape))}], got "
            f"{list(gathered.shape)}"
        )
    return gathered


def _reduce(shard: Shard, tensor: Tensor) -> Tensor:
    shape = list(tensor.shape)
    reduced = shard.all_reduce(tensor)
    if list(reduced.shape) != shape:
        raise ValueError(f"shard.all_reduce: expected {shape}, got {list(reduced.shape)}")
    return reduced


# ---- from logits ---------------------------------------------------------------------------------


@_register_fake("token_logps_shard")
def _(
    logits: Tensor,
    labels: Tensor,
    first_label: int,
    num_labels: int,
    ignore_index: int,
    shift: bool,
    logit_scale: float,
    softcap: float,
) -> Tensor:
    _check_same_device(logits, labels)
    return logits.new_empty((3, *logits.shape[:2]), dtype=torch.float64)


@_register_fake("token_logps_merge")
def _(
    shards: Tensor, labels: Tensor, ignore_index: int, shift: bool, float64: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_same_device(shards, labels)
    dtype = torch.float64 if float64 else torch.float32
    shape = labels.shape
    return (
        shards.new_empty(shape, dtype=dtype),
        shards.new_empty(shape, dtype=dtype),
        shards.new_empty(shape),
    )


@_register_fake("token_logps_shard_backward")
def _(
    grad_logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    max: Tensor,
    sum_exp: Tensor,
    first_label: int,
    num_labels: int,
    ignore_index: int,
    shift: bool,
    logit_scale: float,
    softcap: float,
) -> Tensor:
    _check_same_device(logits, grad_logps, labels, max, sum_exp)
    return logits.new_empty(logits.shape)


@_register_fake("token_logps_shard_backward_")
def _(
    grad_logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    max: Tensor,
    sum_exp: Tensor,
    first_label: int,
    num_labels: int,
    ignore_index: int,
    shift: bool,
    logit_scale: float,
    softcap: float,
) -> None:
    _check_same_device(logits, grad_logps, labels, max, sum_exp)


class _TokenLogpsOfShards(torch.autograd.Function):
    """token_logps of logits of which this rank has a shard: one all-gather forward, none back."""

    @staticmethod
    def forward(
        ctx: Ctx,
        logits: Tensor,
        labels: Tensor,
        shard: Shard,
        options: TokenOptions,
        inplace_backward: bool,
    ) -> Tensor:
        part = shard.first_label, shard.vocab_size
        stats = _call(_ops.token_logps_shard.default, logits, labels, *part, *options)
        logps: Tensor
        logps, row_max, sum_exp = _ops.token_logps_merge.default(
            _gather(shard, stats), labels, *options[:2], logits.dtype == torch.float64
        )
        ctx.options = *part, *options
        ctx.inplace_backward = inplace_backward
        ctx.save_for_backward(logits, labels, row_max, sum_exp)
        return logps

    @staticmethod
    def backward(ctx: Ctx, grad_logps: Tensor) -> tuple[Any, ...]:
        _refuse_create_graph()
        logits, *others = ctx.saved_tensors
        if not ctx.inplace_backward:
            dlogits = _ops.token_logps_shard_backward.default(
                grad_logps, logits, *others, *ctx.options
            )
        else:
            dlogits = logits.detach()
            _ops.token_logps_shard_backward_.default(grad_logps, dlogits, *others, *ctx.options)
            # As in _ops: who saved the logits' values finds a newer version and fails.
            torch.autograd.graph.increment_version(logits)
        return dlogits, None, None, None, None


def token_logps_of_shards(
    logits: Tensor,  # [B, T, V_k]
    labels: Tensor,  # [B, T]
    shard: Shard,
    options: TokenOptions,
    inplace_backward: bool,
) -> Tensor:  # [B, T]
    """Log-probability of each position's label, the same bits on every rank."""
    _check_no_tangent(logits)
    # As in _ops.token_logps.
    inplace = inplace_backward and not torch.compiler.is_compiling()
    logps: Tensor = _TokenLogpsOfShards.apply(  # type: ignore[no-untyped-call]
        logits, labels, shard, options, inplace
    )
    return logps


# ---- from hidden states --------------------------------------------------------------------------


@_register_fake("linear_token_logps_shard")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    first_label: int,
    num_labels: int,
    ignore_index: int,
    shift: bool,
    logit_scale: float,
    softcap: float,
    logits_budget_bytes: int,
    num_valid_tokens: int,
) -> tuple[Tensor, Tensor]:
    _check_same_device(hidden, weight, bias, labels)
    batch, time, _ = hidden.shape
    rows = batch * time if num_valid_tokens == -1 else num_valid_tokens
    kept = _kept_logits_shape(
        rows, weight.shape[0], hidden.element_size(), logits_budget_bytes, hidden.device.type
    )
    return hidden.new_empty((3, rows), dtype=torch.float64), hidden.new_empty(kept)


@_register_fake("linear_token_logps_merge")
def _(
    shards: Tensor, labels: Tensor, ignore_index: int, shift: bool, float64: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_same_device(shards, labels)
    dtype = torch.float64 if float64 else torch.float32
    rows = shards.shape[2]
    return (
        shards.new_empty(labels.shape, dtype=dtype),
        shards.new_empty((rows,), dtype=dtype),
        shards.new_empty((rows,)),
    )


@_register_fake("linear_token_logps_shard_backward")
def _(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    max: Tensor,
    sum_exp: Tensor,
    kept_logits: Tensor,
    first_label: int,
    num_labels: int,
    ignore_index: int,
    shift: bool,
    logit_scale: float,
    softcap: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_same_device(hidden, grad_logps, weight, bias, labels, max, sum_exp, kept_logits)
    rows = (max.shape[0], hidden.shape[2])
    dhidden_rows = (
        hidden.new_empty(rows, dtype=compute_dtype(hidden.dtype))
        if needs_hidden
        else hidden.new_empty((0,))
    )
    return (
        dhidden_rows,
        hidden.new_empty(weight.shape if needs_weight else (0,)),
        hidden.new_empty(weight.shape[:1] if needs_bias else (0,)),
    )


@_register_fake("linear_token_logps_dhidden")
def _(
    dhidden_rows: Tensor, hidden: Tensor, labels: Tensor, ignore_index: int, shift: bool
) -> Tensor:
    _check_same_device(hidden, dhidden_rows, labels)
    return hidden.new_empty(hidden.shape)


class _LinearTokenLogpsOfShards(torch.autograd.Function):
    """linear_token_logps with a shard of lm_head on this rank: one all-gather, one all-reduce."""

    @staticmethod
    def forward(
        ctx: Ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        shard: Shard,
        options: TokenOptions,
        logits_budget_bytes: int,
        num_valid_tokens: int,
    ) -> Tensor:
        part = shard.first_label, shard.vocab_size
        stats, kept_logits = _call(
            _ops.linear_token_logps_shard.default,
            hidden,
            weight,
            bias,
            labels,
            *part,
            *options,
            logits_budget_bytes,
            num_valid_tokens,
        )
        logps: Tensor
        logps, row_max, sum_exp = _ops.linear_token_logps_merge.default(
            _gather(shard, stats), labels, *options[:2], hidden.dtype == torch.float64
        )
        ctx.shard = shard
        ctx.options = *part, *options
        ctx.save_for_backward(hidden, weight, bias, labels, row_max, sum_exp, kept_logits)
        return logps

    @staticmethod
    def backward(ctx: Ctx, grad_logps: Tensor) -> tuple[Any, ...]:
        _refuse_create_graph()
        hidden, weight, bias, labels, *others = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        dhidden, dweight, dbias = _ops.linear_token_logps_shard_backward.default(
            grad_logps, hidden, weight, bias, labels, *others, *ctx.options, *needs
        )
        if needs[0]:
            dhidden = _ops.linear_token_logps_dhidden.default(
                _reduce(ctx.shard, dhidden), hidden, labels, *ctx.options[2:4]
            )
        asked_for = (
            grad if need else None
            for grad, need in zip((dhidden, dweight, dbias), needs, strict=True)
        )
        return *asked_for, *([None] * 5)


def linear_token_logps_of_shards(
    hidden: Tensor,  # [B, T, H]
    weight: Tensor,  # [V_k, H]
    bias: Tensor | None,  # [V_k]
    labels: Tensor,  # [B, T]
    shard: Shard,
    options: TokenOptions,
    logits_budget_bytes: int | None,
    num_valid_tokens: int | None,
) -> Tensor:  # [B, T]
    """token_logps_of_shards of the logits hidden @ weight.T + bias."""
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    for tensor in inputs:
        _check_no_tangent(tensor)
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    logps: Tensor = _LinearTokenLogpsOfShards.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        bias,
        labels,
        shard,
        options,
        budget_of_call(logits_budget_bytes, hidden.device, needs_gradient),
        _bound_of_valid_tokens(labels, options, num_valid_tokens),
    )
    return logps


# ---- gradients of the ops alone ------------------------------------------------------------------


def _no_gradient_of_its_own(*_: object) -> None:
    raise RuntimeError(
        "the ops of a vocabulary in shards have no gradient of their own: call them in a "
        "torch.autograd.Function, whose backward is token_logps_shard_backward"
    )


for _name in (
    "token_logps_shard",
    "token_logps_merge",
    "token_logps_shard_backward",
    "linear_token_logps_shard",
    "linear_token_logps_merge",
    "linear_token_logps_shard_backward",
    "linear_token_logps_dhidden",
):
    torch.library.register_autograd(f"simpo_ext::{_name}", _no_gradient_of_its_own)
