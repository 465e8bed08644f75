"""simpo_loss from logits: runs two ops as one autograd node, unless something must see each op.

For small batches, PyTorch's dispatch takes most of a call. ``python -m bench overhead`` measures
what one node saves. This module alone uses the private functions of PyTorch that this needs;
tests/loss/test_call_path.py tests each of them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .preference_loss import forward as preference_loss_forward
from .preference_loss import preference_loss, token_logps_gradient
from .records import Layout, LossOptions, LossOutputs, TokenOptions
from .registry import Ctx
from .token_logps import forward as token_logps_forward
from .token_logps import logits_gradient, logits_gradient_in_place, token_logps_report


def is_plain_call(*tensors: Tensor) -> bool:
    """Whether no compiler, tracer, mode, transform or subclass has to see the registered ops.

    The forward decides this for the backward, too, even if a mode is active by then.
    """
    return (
        not torch.compiler.is_compiling()
        and all(type(tensor) is Tensor for tensor in tensors)
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_torch_function_mode_enabled()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_tracing()
    )


def _below_autograd() -> AbstractContextManager[None]:
    """Inside, op calls go straight to the kernels."""
    if torch.compiler.is_compiling():  # only a backward, whose forward was not compiled
        return nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


def _run_kernels(
    logits: Tensor,
    labels: Tensor,
    layout: Layout,
    token_options: TokenOptions,
    arguments: tuple[Any, ...],  # of the preference_loss op
    all_positions: bool | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """LossOutputs, and the tensors that token_logps and preference_loss save, in their order."""
    with _below_autograd():
        logps, row_max, sum_exp, *report = token_logps_forward(
            logits, labels, token_options, all_positions
        )
        *out, slopes, counts = preference_loss_forward(logps, labels, layout, arguments)
    return (*out, *report), (logits, labels, row_max, sum_exp, labels, *layout, slopes, counts)


class _SimPOLoss(torch.autograd.Function):
    """token_logps and preference_loss as one node."""

    @staticmethod
    def forward(
        ctx: Ctx,
        logits: Tensor,
        labels: Tensor,
        layout: Layout,
        token_options: TokenOptions,
        arguments: tuple[Any, ...],
        inplace_backward: bool,
        all_positions: bool | None,
    ) -> tuple[Tensor, ...]:
        out, saved = _run_kernels(logits, labels, layout, token_options, arguments, all_positions)
        ctx.options = token_options, arguments, inplace_backward
        ctx.set_materialize_grads(False)
        _, _, _, rewards, _, metrics, *report = out
        ctx.mark_non_differentiable(rewards, metrics, *report)
        # The tensors that the two ops save, labels twice. A checkpoint matches saved tensors by
        # position, and one of its two forwards may call the ops instead of this node.
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx: Ctx, *grads: Tensor | None) -> tuple[Any, ...]:
        token_options, arguments, inplace_backward = ctx.options
        saved = ctx.saved_tensors
        gradient = logits_gradient_in_place if inplace_backward else logits_gradient
        with _below_autograd():
            grad_token_logps = token_logps_gradient(grads, saved[4:], arguments)
            dlogits = gradient(grad_token_logps, saved[:4], token_options)
        return dlogits, *([None] * 6)


def simpo_loss(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    layout: Layout,
    token_options: TokenOptions,
    options: LossOptions,
    inplace_backward: bool,
    all_positions: bool | None = None,
) -> LossOutputs:
    """preference_loss of token_logps. With the report, unless ``all_positions`` is None.

    See :func:`token_logps_report` for ``all_positions``.
    """
    tensors = (tensor for tensor in (logits, labels, *layout) if tensor is not None)
    if not is_plain_call(*tensors):
        logps, *report = token_logps_report(
            logits, labels, token_options, inplace_backward, all_positions
        )
        out = preference_loss(logps, labels, layout, options)
        return out._replace(**dict(zip(("mean_logit", "entropy"), report, strict=False)))
    given = logits, labels, layout, token_options, options.arguments
    if torch.is_grad_enabled() and logits.requires_grad:
        outputs = _SimPOLoss.apply(*given, inplace_backward, all_positions)  # type: ignore[no-untyped-call]
        return LossOutputs(*outputs)
    outputs, _ = _run_kernels(*given, all_positions)
    return LossOutputs(*outputs)
