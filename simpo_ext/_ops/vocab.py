"""The ops for a sharded vocabulary, combined with the caller's collectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .linear import fake_gradients, kept_logits, wanted
from .logits_plan import bound_of_valid_tokens, budget_of_call
from .records import TokenOptions, Validity, compute_dtype
from .registry import (
    Ctx,
    call,
    check_no_tangent,
    check_same_device,
    ops,
    refuse_create_graph,
    register_autograd,
    register_fake,
)


class Shard(Protocol):
    """The members of :class:`simpo_ext.distributed.VocabShard` that the ops need."""

    @property
    def first_label(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def all_gather(self) -> Callable[[Tensor], Tensor]: ...
    @property
    def all_reduce(self) -> Callable[[Tensor], Tensor]: ...


class ShardOptions(NamedTuple):
    """The trailing arguments of the ops that read a shard."""

    first_label: int
    num_labels: int
    ignore_index: int
    shift: bool
    logit_scale: float
    softcap: float

    @property
    def validity(self) -> Validity:
        """The options that say which positions are scored."""
        return Validity(self.ignore_index, self.shift)


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


def _fake_merged(
    shards: Tensor, labels: Tensor, rows: Sequence[int], float64: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Fake: logps in the shape of labels, max and sum_exp in the shape ``rows``."""
    check_same_device(shards, labels)
    dtype = torch.float64 if float64 else torch.float32
    return (
        shards.new_empty(labels.shape, dtype=dtype),
        shards.new_empty(rows, dtype=dtype),
        shards.new_empty(rows),
    )


# ---- from logits ---------------------------------------------------------------------------------


@register_fake("token_logps_shard")
def _(logits: Tensor, labels: Tensor, *_options: Any) -> Tensor:
    check_same_device(logits, labels)
    return logits.new_empty((3, *logits.shape[:2]), dtype=torch.float64)


@register_fake("token_logps_merge")
def _(
    shards: Tensor, labels: Tensor, ignore_index: int, shift: bool, float64: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_merged(shards, labels, labels.shape, float64)


@register_fake("token_logps_shard_backward")
def _(grad_logps: Tensor, logits: Tensor, *others: Any) -> Tensor:
    check_same_device(logits, grad_logps, *others[:3])  # labels, max, sum_exp
    return logits.new_empty(logits.shape)


@register_fake("token_logps_shard_backward_")
def _(grad_logps: Tensor, logits: Tensor, *others: Any) -> None:
    check_same_device(logits, grad_logps, *others[:3])  # labels, max, sum_exp


class _TokenLogpsOfShards(torch.autograd.Function):
    """token_logps of this rank's shard of logits. The forward gathers, the backward does not."""

    @staticmethod
    def forward(
        ctx: Ctx,
        logits: Tensor,
        labels: Tensor,
        shard: Shard,
        options: TokenOptions,
        inplace_backward: bool,
    ) -> Tensor:
        ctx.options = ShardOptions(shard.first_label, shard.vocab_size, *options)
        stats = call(ops.token_logps_shard.default, logits, labels, *ctx.options)
        logps: Tensor
        logps, row_max, sum_exp = ops.token_logps_merge.default(
            _gather(shard, stats), labels, *options.validity, logits.dtype == torch.float64
        )
        ctx.inplace_backward = inplace_backward
        ctx.save_for_backward(logits, labels, row_max, sum_exp)
        return logps

    @staticmethod
    def backward(ctx: Ctx, grad_logps: Tensor) -> tuple[Any, ...]:
        refuse_create_graph()
        logits, *others = ctx.saved_tensors
        if not ctx.inplace_backward:
            dlogits = ops.token_logps_shard_backward.default(
                grad_logps, logits, *others, *ctx.options
            )
        else:
            dlogits = logits.detach()
            ops.token_logps_shard_backward_.default(grad_logps, dlogits, *others, *ctx.options)
            # As in token_logps.py: other nodes that saved the logits raise an error.
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
    check_no_tangent(logits)
    # As in token_logps.py: a compiled backward must not change saved tensors.
    inplace = inplace_backward and not torch.compiler.is_compiling()
    logps: Tensor = _TokenLogpsOfShards.apply(  # type: ignore[no-untyped-call]
        logits, labels, shard, options, inplace
    )
    return logps


# ---- from hidden states --------------------------------------------------------------------------


@register_fake("linear_token_logps_shard")
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    check_same_device(hidden, weight, bias, labels)
    kept = kept_logits(hidden, weight, *options[-2:])  # logits_budget_bytes, num_valid_tokens
    return hidden.new_empty((3, kept.shape[1]), dtype=torch.float64), kept


@register_fake("linear_token_logps_merge")
def _(
    shards: Tensor, labels: Tensor, ignore_index: int, shift: bool, float64: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_merged(shards, labels, shards.shape[2:], float64)


@register_fake("linear_token_logps_shard_backward")
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
    shape = (max.shape[0], hidden.shape[2])
    return fake_gradients(hidden, weight, options[-3:], shape, compute_dtype(hidden.dtype))


@register_fake("linear_token_logps_dhidden")
def _(dhidden_rows: Tensor, hidden: Tensor, labels: Tensor, *_options: Any) -> Tensor:
    check_same_device(hidden, dhidden_rows, labels)
    return hidden.new_empty(hidden.shape)


class _LinearTokenLogpsOfShards(torch.autograd.Function):
    """linear_token_logps with this rank's shard of lm_head. Gathers forward, reduces backward."""

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
        ctx.shard = shard
        ctx.options = ShardOptions(shard.first_label, shard.vocab_size, *options)
        stats, kept = call(
            ops.linear_token_logps_shard.default,
            hidden,
            weight,
            bias,
            labels,
            *ctx.options,
            logits_budget_bytes,
            num_valid_tokens,
        )
        logps: Tensor
        logps, row_max, sum_exp = ops.linear_token_logps_merge.default(
            _gather(shard, stats), labels, *options.validity, hidden.dtype == torch.float64
        )
        ctx.save_for_backward(hidden, weight, bias, labels, row_max, sum_exp, kept)
        return logps

    @staticmethod
    def backward(ctx: Ctx, grad_logps: Tensor) -> tuple[Any, ...]:
        refuse_create_graph()
        hidden, weight, bias, labels, *others = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        dhidden, dweight, dbias = ops.linear_token_logps_shard_backward.default(
            grad_logps, hidden, weight, bias, labels, *others, *ctx.options, *needs
        )
        if needs[0]:
            dhidden = ops.linear_token_logps_dhidden.default(
                _reduce(ctx.shard, dhidden), hidden, labels, *ctx.options.validity
            )
        return *wanted((dhidden, dweight, dbias), needs), *([None] * 5)


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
    check_no_tangent(hidden, weight, bias)
    logps: Tensor = _LinearTokenLogpsOfShards.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        bias,
        labels,
        shard,
        options,
        budget_of_call(logits_budget_bytes, hidden, weight, bias),
        bound_of_valid_tokens(labels, options.validity, num_valid_tokens),
    )
    return logps


# ---- gradients of the ops alone ------------------------------------------------------------------


def _no_gradient_of_its_own(*_: object) -> None:
    raise RuntimeError(
        "the ops for a sharded vocabulary have no gradients: call them in a "
        "torch.autograd.Function whose backward calls token_logps_shard_backward"
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
    register_autograd(_name, _no_gradient_of_its_own)
