"""SimPO as functions of logits, of log-probabilities, or of hidden states and lm_head.

Layout everywhere: B sequences, of which rows 0..P-1 are chosen and rows P..2P-1 rejected where
pairs are meant; T positions; V vocabulary. Formulas: SimPO, arXiv 2405.14734.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from . import _checks, _ops
from ._linear import linear_simpo_loss, linear_token_logps
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
from ._report import check_report

__all__ = [
    "SimPOOutput",
    "linear_simpo_loss",
    "linear_token_logps",
    "sequence_logps",
    "simpo_loss",
    "simpo_loss_from_logps",
    "token_logps",
]


def token_logps(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    *,
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
        [B, T] float32 (float64 for float64 logits), at the position of the logits; 0 where masked.

    Raises:
        TypeError: An argument is of the wrong type, or a tensor of the wrong dtype or layout.
        ValueError: A shape, a device or a number does not fit, or ``inplace_backward`` was asked of
            logits that cannot be overwritten.
        IndexError: A label of CPU tensors is neither ``ignore_index`` nor in [0, V). Under
            ``torch.compile`` it may come as a RuntimeError. On a GPU, which is not waited for, such
            a label makes its position's log-probability and gradient NaN instead.
        NotImplementedError: ``logits`` carry a tangent of forward-mode differentiation.
        RuntimeError: There are no kernels for the device; or, of the backward, its gradient was
            differentiated once more.
    """
    logits, labels = _checks.check_logits_and_labels(logits, labels)
    options = resolve_token_options(
        ignore_index=ignore_index, shift=shift, logit_scale=logit_scale, softcap=softcap
    )
    _checks.check_inplace_backward(inplace_backward, logits)
    return _ops.token_logps(logits, labels, options, inplace_backward)


