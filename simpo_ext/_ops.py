"""The ops of the compiled library as PyTorch sees them: fake kernels, autograd, and call wrappers.

This module and :mod:`simpo_ext._linear_ops` alone touch ``torch.ops.simpo_ext``. They check nothing
that :mod:`simpo_ext.functional` has checked; the kernels guard their own memory accesses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._layout import Layout
from ._library import _C  # its import registers the ops
from ._options import REDUCTIONS, PreferenceOptions, TokenOptions

_ops = torch.ops.simpo_ext

Function = TypeVar("Function", bound=Callable[..., Any])


def _register_fake(name: str) -> Callable[[Function], Function]:
    """torch.library.register_fake, which is untyped."""
    register: Callable[[Function], Function] = torch.library.register_fake(f"simpo_ext::{name}")
    return register


# The order of enum Metric in csrc/core/kernels.h.
METRIC_NAMES: tuple[str, ...] = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "num_pairs",
    "dropped_pairs",
    "num_tokens",
)

Ctx: TypeAlias = Any  # torch's autograd context, which torch leaves untyped


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of logps and losses for logits of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _no_double_backward(*_: object) -> None:
    raise RuntimeError(
        "simpo_ext does not implement double backward: its gradients cannot be differentiated"
    )


def _refuse_create_graph() -> None:
    """For a backward, to whose graph what its forward computed would be constants."""
    if torch.is_grad_enabled():
        _no_double_backward()


def _check_no_tangent(tensor: Tensor) -> None:
    """Forward-mode AD would pass an op by, and take its tangent for zero."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        raise NotImplementedError("simpo_ext does not implement forward-mode differentiation")


def _check_same_device(first: Tensor, *others: Tensor | None) -> None:
    """A CPU tensor beside a meta tensor reaches the fake kernel, which would make up CPU memory."""
    for other in others:
        if other is not None:
            torch._check(  # type: ignore[no-untyped-call]
                other.device == first.device,
                lambda: f"expected all tensors on {first.device}, got one on another device",
            )


# ---- token_logps ---------------------------------------------------------------------------------


@_register_fake("token_logps")
def _(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    shift: bool,
    logit_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_same_device(logits, labels)
    shape = logits.shape[:2]
    dtype = compute_dtype(logits.dtype)
    return (
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape, dtype=torch.float64),
    )


@_register_fake("token_logps_report")
def _(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    shift: bool,
    logit_scale: float,
    softcap: float,
    all_positions: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_same_device(logits, labels)
    shape = logits.shape[:2]
    dtype = compute_dtype(logits.dtype)
    return (
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape, dtype=torch.float64),
        logits.new_empty(shape, dtype=torch.float64),
        logits.new_empty(shape, dtype=torch.float64),
    )


@_register_fake("token_logps_backward")
def _(
    grad_logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    max: Tensor,
    sum_exp: Tensor,
    ignore_index: int,
    shift: bool,
    logit_scale: float,
    softcap: float,
) -> Tensor:
    _check_same_device(logits, grad_logps, labels, max, sum_exp)
    return logits.new_empty(logits.shape)


@_register_fake("token_logps_backward_")
def _(
    grad_logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    max: Tensor,
    sum_exp: Tensor,
    ignore_index: int,
    shift: bool,
    logit_scale: float,
    softcap: float,
) -> None:
    _check_same_device(logits, grad_logps, labels, max, sum_exp)


