"""SimPO as functions of logits, of log-probabilities, or of hidden states and lm_head.

A batch has B sequences of T positions and a vocabulary of V. If sequences are pairs, rows 0..P-1
are chosen and rows P..2P-1 are rejected, unless ``pairs`` says otherwise. With ``cu_seqlens``, S
sequences lie one after the other in N positions. Formulas: SimPO, arXiv 2405.14734.
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
        **options: See :class:`simpo_ext.options.LogitsKeywords`.

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
    """Log-probability of each sequence: the mean of its valid tokens', or their sum.

    Args:
        logits: [B, T, V], as for :func:`token_logps`, as are all arguments not listed here.
        labels: [B, T].
        cu_seqlens: See :func:`token_logps`.
        average_log_prob: True: the mean over valid tokens, which is SimPO's; False: the sum.
        **options: See :class:`simpo_ext.options.LogitsKeywords`.

    Returns:
        [B], or [S], float32 (float64 for float64 logits). NaN for a sequence without a valid token:
        not 0, which would be the highest log-probability there is.

    Raises:
        TypeError: As :func:`token_logps`.
        ValueError: As :func:`token_logps`.
        IndexError: As :func:`token_logps`.
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
    # A sequence log-probability is the log-probability of a sequence of one token.
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
        **options: See :class:`simpo_ext.options.LossKeywords`.

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
        **options: See :class:`simpo_ext.options.PreferenceKeywords`.

    Returns:
        A :class:`SimPOOutput`.

    Raises:
        TypeError: As :func:`simpo_loss`.
        ValueError: As :func:`simpo_loss`.
        IndexError: As :func:`simpo_loss`, but for labels.
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
    batch = labels_batch(labels, cu_seqlens).paired(pairs, None)
    check_choice("empty", empty, ENUMS["empty"])
    validity = Validity(
        check_ignore_index("ignore_index", ignore_index), check_bool("shift", shift)
    )
    boundaries, pairs = batch.layout.cu_seqlens, batch.layout.pairs
    targets, validity = _marks_of_valid_tokens(batch.labels, boundaries, validity)
    # The op counts the tokens that are scored; the log-probabilities do not matter.
    logps = torch.zeros((), dtype=torch.float32, device=targets.device).expand(targets.shape)
    _, num_tokens = _sequence_logps(logps, targets, boundaries, validity, False)
    # Compiled code cannot read values. There, as on a GPU, the counts become NaN.
    if pairs is not None and pairs.device.type == "cpu" and not torch.compiler.is_compiling():
        check_pairs_in_range(pairs, num_tokens.shape[0])
    return PairCounts(*count_sides(num_tokens, empty, pairs))


def _marks_of_valid_tokens(
    labels: Tensor,  # [B, T]
    cu_seqlens: Tensor | None,  # [S + 1]
    validity: Validity,
) -> tuple[Tensor, Validity]:
    """Labels that are 0 where nothing is scored and 1 elsewhere, and the options to read them."""
    marks = (labels != validity.ignore_index).to(torch.int64)
    options = TokenOptions(0, validity.shift, logit_scale=1.0, softcap=0.0)
    marks, options = sequence_targets(marks, cu_seqlens, 2, options)
    return marks, options.validity
