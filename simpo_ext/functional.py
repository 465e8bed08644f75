"""SimPO as functions of logits, of log-probabilities, or of hidden states and lm_head.

A batch has B sequences of T positions and a vocabulary of V. If sequences are pairs, rows 0..P-1
are chosen and rows P..2P-1 are rejected, unless ``pairs`` says otherwise. With ``cu_seqlens``, S
sequences are packed into N positions. Formulas: SimPO, arXiv 2405.14734.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from ._calls import resolve_loss_options, resolve_normalizer, resolve_token_options
from ._inputs.batch import check_pairs_in_range, labels_batch, logits_batch, token_logps_batch
from ._inputs.checks import (
    check_bool,
    check_choice,
    check_floating,
    check_ignore_index,
    check_same_device,
)
from ._metrics.output import Report, SimPOOutput, compose_output
from ._metrics.report import count_sides
from ._ops import fast_path
from ._ops.fast_path import is_plain_call
from ._ops.preference_loss import preference_loss
from ._ops.records import ENUMS, LossOptions, LossOutputs, TokenOptions, Validity, compute_dtype
from ._ops.sequences import sequence_logps as _sequence_logps
from ._ops.sequences import sequence_targets
from ._ops.token_logps import token_logps as _token_logps
from .distributed.normalizer import PairCounts
from .linear import linear_simpo_loss, linear_token_logps
from .options import EmptyPolicy, LogitsKeywords, LossKeywords, LossType, PreferenceKeywords, takes
from .presets import Semantics, with_preset

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


@takes(LogitsKeywords)
def token_logps(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    **options: Unpack[LogitsKeywords],
) -> Tensor:  # [B, T]
    """Log-probability of each label under the logits: ``log_softmax(z)[label]``.

    z is ``logit_scale * logits``, or ``softcap * tanh(logit_scale * logits / softcap)``.

    The gradient is the only allocation of size [B, T, V]. Masked positions are never read. The
    result of a valid position is NaN if its z contain NaN or +inf, or are all -inf.

    Args:
        logits: [B, T, V] float64, float32, bfloat16 or float16. Any strides; logits whose
            vocabulary is not contiguous are copied.
        labels: [B, T] of an integer dtype, each ``ignore_index`` or in [0, V).
        cu_seqlens: [S + 1] int64 or int32, not decreasing: sequences packed into one row. Then
            logits are [N, V] and labels [N], or [1, N, V] and [1, N]. Sequence s has the positions
            from ``cu_seqlens[s]`` up to ``cu_seqlens[s + 1]``. The label shift does not cross the
            end of a sequence. Positions before the first sequence and after the last are masked. It
            may be on the CPU while the logits are on a GPU.
        **options: See :class:`simpo_ext.options.LogitsKeywords`.

    Returns:
        [B, T], or the shape of packed labels, float32 (float64 for float64 logits). The entry at t
        belongs to the logits at t; it is 0 where masked.

    Raises:
        TypeError: An argument is of the wrong type, or a tensor of the wrong dtype or layout.
        ValueError: A shape, a device or a number does not fit; ``cu_seqlens`` on the CPU decrease
            or leave [0, N]; or ``inplace_backward`` is True for logits that cannot be overwritten.
            If ``cu_seqlens`` on a GPU are wrong, the sequence is masked: the host does not wait.
        IndexError: A label of CPU tensors is neither ``ignore_index`` nor in [0, V). On a GPU, such
            a label makes the log-probability and the gradient of its position NaN. Under
            ``torch.compile``, an error about a value may be a RuntimeError.
        NotImplementedError: ``logits`` carry a tangent of forward-mode differentiation.
        RuntimeError: There are no kernels for the device, or the gradient is differentiated again.
    """
    call = resolve_token_options(LogitsKeywords, **options)
    batch = logits_batch(logits, labels, cu_seqlens, call.inplace_backward)
    targets, tokens = sequence_targets(
        batch.labels, batch.layout.cu_seqlens, batch.tokens.shape[2], call.tokens
    )
    return batch.as_given(_token_logps(batch.tokens, targets, tokens, call.inplace_backward))


@takes(LogitsKeywords)
def sequence_logps(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    average_log_prob: bool = True,
    **options: Unpack[LogitsKeywords],
) -> Tensor:  # [B], or [S]
    """Log-probability of each sequence: the mean over its valid tokens, or their sum.

    Args:
        logits: [B, T, V]; see :func:`token_logps`.
        labels: [B, T].
        cu_seqlens: See :func:`token_logps`.
        average_log_prob: True (default): the mean over valid tokens, as in SimPO. False: the sum.
        **options: See :class:`simpo_ext.options.LogitsKeywords`.

    Returns:
        [B], or [S], float32 (float64 for float64 logits). NaN for a sequence without a valid token,
        since 0 would be the highest possible log-probability.

    Raises:
        TypeError: See :func:`token_logps`.
        ValueError: See :func:`token_logps`.
        IndexError: See :func:`token_logps`.
    """
    average_log_prob = check_bool("average_log_prob", average_log_prob)
    call = resolve_token_options(LogitsKeywords, **options)
    batch = logits_batch(logits, labels, cu_seqlens, call.inplace_backward)
    cu_seqlens = batch.layout.cu_seqlens
    targets, tokens = sequence_targets(batch.labels, cu_seqlens, batch.tokens.shape[2], call.tokens)
    logps = _token_logps(batch.tokens, targets, tokens, call.inplace_backward)
    of_sequences, _ = _sequence_logps(logps, targets, cu_seqlens, tokens.validity, average_log_prob)
    return of_sequences


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

    :func:`simpo_loss` has the formula and uses the same kernel. Signature and result are those of
    ``simpo_loss`` in Princeton's SimPOTrainer.

    Args:
        chosen_logps: [P] floating-point, usually means over tokens.
        rejected_logps: [P].
        pair_weight: See :func:`simpo_loss`.
        beta: Scale of the rewards, > 0.
        gamma_beta_ratio: Target margin over beta. Default 0.5, and 0 for ``"ipo"``.
        gamma: Target margin, instead of ``gamma_beta_ratio``.
        loss_type: ``"sigmoid"``, ``"hinge"`` or ``"ipo"``.
        label_smoothing: See :func:`simpo_loss`.
        alpha: See :func:`simpo_loss`.

    Returns:
        losses [P], chosen_rewards [P] and rejected_rewards [P]; the rewards are beta * r, detached.
        float32, or float64 if an input is float64.

    Raises:
        TypeError: An argument is of the wrong type, or a tensor of the wrong dtype or layout.
        ValueError: A shape, a device or a number does not fit.
    """
    chosen_logps = check_floating("chosen_logps", chosen_logps)
    rejected_logps = check_floating("rejected_logps", rejected_logps)
    if chosen_logps.dim() != 1:
        raise ValueError(f"chosen_logps: expected shape [P], got {list(chosen_logps.shape)}")
    if rejected_logps.shape != chosen_logps.shape:
        raise ValueError(
            f"rejected_logps: expected shape {list(chosen_logps.shape)} to match chosen_logps, "
            f"got {list(rejected_logps.shape)}"
        )
    check_same_device("rejected_logps", rejected_logps, "chosen_logps", chosen_logps)
    options = resolve_loss_options(
        PreferenceKeywords,
        beta=beta,
        gamma_beta_ratio=gamma_beta_ratio,
        gamma=gamma,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        alpha=alpha,
        shift=False,
    ).loss
    # The op gets each sequence's log-probability as that of a sequence of one token.
    dtype = compute_dtype(torch.promote_types(chosen_logps.dtype, rejected_logps.dtype))
    logps = torch.cat((chosen_logps.to(dtype), rejected_logps.to(dtype))).unsqueeze(1)
    labels = torch.zeros_like(logps, dtype=torch.int64)
    batch = token_logps_batch(logps, labels, None).paired(None, pair_weight)
    out = preference_loss(logps, labels, batch.layout, options)
    pairs = chosen_logps.shape[0]
    return out.losses, out.rewards[:pairs], out.rewards[pairs:]