def sequence_logps(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    *,
    average_log_prob: bool = True,
    ignore_index: int = -100,
    shift: bool = True,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> Tensor:  # [B]
    """Log-probability of each sequence: the mean of its valid tokens', or their sum.

    Args:
        logits: [B, T, V], as for :func:`token_logps`, as are all arguments not listed here.
        labels: [B, T].
        average_log_prob: True: the mean over valid tokens, which is SimPO's; False: the sum.
        ignore_index: See :func:`token_logps`.
        shift: See :func:`token_logps`.
        logit_scale: See :func:`token_logps`.
        softcap: See :func:`token_logps`.
        inplace_backward: See :func:`token_logps`.

    Returns:
        [B] float32 (float64 for float64 logits). NaN for a sequence without a valid token: not 0,
        which would be the highest log-probability there is.

    Raises:
        TypeError: As :func:`token_logps`.
        ValueError: As :func:`token_logps`.
        IndexError: As :func:`token_logps`.
    """
    logits, labels = _checks.check_logits_and_labels(logits, labels)
    options = resolve_token_options(
        ignore_index=ignore_index, shift=shift, logit_scale=logit_scale, softcap=softcap
    )
    average_log_prob = _checks.check_bool("average_log_prob", average_log_prob)
    _checks.check_inplace_backward(inplace_backward, logits)
    logps = _ops.token_logps(logits, labels, options, inplace_backward)
    return _ops.sequence_logps(logps, labels, ignore_index, shift, average_log_prob)


def simpo_loss_from_logps(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float | None = None,
    gamma: float | None = None,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # [P], [P], [P]
    """The preference loss of each pair, from sequence log-probabilities.

    See :func:`simpo_loss` for the formula; it is the same kernel. Signature and result are those of
    ``simpo_loss`` in Princeton's SimPOTrainer.

    Args:
        chosen_logps: [P] floating-point, usually means over tokens.
        rejected_logps: [P].
        beta: Scale of the rewards, > 0.
        gamma_beta_ratio: Target margin over beta. Default 0.5.
        gamma: Target margin, instead of ``gamma_beta_ratio``.
        loss_type: ``"sigmoid"`` or ``"hinge"``.
        label_smoothing: Probability in [0, 0.5] that a pair's order is wrong; sigmoid only.

    Returns:
        losses [P], chosen_rewards [P] and rejected_rewards [P] (both beta * logps, detached);
        float32, or float64 if either input is.

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
        shift=False,
    )
    # A sequence log-probability is the log-probability of a sequence of one token.
    dtype = _ops.compute_dtype(torch.promote_types(chosen_logps.dtype, rejected_logps.dtype))
    token_logps = torch.cat((chosen_logps.to(dtype), rejected_logps.to(dtype))).unsqueeze(1)
    labels = torch.zeros_like(token_logps, dtype=torch.int64)
    out = _ops.preference_loss(token_logps, labels, options)
    pairs = chosen_logps.shape[0]
    return out.losses, out.rewards[:pairs], out.rewards[pairs:]


def simpo_loss(
    logits: Tensor,  # [2P, T, V]
    labels: Tensor,  # [2P, T]
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float | None = None,
    gamma: float | None = None,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    sft_reduction: SftReduction = "sequence",
    average_log_prob: bool = True,
    reduction: Reduction = "mean",
    normalizer: Normalizer = None,
    empty: EmptyPolicy = "drop",
    ignore_index: int = -100,
    shift: bool = True,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
    report: Collection[ReportName] = (),
) -> SimPOOutput:
    r"""SimPO's loss from the logits of chosen and rejected completions.

    With l the mean (or sum) log-probability of a completion's valid tokens, of each pair

        z = (l_chosen - l_rejected) - gamma_beta_ratio
        sigmoid: -logsigmoid(beta z) (1 - label_smoothing) - logsigmoid(-beta z) label_smoothing
        hinge:   relu(1 - beta z), with subgradient 0 at the kink

    and ``loss = reduce(losses) + sft_weight * sft_loss`` (arXiv 2405.14734, eq. 6; the hinge and
    the SFT term as in the authors' trainer).

    Args:
        logits: [2P, T, V] float64, float32, bfloat16 or float16; chosen rows first. See
            :func:`token_logps` for strides and non-finite values.
        labels: [2P, T] of an integer dtype; ``ignore_index`` at prompt and padding.
        beta: Scale of the rewards, > 0.
        gamma_beta_ratio: Target margin over beta. Default 0.5.
        gamma: Target margin, instead of ``gamma_beta_ratio``.
        loss_type: ``"sigmoid"`` or ``"hinge"``.
        label_smoothing: Probability in [0, 0.5] that a pair's order is wrong; sigmoid only.
        sft_weight: Weight of the SFT term, >= 0.
        sft_reduction: ``"sequence"``: -chosen_logps, reduced as the losses are. ``"token"``: cross
            entropy over all valid chosen tokens of the batch, as Princeton, TRL and Liger have it.
        average_log_prob: True: l is the mean over valid tokens; False: the sum.
        reduction: ``"mean"`` over counted pairs (and, for a token-wise SFT term, over their chosen
            tokens), ``"sum"``, or ``"none"``: loss is [P].
        normalizer: Replaces the denominator of ``"mean"``, for gradient accumulation and data
            parallelism: a number of pairs, or (pairs, tokens), of which a token-wise SFT term needs
            the second. Numbers, or tensors of no dimension, which are not read to be checked.
        empty: What becomes of a pair with a completion that has no valid token. ``"drop"``: it
            contributes nothing, to loss, gradient and denominators, and is counted in the metrics;
            a batch of nothing else has loss 0. Its other completion keeps its logps and their
            gradient. ``"nan"``: it makes the loss NaN.
        ignore_index: See :func:`token_logps`.
        shift: See :func:`token_logps`.
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
        ValueError: A shape, a device, a number or a combination does not fit.
        IndexError: A label of CPU tensors is neither ``ignore_index`` nor in [0, V). Under
            ``torch.compile`` it may come as a RuntimeError. On a GPU, which is not waited for, such
            a label makes its position's log-probability and gradient NaN instead.
    """
    logits, labels = _checks.check_logits_and_labels(logits, labels)
    _checks.check_even_batch("logits", logits.shape[0])
    options = resolve_preference_options(
        beta=beta,
        gamma_beta_ratio=gamma_beta_ratio,
        gamma=gamma,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        sft_weight=sft_weight,
        sft_reduction=sft_reduction,
        average_log_prob=average_log_prob,
        reduction=reduction,
        empty=empty,
        ignore_index=ignore_index,
        shift=shift,
    )
    denominators = resolve_normalizer(normalizer, reduction, sft_reduction)
    token_options = resolve_token_options(
        ignore_index=ignore_index, shift=shift, logit_scale=logit_scale, softcap=softcap
    )
    _checks.check_inplace_backward(inplace_backward, logits)
    names = check_report(report)
    return compose_output(
        options,
        denominators,
        lambda op_options: _ops.simpo_loss(
            logits,
            labels,
            token_options,
            op_options,
            inplace_backward,
            "logits_all" in names if names else None,
        ),
        Report(names, labels) if names else None,
    )