def _token_logps_setup(ctx: Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, *ctx.options = inputs
    _, row_max, sum_exp = output
    ctx.mark_non_differentiable(row_max, sum_exp)
    ctx.save_for_backward(logits, labels, row_max, sum_exp)


def _token_logps_report_setup(
    ctx: Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    logits, labels, *ctx.options, _ = inputs
    _, *constants = output
    ctx.mark_non_differentiable(*constants)
    ctx.save_for_backward(logits, labels, *constants[:2])  # max and sum_exp


def _logits_gradient(
    grad_logps: Tensor,
    saved: Sequence[Tensor],  # logits, labels, max, sum_exp
    options: Sequence[Any],
) -> Tensor:
    dlogits: Tensor = _ops.token_logps_backward.default(grad_logps, *saved, *options)
    return dlogits


def _logits_gradient_in_place(
    grad_logps: Tensor, saved: Sequence[Tensor], options: Sequence[Any]
) -> Tensor:
    """_logits_gradient in the memory of the logits."""
    logits, *others = saved
    dlogits = logits.detach()
    _ops.token_logps_backward_.default(grad_logps, dlogits, *others, *options)
    # Whoever saved the logits' values finds a newer version and fails, the caller's node included.
    torch.autograd.graph.increment_version(logits)
    return dlogits


def _token_logps_backward(ctx: Ctx, grad_logps: Tensor, *_: Tensor) -> tuple[Any, ...]:
    dlogits = _logits_gradient(grad_logps, ctx.saved_tensors, ctx.options)
    return dlogits, None, None, None, None, None


def _token_logps_report_backward(ctx: Ctx, *grads: Tensor) -> tuple[Any, ...]:
    return *_token_logps_backward(ctx, *grads), None


torch.library.register_autograd(
    "simpo_ext::token_logps", _token_logps_backward, setup_context=_token_logps_setup
)
torch.library.register_autograd(
    "simpo_ext::token_logps_report",
    _token_logps_report_backward,
    setup_context=_token_logps_report_setup,
)
torch.library.register_autograd("simpo_ext::token_logps_backward", _no_double_backward)


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
        logps, row_max, sum_exp, *report = _call_token_logps(logits, labels, options, all_positions)
        ctx.options = options
        ctx.mark_non_differentiable(*report)
        ctx.save_for_backward(logits, labels, row_max, sum_exp)
        return logps, *report

    @staticmethod
    def backward(ctx: Ctx, grad_logps: Tensor, *_: Tensor) -> tuple[Any, ...]:
        _refuse_create_graph()
        dlogits = _logits_gradient_in_place(grad_logps, ctx.saved_tensors, ctx.options)
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
    """token_logps and what is reported beside them: mean_logit and entropy, float64, detached.

    Both are 0 at masked positions, but for the mean_logit with ``all_positions``. None: no report.
    """
    _check_no_tangent(logits)
    # A compiled backward plans its own memory, and may not mutate what the forward saved.
    needs_gradient = torch.is_grad_enabled() and logits.requires_grad
    if inplace_backward and needs_gradient and not torch.compiler.is_compiling():
        outputs: tuple[Tensor, ...] = _TokenLogpsInplace.apply(  # type: ignore[no-untyped-call]
            logits, labels, options, all_positions
        )
        return outputs
    logps, _, _, *report = _call_token_logps(logits, labels, options, all_positions)
    return logps, *report


def _call_token_logps(
    logits: Tensor, labels: Tensor, options: TokenOptions, all_positions: bool | None
) -> tuple[Tensor, ...]:
    """logps, max, sum_exp; and mean_logit, entropy with a report."""
    outputs: tuple[Tensor, ...]
    if all_positions is None:
        outputs = _call(_ops.token_logps.default, logits, labels, *options)
    else:
        outputs = _call(_ops.token_logps_report.default, logits, labels, *options, all_positions)
    return outputs


# Torch passes on the text of an op's error, but under some versions not its class. So the ops put a
# tag in front of the text: see csrc/include/simpo_ext/error_tags.h.
_ERRORS: dict[str, type[Exception]] = {
    _C.INDEX_ERROR_TAG: IndexError,
    _C.VALUE_ERROR_TAG: ValueError,
}


def _call(op: Any, *args: Any) -> Any:
    """Calls a forward op, and takes the tag off its errors.

    Compiled code calls the op itself, so that there the tag stays in the text.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except (RuntimeError, IndexError, ValueError) as error:
        for tag, kind in _ERRORS.items():
            _, has_tag, message = str(error).partition(tag)
            if has_tag:
                raise kind(message) from None
        raise


# ---- sequence_targets ----------------------------------------------------------------------------


@_register_fake("sequence_targets")
def _(
    labels: Tensor, cu_seqlens: Tensor, num_labels: int, ignore_index: int, shift: bool
) -> Tensor:
    _check_same_device(labels, cu_seqlens)
    return labels.new_empty(labels.shape)


def sequence_targets(
    labels: Tensor,  # [1, N]
    cu_seqlens: Tensor | None,  # [S + 1]
    num_labels: int,
    options: TokenOptions,
) -> tuple[Tensor, TokenOptions]:  # [1, N]
    """What each position is scored with in the flat layout, and the options for that.

    In a batch of rows, labels and options as they are.
    """
    if cu_seqlens is None:
        return labels, options
    op = _ops.sequence_targets.default
    targets = _call(op, labels, cu_seqlens, num_labels, options.ignore_index, options.shift)
    return targets, options._replace(shift=False)


# ---- sequence_logps ------------------------------------------------------------------------------


@_register_fake("sequence_logps")
def _(
    token_logps: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    shift: bool,
    average_log_prob: bool,
) -> tuple[Tensor, Tensor]:
    _check_same_device(token_logps, labels, cu_seqlens)
    shape = (_num_sequences(token_logps, cu_seqlens),)
    return token_logps.new_empty(shape), token_logps.new_empty(shape, dtype=torch.int64)


def _num_sequences(token_logps: Tensor, cu_seqlens: Tensor | None) -> int:
    return token_logps.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


@_register_fake("sequence_logps_backward")
def _(
    grad_logps: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    counts: Tensor,
    ignore_index: int,
    shift: bool,
    average_log_prob: bool,
) -> Tensor:
    _check_same_device(grad_logps, labels, cu_seqlens, counts)
    return grad_logps.new_empty(labels.shape)


def _sequence_logps_setup(ctx: Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, labels, cu_seqlens, *ctx.options = inputs
    _, counts = output
    ctx.save_for_backward(labels, cu_seqlens, counts)


def _sequence_logps_backward(ctx: Ctx, grad_logps: Tensor, grad_counts: Tensor) -> tuple[Any, ...]:
    grad = _ops.sequence_logps_backward.default(grad_logps, *ctx.saved_tensors, *ctx.options)
    return grad, None, None, None, None, None


torch.library.register_autograd(
    "simpo_ext::sequence_logps", _sequence_logps_backward, setup_context=_sequence_logps_setup
)
torch.library.register_autograd("simpo_ext::sequence_logps_backward", _no_double_backward)


def sequence_logps(
    token_logps: Tensor,  # [B, T]
    labels: Tensor,  # [B, T]
    cu_seqlens: Tensor | None,  # [S + 1]
    options: TokenOptions,
    average_log_prob: bool,
) -> Tensor:  # [S]
    """Sum or mean of the valid tokens' log-probabilities; NaN for an empty sequence."""
    logps: Tensor
    logps, _ = _call(
        _ops.sequence_logps.default,
        token_logps,
        labels,
        cu_seqlens,
        options.ignore_index,
        options.shift,
        average_log_prob,
    )
    return logps


# ---- preference_loss -----------------------------------------------------------------------------


class PreferenceOutputs(NamedTuple):
    """Outputs of the preference_loss op, of which two more are for its backward."""

    loss: Tensor  # [], or [P] without a reduction
    losses: Tensor  # [P]
    logps: Tensor  # [2P]
    rewards: Tensor  # [2P]
    sft_loss: Tensor  # as loss
    metrics: Tensor  # [len(METRIC_NAMES)] float64
    # Of the token_logps before, with a report:
    mean_logit: Tensor | None = None  # [2P, T] float64
    entropy: Tensor | None = None  # [2P, T] float64


@_register_fake("preference_loss")
def _(
    token_logps: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    pairs: Tensor | None,
    pair_weight: Tensor | None,
    ignore_index: int,
    shift: bool,
    average_log_prob: bool,
    beta: float,
    gamma_beta_ratio: float,
    loss_type: int,
    label_smoothing: float,
    alpha: float,
    sft_weight: float,
    sft_reduction: int,
    reduction: int,
    empty: int,
) -> Sequence[Tensor]:
    _check_same_device(token_logps, labels, cu_seqlens, pairs, pair_weight)
    sequences = _num_sequences(token_logps, cu_seqlens)
    num_pairs = sequences // 2 if pairs is None else pairs.shape[0]
    reduced = (num_pairs,) if reduction == REDUCTIONS["none"] else ()
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


@_register_fake("preference_loss_backward")
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
    ignore_index: int,
    shift: bool,
    average_log_prob: bool,
    sft_weight: float,
    sft_reduction: int,
    reduction: int,
    empty: int,
) -> Tensor:
    grads = (grad_loss, grad_losses, grad_logps, grad_sft_loss)
    _check_same_device(slopes, labels, cu_seqlens, pairs, pair_weight, counts, *grads)
    return slopes.new_empty(labels.shape)


def _preference_loss_setup(ctx: Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, labels, cu_seqlens, pairs, pair_weight, *ctx.options = inputs
    _, _, _, rewards, _, metrics, slopes, counts = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rewards, metrics, slopes, counts)
    ctx.save_for_backward(labels, cu_seqlens, pairs, pair_weight, slopes, counts)


def _token_logps_gradient(
    grads: Sequence[Tensor | None],  # of PreferenceOutputs, and more
    saved: Sequence[Tensor | None],  # labels, those of a Layout, slopes, counts
    options: Sequence[Any],
) -> Tensor:
    _refuse_create_graph()
    grad_loss, grad_losses, grad_logps, _, grad_sft_loss, *_ = grads
    # Without beta and what follows up to alpha: the slopes hold what these did.
    grad_token_logps: Tensor = _ops.preference_loss_backward.default(
        grad_loss, grad_losses, grad_logps, grad_sft_loss, *saved, *options[:3], *options[8:]
    )
    return grad_token_logps


def _preference_loss_backward(ctx: Ctx, *grads: Tensor | None) -> tuple[Any, ...]:
    return (_token_logps_gradient(grads, ctx.saved_tensors, ctx.options), *([None] * 16))


torch.library.register_autograd(
    "simpo_ext::preference_loss", _preference_loss_backward, setup_context=_preference_loss_setup
)
torch.library.register_autograd("simpo_ext::preference_loss_backward", _no_double_backward)


def preference_loss(
    token_logps: Tensor,  # [B, T]
    labels: Tensor,  # [B, T]
    layout: Layout,
    options: PreferenceOptions,
) -> PreferenceOutputs:
    """The preference loss of token log-probabilities, and everything reported beside it."""
    _check_no_tangent(token_logps)
    *out, _, _ = _call(_ops.preference_loss.default, token_logps, labels, *layout, *options)
    return PreferenceOutputs(*out)


# ---- simpo_loss ----------------------------------------------------------------------------------


def _below_autograd() -> AbstractContextManager[None]:
    """Where op calls go straight to the kernels."""
    if torch.compiler.is_compiling():  # this backward; the forward was not
        return nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


def _simpo_loss_kernels(
    logits: Tensor,
    labels: Tensor,
    layout: Layout,
    token_options: TokenOptions,
    options: PreferenceOptions,
    all_positions: bool | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """PreferenceOutputs, and what the nodes of token_logps and preference_loss save, in order."""
    with _below_autograd():
        logps, row_max, sum_exp, *report = _call_token_logps(
            logits, labels, token_options, all_positions
        )
        *out, slopes, counts = _call(_ops.preference_loss.default, logps, labels, *layout, *options)
    return (*out, *report), (logits, labels, row_max, sum_exp, labels, *layout, slopes, counts)


class _SimPOLoss(torch.autograd.Function):
    """token_logps and preference_loss as one node, for calls so small that dispatch is the cost."""

    @staticmethod
    def forward(
        ctx: Ctx,
        logits: Tensor,
        labels: Tensor,
        layout: Layout,
        token_options: TokenOptions,
        options: PreferenceOptions,
        inplace_backward: bool,
        all_positions: bool | None,
    ) -> tuple[Tensor, ...]:
        out, saved = _simpo_loss_kernels(
            logits, labels, layout, token_options, options, all_positions
        )
        ctx.options = token_options, options, inplace_backward
        ctx.set_materialize_grads(False)
        _, _, _, rewards, _, metrics, *report = out
        ctx.mark_non_differentiable(rewards, metrics, *report)
        # All that the two ops save, labels twice: a checkpoint matches saved tensors by position,
        # and may recompute with the ops what was computed here, or the other way round.
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx: Ctx, *grads: Tensor | None) -> tuple[Any, ...]:
        token_options, options, inplace_backward = ctx.options
        saved = ctx.saved_tensors
        logits_gradient = _logits_gradient_in_place if inplace_backward else _logits_gradient
        with _below_autograd():
            grad_token_logps = _token_logps_gradient(grads, saved[4:], options)
            dlogits = logits_gradient(grad_token_logps, saved[:4], token_options)
        return dlogits, *([None] * 6)


def is_plain_call(*tensors: Tensor) -> bool:
    """False where a compiler, tracer, mode, transform or subclass has to see the registered ops.

    Of the forward: the backward calls ops wherever it was made, for a mode that comes later.
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


def simpo_loss(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    layout: Layout,
    token_options: TokenOptions,
    options: PreferenceOptions,
    inplace_backward: bool,
    all_positions: bool | None = None,
) -> PreferenceOutputs:
    """preference_loss of token_logps; with its report unless ``all_positions`` is None."""
    tensors = (tensor for tensor in (logits, labels, *layout) if tensor is not None)
    if not is_plain_call(*tensors):
        logps, *report = token_logps_report(
            logits, labels, token_options, inplace_backward, all_positions
        )
        out = preference_loss(logps, labels, layout, options)
        return out._replace(**dict(zip(("mean_logit", "entropy"), report, strict=False)))
    arguments = logits, labels, layout, token_options, options
    if torch.is_grad_enabled() and logits.requires_grad:
        outputs = _SimPOLoss.apply(*arguments, inplace_backward, all_positions)  # type: ignore[no-untyped-call]
        return PreferenceOutputs(*outputs)
    outputs, _ = _simpo_loss_kernels(*arguments, all_positions)
    return PreferenceOutputs(*outputs)