@takes(LossKeywords)
def simpo_loss(
    logits: Tensor,  # [2P, T, V]
    labels: Tensor,  # [2P, T]
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    pairs: Tensor | None = None,  # [P, 2]
    pair_weight: Tensor | None = None,  # [P]
    **options: Unpack[LossKeywords],
) -> SimPOOutput:
    r"""SimPO's loss from the logits of chosen and rejected completions.

    Let l be the mean (or sum) log-probability of a completion's valid tokens. For each pair

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
            indices of rows or of packed sequences. A sequence may be in no pair or in several, and
            counts once for each. ``pairs`` may be on the CPU while the logits are on a GPU.
        pair_weight: [P] real constants. A factor on a pair's loss and SFT term. It does not change
            the denominator; ``normalizer=pair_weight.sum()`` gives a weighted mean. A pair with
            weight 0 is left out, even if its loss is NaN.
        **options: See :class:`simpo_ext.options.LossKeywords`.

    Returns:
        A :class:`SimPOOutput`.

    Raises:
        TypeError: An argument is of the wrong type, or a tensor of the wrong dtype or layout.
        ValueError: A shape, a device, a number or a combination does not fit, or ``cu_seqlens`` on
            the CPU decrease or leave [0, N].
        IndexError: In CPU tensors, a label is neither ``ignore_index`` nor in [0, V), or one of
            ``pairs`` names a sequence that does not exist. On a GPU, a wrong value makes its
            position, sequence or pair NaN: the host does not wait. Under ``torch.compile``, an
            error about a value may be a RuntimeError.
    """
    normalizer = options.pop("normalizer", None)
    call = resolve_loss_options(LossKeywords, **options)
    denominators = resolve_normalizer(normalizer, call.loss)
    batch = logits_batch(logits, labels, cu_seqlens, call.inplace_backward)
    batch = batch.paired(pairs, pair_weight)
    targets, tokens = sequence_targets(
        batch.labels, batch.layout.cu_seqlens, batch.tokens.shape[2], call.tokens
    )
    all_positions = "logits_all" in call.report if call.report else None

    def loss(loss_options: LossOptions) -> LossOutputs:
        return fast_path.simpo_loss(
            batch.tokens,
            targets,
            batch.layout,
            tokens,
            loss_options,
            call.inplace_backward,
            all_positions,
        )

    report = Report(call.report, targets, batch.layout) if call.report else None
    return compose_output(call.loss._replace(shift=tokens.shift), denominators, loss, report)


