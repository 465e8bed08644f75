"""SimPO as functions of logits, of log-probabilities, or of hidden states and lm_head.

Layout everywhere: B sequences, of which rows 0..P-1 are chosen and rows P..2P-1 rejected where
pairs are meant and not given as ``pairs``; T positions; V vocabulary. With ``cu_seqlens``, S
sequences one after the other in N positions. Formulas: SimPO, arXiv 2405.14734.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from . import _checks, _ops
from ._layout import as_batch, resolve_layout
from ._linear import linear_simpo_loss, linear_token_logps
from ._normalizer import PairCounts
from ._options import (
    EmptyPolicy,
    LossType,
    Normalizer,
    Reduction,
    ReportName,
    SftReduction,
    resolve_normalizer,
    resolve_preference_options,
    resolve_token_options,
)
from ._output import Report, SimPOOutput, compose_output
from ._presets import Preset, Semantics, TrainerLossType, with_preset
from ._report import check_report

__all__ = [
    "PairCounts",
    "Semantics",
    "SimPOOutput",
    "count_pairs",
    "linear_simpo_loss",
    "linear_token_logps",
    "sequence_logps",
    "simpo_loss",
    "simpo_loss_from_logps",
    "simpo_loss_from_token_logps",
    "token_logps",
    "with_preset",
]


def token_logps(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    ignore_index: int = -100,
    shift: bool = True,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> Tensor:  # [B, T]
    """Log-probability of each label under the logits: ``log_softmax(z)[label]``.

    z is ``logit_scale * logits``, or ``softcap * tanh(logit_scale * logits / softcap)``.

    Nothing of size [B, T, V] is allocated but the gradient. Masked positions are never read. A
    valid position whose z hold NaN or +inf, or are all -inf, has a NaN result.

    Args:
        logits: [B, T, V] float64, float32, bfloat16 or float16; any strides, though a vocabulary
            that is not contiguous is copied.
        labels: [B, T] of an integer dtype, each ``ignore_index`` or in [0, V).
        cu_seqlens: [S + 1] int64 or int32, not decreasing: sequences packed into one row. Then
            logits are [N, V] and labels [N], or [1, N, V] and [1, N], and sequence s is the
            positions ``cu_seqlens[s]`` up to ``cu_seqlens[s + 1]``. No label is taken across the
            end of a sequence, and what lies before the first and after the last is masked. May
            lie on the CPU beside logits on a GPU.
        ignore_index: The label of positions that are not scored.
        shift: True: the logits at t are scored with ``labels[:, t + 1]``, and the last position is
            masked, as trainers of causal language models do. False: with ``labels[:, t]``.
        logit_scale: Factor on the logits, at least 1e-30.
        softcap: Bound of the logits, in [1e-30, 1e30], or None.
        inplace_backward: The backward overwrites ``logits`` with their gradient instead of
            allocating it. A later backward through anything that saved their values raises, a
            second one through this function too; who reads them finds the gradient. Without effect
            under ``torch.compile``.

    Returns:
        [B, T], or the shape of packed labels, float32 (float64 for float64 logits), at the position
        of the logits; 0 where masked.

    Raises:
        TypeError: An argument is of the wrong type, or a tensor of the wrong dtype or layout.
        ValueError: A shape, a device or a number does not fit, ``cu_seqlens`` on the CPU decrease
            or leave [0, N], or ``inplace_backward`` was asked of logits that cannot be overwritten.
            On a GPU, which is not waited for, such a sequence is masked.
        IndexError: A label of CPU tensors is neither ``ignore_index`` nor in [0, V). On a GPU such
            a label makes its position's log-probability and gradient NaN instead. Under
            ``torch.compile`` errors of values may come as a RuntimeError.
        NotImplementedError: ``logits`` carry a tangent of forward-mode differentiation.
        RuntimeError: There are no kernels for the device; or, of the backward, its gradient was
            differentiated once more.
    """
    shape = labels.shape if cu_seqlens is not None else None
    logits, labels, cu_seqlens = as_batch("logits", logits, labels, cu_seqlens)
    logits, labels = _checks.check_logits_and_labels(logits, labels)
    options = resolve_token_options(
        ignore_index=ignore_index, shift=shift, logit_scale=logit_scale, softcap=softcap
    )
    _checks.check_inplace_backward(inplace_backward, logits)
    targets, options = _ops.sequence_targets(labels, cu_seqlens, logits.shape[2], options)
    logps = _ops.token_logps(logits, targets, options, inplace_backward)
    return logps if shape is None else logps.view(shape)


def sequence_logps(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    average_log_prob: bool = True,
    ignore_index: int = -100,
    shift: bool = True,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> Tensor:  # [B], or [S]
    """Log-probability of each sequence: the mean of its valid tokens', or their sum.

    Args:
        logits: [B, T, V], as for :func:`token_logps`, as are all arguments not listed here.
        labels: [B, T].
        cu_seqlens: See :func:`token_logps`.
        average_log_prob: True: the mean over valid tokens, which is SimPO's; False: the sum.
        ignore_index: See :func:`token_logps`.
        shift: See :func:`token_logps`.
        logit_scale: See :func:`token_logps`.
        softcap: See :func:`token_logps`.
        inplace_backward: See :func:`token_logps`.

    Returns:
        [B], or [S], float32 (float64 for float64 logits). NaN for a sequence without a valid token:
        not 0, which would be the highest log-probability there is.

    Raises:
        TypeError: As :func:`token_logps`.
        ValueError: As :func:`token_logps`.
        IndexError: As :func:`token_logps`.
    """
    logits, labels, cu_seqlens = as_batch("logits", logits, labels, cu_seqlens)
    logits, labels = _checks.check_logits_and_labels(logits, labels)
    options = resolve_token_options(
        ignore_index=ignore_index, shift=shift, logit_scale=logit_scale, softcap=softcap
    )
    average_log_prob = _checks.check_bool("average_log_prob", average_log_prob)
    _checks.check_inplace_backward(inplace_backward, logits)
    targets, options = _ops.sequence_targets(labels, cu_seqlens, logits.shape[2], options)
    logps = _ops.token_logps(logits, targets, options, inplace_backward)
    return _ops.sequence_logps(logps, targets, cu_seqlens, options, average_log_prob)


def simpo_loss_from_logps(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    *,
    pair_weight: Tensor | None = None,  # [P]
    beta: float = 2.0,
    gamma_beta_ratio: float | None = None,
    gamma: float | None = None,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # [P], [P], [P]
    """The preference loss of each pair, from sequence log-probabilities.

    See :func:`simpo_loss` for the formula; it is the same kernel. Signature and result are those of
    ``simpo_loss`` in Princeton's SimPOTrainer.

    Args:
        chosen_logps: [P] floating-point, usually means over tokens.
        rejected_logps: [P].
        pair_weight: See :func:`simpo_loss`.
        beta: Scale of the rewards, > 0.
        gamma_beta_ratio: Target margin over beta. Default 0.5, and 0 for ``"ipo"``.
        gamma: Target margin, instead of ``gamma_beta_ratio``.
        loss_type: ``"sigmoid"``, ``"hinge"`` or ``"ipo"``.
        label_smoothing: Probability in [0, 0.5] that a pair's order is wrong; sigmoid only.
        alpha: See :func:`simpo_loss`.

    Returns:
        losses [P], chosen_rewards [P] and rejected_rewards [P] (both beta * r, detached); float32,
        or float64 if either input is.

    Raises:
        TypeError: An argument is of the wrong type, or a tensor of the wrong dtype or layout.
        ValueError: A shape, a device or a number does not fit.
    """
    chosen_logps = _checks.check_floating("chosen_logps", chosen_logps)
    rejected_logps = _checks.check_floating("rejected_logps", rejected_logps)
    if chosen_logps.dim() != 1:
        raise ValueError(f"chosen_logps: expected shape [P], got {list(chosen_logps.shape)}")
    if rejected_logps.shape != chosen_logps.shape:
        raise ValueError(
            f"rejected_logps: expected shape {list(chosen_logps.shape)} as of chosen_logps, "
            f"got {list(rejected_logps.shape)}"
        )
    if rejected_logps.device != chosen_logps.device:
        raise ValueError(
            f"rejected_logps: expected device {chosen_logps.device} as of chosen_logps, "
            f"got {rejected_logps.device}"
        )
    options = resolve_preference_options(
        beta=beta,
        gamma_beta_ratio=gamma_beta_ratio,
        gamma=gamma,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        alpha=alpha,
        shift=False,
    )
    # A sequence log-probability is the log-probability of a sequence of one token.
    dtype = _ops.compute_dtype(torch.promote_types(chosen_logps.dtype, rejected_logps.dtype))
    token_logps = torch.cat((chosen_logps.to(dtype), rejected_logps.to(dtype))).unsqueeze(1)
    labels = torch.zeros_like(token_logps, dtype=torch.int64)
    layout = resolve_layout("chosen_logps", token_logps, None, None, pair_weight)
    out = _ops.preference_loss(token_logps, labels, layout, options)
    pairs = chosen_logps.shape[0]
    return out.losses, out.rewards[:pairs], out.rewards[pairs:]


def simpo_loss(
    logits: Tensor,  # [2P, T, V]
    labels: Tensor,  # [2P, T]
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    pairs: Tensor | None = None,  # [P, 2]
    pair_weight: Tensor | None = None,  # [P]
    preset: Preset | None = None,
    beta: float | None = None,
    gamma_beta_ratio: float | None = None,
    gamma: float | None = None,
    loss_type: TrainerLossType | None = None,
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
    sft_weight: float | None = None,
    sft_reduction: SftReduction | None = None,
    average_log_prob: bool | None = None,
    reduction: Reduction = "mean",
    normalizer: Normalizer = None,
    empty: EmptyPolicy | None = None,
    ignore_index: int = -100,
    shift: bool | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
    report: Collection[ReportName] = (),
) -> SimPOOutput:
    r"""SimPO's loss from the logits of chosen and rejected completions.

    With l the mean (or sum) log-probability of a completion's valid tokens, of each pair

        r = l, or, with an alpha, (1 - exp(l)^-alpha) / alpha
        z = (r_chosen - r_rejected) - gamma_beta_ratio
        sigmoid: -logsigmoid(beta z) (1 - label_smoothing) - logsigmoid(-beta z) label_smoothing
        hinge:   relu(1 - beta z), with subgradient 0 at the kink
        ipo:     (z - 1 / (2 beta))^2

    and ``loss = reduce(losses) + sft_weight * sft_loss``. Sources: SimPO, arXiv 2405.14734, eq. 6;
    the hinge and the SFT term as in the authors' trainer (with ``sft_reduction="token"``, CPO-SimPO
    as in TRL); IPO, arXiv 2310.12036, eq. 17, whose tau is beta; AlphaPO, arXiv 2501.03884, as
    -expm1(-alpha l) / alpha.

    Args:
        logits: [2P, T, V] float64, float32, bfloat16 or float16; chosen rows first. See
            :func:`token_logps` for strides and non-finite values.
        labels: [2P, T] of an integer dtype; ``ignore_index`` at prompt and padding.
        cu_seqlens: [S + 1], for packed logits [N, V] and labels [N]: see :func:`token_logps`.
            Chosen sequences come first, unless ``pairs`` are given.
        pairs: [P, 2] of an integer dtype: the chosen and the rejected sequence of each pair, as
            indices of rows or of packed sequences. A sequence may be in several pairs, which each
            count it, or in none. May lie on the CPU beside logits on a GPU.
        pair_weight: [P] real constants. A factor on a pair's loss and SFT term, not on what they
            are divided by: ``normalizer=pair_weight.sum()`` makes it a weighted mean. A weight of
            0 leaves a pair's loss out, be it NaN.
        preset: ``"princeton"``, ``"trl"``, ``"liger"`` or ``"llamafactory"``: that trainer's
            semantics and defaults in place of those below, wherever a keyword is not given, and
            its names for ``loss_type``: see :func:`with_preset`.
        beta: Scale of the rewards, > 0. Default 2.0.
        gamma_beta_ratio: Target margin over beta. Default 0.5, and 0 for ``"ipo"``.
        gamma: Target margin, instead of ``gamma_beta_ratio``.
        loss_type: ``"sigmoid"`` (default), ``"hinge"`` or ``"ipo"``.
        label_smoothing: Probability in [0, 0.5] that a pair's order is wrong; sigmoid only.
        alpha: Of AlphaPO: 0, or a magnitude in [1e-30, 1e30].
        sft_weight: Weight of the SFT term, >= 0. Default 0.
        sft_reduction: ``"sequence"`` (default): -chosen_logps, reduced as the losses are.
            ``"token"``: cross entropy over all valid chosen tokens of the batch, as Princeton, TRL
            and Liger have it.
        average_log_prob: True (default): l is the mean over valid tokens; False: the sum.
        reduction: ``"mean"`` over counted pairs (and, for a token-wise SFT term, over their chosen
            tokens), ``"sum"``, or ``"none"``: loss is [P].
        normalizer: Replaces the denominator of ``"mean"``, for gradient accumulation and data
            parallelism: a number of pairs, or (pairs, tokens), of which a token-wise SFT term needs
            the second. Numbers, or tensors of no dimension, which are not read to be checked. See
            :func:`count_pairs` and :func:`simpo_ext.distributed.global_normalizer`.
        empty: What becomes of a pair with a completion that has no valid token. ``"drop"``
            (default): it contributes nothing, to loss, gradient and denominators, and is counted in
            the metrics; a batch of nothing else has loss 0. Its other completion keeps its logps
            and their gradient. ``"nan"``: it makes the loss NaN.
        ignore_index: See :func:`token_logps`.
        shift: See :func:`token_logps`. Default True.
        logit_scale: See :func:`token_logps`.
        softcap: See :func:`token_logps`.
        inplace_backward: See :func:`token_logps`.
        report: Metrics to add, out of ``"logits"``, ``"logits_all"`` and ``"entropy"``, each for
            ``/chosen`` and ``/rejected``; NaN where nothing was counted. ``logits``: the mean over
            the vocabulary of z (the logits after scale and softcap), averaged over the completion
            tokens of the counted pairs' sequences. ``logits_all``: the same over all positions of
            all pairs' sequences, prompt and padding included, as trainers log it; masked positions
            are read for it. ``entropy``: that of softmax(z) in nats, averaged as ``logits``. They
            come from the forward's own pass over the logits; loss and gradients are the same bits.

    Returns:
        A :class:`SimPOOutput`.

    Raises:
        TypeError: An argument is of the wrong type, or a tensor of the wrong dtype or layout.
        ValueError: A shape, a device, a number or a combination does not fit, or ``cu_seqlens`` on
            the CPU decrease or leave [0, N].
        IndexError: Of CPU tensors, a label is neither ``ignore_index`` nor in [0, V), or one of
            ``pairs`` is of a sequence that is not there. On a GPU, which is not waited for, what is
            wrong with values makes NaN instead: of a position, a sequence or a pair. Under
            ``torch.compile`` errors of values may come as a RuntimeError.
    """
    logits, labels, cu_seqlens = as_batch("logits", logits, labels, cu_seqlens)
    logits, labels = _checks.check_logits_and_labels(logits, labels)
    layout = resolve_layout("logits", logits, cu_seqlens, pairs, pair_weight)
    options = resolve_preference_options(
        preset=preset,
        beta=beta,
        gamma_beta_ratio=gamma_beta_ratio,
        gamma=gamma,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        alpha=alpha,
        sft_weight=sft_weight,
        sft_reduction=sft_reduction,
        average_log_prob=average_log_prob,
        reduction=reduction,
        empty=empty,
        ignore_index=ignore_index,
        shift=shift,
    )
    denominators = resolve_normalizer(normalizer, options)
    token_options = resolve_token_options(
        ignore_index=ignore_index, shift=options.shift, logit_scale=logit_scale, softcap=softcap
    )
    _checks.check_inplace_backward(inplace_backward, logits)
    names = check_report(report)
    targets, token_options = _ops.sequence_targets(
        labels, layout.cu_seqlens, logits.shape[2], token_options
    )
    return compose_output(
        options._replace(shift=token_options.shift),
        denominators,
        lambda op_options: _ops.simpo_loss(
            logits,
            targets,
            layout,
            token_options,
            op_options,
            inplace_backward,
            "logits_all" in names if names else None,
        ),
        Report(names, targets, layout) if names else None,
    )


def simpo_loss_from_token_logps(
    token_logps: Tensor,  # [2P, T]
    labels: Tensor,  # [2P, T]
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    pairs: Tensor | None = None,  # [P, 2]
    pair_weight: Tensor | None = None,  # [P]
    preset: Preset | None = None,
    beta: float | None = None,
    gamma_beta_ratio: float | None = None,
    gamma: float | None = None,
    loss_type: TrainerLossType | None = None,
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
    sft_weight: float | None = None,
    sft_reduction: SftReduction | None = None,
    average_log_prob: bool | None = None,
    reduction: Reduction = "mean",
    normalizer: Normalizer = None,
    empty: EmptyPolicy | None = None,
    ignore_index: int = -100,
    shift: bool | None = None,
) -> SimPOOutput:
    """SimPO's loss from token log-probabilities, wherever they come from.

    :func:`simpo_loss` after its first step, :func:`token_logps`, for log-probabilities that a
    vocabulary-parallel lm_head or a kernel of one's own computes.

    Args:
        token_logps: [2P, T], or packed [N] or [1, N], float32 or float64; not read where masked.
        labels: As of ``token_logps``: what says where that is. Their values are not looked at
            otherwise.
        cu_seqlens: See :func:`simpo_loss`, as for all arguments not listed here.
        pairs: See :func:`simpo_loss`.
        pair_weight: See :func:`simpo_loss`.
        preset: See :func:`simpo_loss`.
        beta: See :func:`simpo_loss`.
        gamma_beta_ratio: See :func:`simpo_loss`.
        gamma: See :func:`simpo_loss`.
        loss_type: See :func:`simpo_loss`.
        label_smoothing: See :func:`simpo_loss`.
        alpha: See :func:`simpo_loss`.
        sft_weight: See :func:`simpo_loss`.
        sft_reduction: See :func:`simpo_loss`.
        average_log_prob: See :func:`simpo_loss`.
        reduction: See :func:`simpo_loss`.
        normalizer: See :func:`simpo_loss`.
        empty: See :func:`simpo_loss`.
        ignore_index: See :func:`token_logps`.
        shift: True (default): ``token_logps[:, t]`` is that of ``labels[:, t + 1]``, as
            :func:`token_logps` returns it.

    Returns:
        A :class:`SimPOOutput`.

    Raises:
        TypeError: As :func:`simpo_loss`.
        ValueError: As :func:`simpo_loss`.
        IndexError: As :func:`simpo_loss`, but for labels.
    """
    token_logps, labels, cu_seqlens = as_batch("token_logps", token_logps, labels, cu_seqlens)
    token_logps, labels = _checks.check_token_logps(token_logps, labels)
    layout = resolve_layout("token_logps", token_logps, cu_seqlens, pairs, pair_weight)
    options = resolve_preference_options(
        preset=preset,
        beta=beta,
        gamma_beta_ratio=gamma_beta_ratio,
        gamma=gamma,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        alpha=alpha,
        sft_weight=sft_weight,
        sft_reduction=sft_reduction,
        average_log_prob=average_log_prob,
        reduction=reduction,
        empty=empty,
        ignore_index=ignore_index,
        shift=shift,
    )
    denominators = resolve_normalizer(normalizer, options)
    targets, shift = _validity(labels, cu_seqlens, ignore_index, options.shift)
    return compose_output(
        options._replace(ignore_index=0, shift=shift),
        denominators,
        lambda op_options: _ops.preference_loss(token_logps, targets, layout, op_options),
    )


def count_pairs(
    labels: Tensor,  # [2P, T]
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    pairs: Tensor | None = None,  # [P, 2]
    empty: EmptyPolicy = "drop",
    ignore_index: int = -100,
    shift: bool = True,
) -> PairCounts:
    """What :func:`simpo_loss` divides by: the number of counted pairs, and of their chosen tokens.

    Of several micro-batches or ranks, :func:`simpo_ext.distributed.global_normalizer` adds them up.

    Args:
        labels: [2P, T], or packed [N] or [1, N]; their values are not checked.
        cu_seqlens: See :func:`simpo_loss`.
        pairs: See :func:`simpo_loss`.
        empty: ``"drop"``: a pair is counted if both completions have a valid token; ``"nan"``: all.
        ignore_index: See :func:`token_logps`.
        shift: See :func:`token_logps`.

    Returns:
        :class:`PairCounts` of tensors on the device of ``labels``, which is not waited for.

    Raises:
        TypeError: As :func:`simpo_loss`.
        ValueError: As :func:`simpo_loss`.
        IndexError: As :func:`simpo_loss`, but for labels.
    """
    labels, _, cu_seqlens = as_batch("labels", labels, labels, cu_seqlens)
    labels = _checks.check_labels(labels)
    layout = resolve_layout("labels", labels, cu_seqlens, pairs, None)
    options = resolve_preference_options(
        sft_reduction="token",
        reduction="sum",
        empty=empty,
        ignore_index=ignore_index,
        shift=shift,
    )
    targets, shift = _validity(labels, cu_seqlens, ignore_index, shift)
    # The SFT term of log-probs that are all -1: each chosen token of a counted pair adds 1.
    logps = torch.full((), -1.0, dtype=torch.float64, device=labels.device).expand(labels.shape)
    out = _ops.preference_loss(
        logps, targets, layout, options._replace(ignore_index=0, shift=shift)
    )
    return PairCounts(out.metrics[_ops.METRIC_NAMES.index("num_pairs")], out.sft_loss)


def _validity(
    labels: Tensor,  # [B, T]
    cu_seqlens: Tensor | None,  # [S + 1]
    ignore_index: int,
    shift: bool,
) -> tuple[Tensor, bool]:
    """Labels that are 0 where nothing is scored and 1 elsewhere, and whether they are shifted."""
    valid = (labels != ignore_index).to(torch.int64)
    options = resolve_token_options(ignore_index=0, shift=shift, logit_scale=1.0, softcap=None)
    valid, options = _ops.sequence_targets(valid, cu_seqlens, 2, options)
    return valid, options.shift