@takes(PreferenceKeywords)
def simpo_loss_from_token_logps(
    token_logps: Tensor,  # [2P, T]
    labels: Tensor,  # [2P, T]
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    pairs: Tensor | None = None,  # [P, 2]
    pair_weight: Tensor | None = None,  # [P]
    **options: Unpack[PreferenceKeywords],
) -> SimPOOutput:
    """SimPO's loss from token log-probabilities of any origin.

    This is the part of :func:`simpo_loss` that follows :func:`token_logps`. Use it if a
    vocabulary-parallel lm_head or your own kernel computes the log-probabilities.

    Args:
        token_logps: [2P, T], or packed [N] or [1, N], float32 or float64. Masked positions are not
            read. With ``shift``, the entry at t belongs to ``labels[:, t + 1]``, as
            :func:`token_logps` returns it.
        labels: The same shape as ``token_logps``. Only whether a label is ``ignore_index`` matters.
        cu_seqlens: See :func:`simpo_loss`.
        pairs: See :func:`simpo_loss`.
        pair_weight: See :func:`simpo_loss`.
        **options: See :class:`simpo_ext.options.PreferenceKeywords`.

    Returns:
        A :class:`SimPOOutput`.

    Raises:
        TypeError: See :func:`simpo_loss`.
        ValueError: See :func:`simpo_loss`.
        IndexError: See :func:`simpo_loss`; labels are not checked.
    """
    normalizer = options.pop("normalizer", None)
    loss_options = resolve_loss_options(PreferenceKeywords, **options).loss
    denominators = resolve_normalizer(normalizer, loss_options)
    batch = token_logps_batch(token_logps, labels, cu_seqlens).paired(pairs, pair_weight)
    validity = Validity(loss_options.ignore_index, loss_options.shift)
    targets, validity = _marks_of_valid_tokens(batch.labels, batch.layout.cu_seqlens, validity)
    return compose_output(
        loss_options._replace(**validity._asdict()),
        denominators,
        lambda options: preference_loss(batch.tokens, targets, batch.layout, options),
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
    """The denominators of :func:`simpo_loss`: counted pairs, and their chosen tokens.

    :func:`simpo_ext.distributed.global_normalizer` adds up those of micro-batches and ranks.

    Args:
        labels: [2P, T], or packed [N] or [1, N]. Their values are not checked.
        cu_seqlens: See :func:`simpo_loss`.
        pairs: See :func:`simpo_loss`.
        empty: ``"drop"``: a pair counts if both completions have a valid token. ``"nan"``: every
            pair counts.
        ignore_index: See :func:`token_logps`.
        shift: See :func:`token_logps`.

    Returns:
        :class:`PairCounts` on the device of ``labels``. The host does not wait for the device.

    Raises:
        TypeError: See :func:`simpo_loss`.
        ValueError: See :func:`simpo_loss`.
        IndexError: See :func:`simpo_loss`; labels are not checked.
    """
    batch = labels_batch(labels, cu_seqlens).paired(pairs, None)
    check_choice("empty", empty, ENUMS["empty"])
    validity = Validity(
        check_ignore_index("ignore_index", ignore_index), check_bool("shift", shift)
    )
    boundaries, pairs = batch.layout.cu_seqlens, batch.layout.pairs
    targets, validity = _marks_of_valid_tokens(batch.labels, boundaries, validity)
    # Only the op's counts of scored tokens are used; the log-probabilities do not matter.
    logps = torch.zeros((), dtype=torch.float32, device=targets.device).expand(targets.shape)
    _, num_tokens = _sequence_logps(logps, targets, boundaries, validity, False)
    # In compiled code and on a GPU, the host cannot check values. The counts become NaN instead.
    if pairs is not None and pairs.is_cpu and is_plain_call(pairs):
        check_pairs_in_range(pairs, num_tokens.shape[0])
    return PairCounts(*count_sides(num_tokens, empty, pairs))


def _marks_of_valid_tokens(
    labels: Tensor,  # [B, T]
    cu_seqlens: Tensor | None,  # [S + 1]
    validity: Validity,
) -> tuple[Tensor, Validity]:
    """Returns labels that are 1 where a token is scored and 0 elsewhere, and their options."""
    marks = (labels != validity.ignore_index).to(torch.int64)
    options = TokenOptions(0, validity.shift, logit_scale=1.0, softcap=0.0)
    marks, options = sequence_targets(marks, cu_seqlens, 2, options)
    return marks, options.validity
