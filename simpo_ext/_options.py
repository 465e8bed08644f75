"""From the public keywords to what the ops take: checked, defaults filled in, enums as ints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Literal, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from ._checks import check_bool, check_choice, check_count, check_ignore_index, check_number
from ._presets import Preset, TrainerLossType, with_preset

LossType = Literal["sigmoid", "hinge", "ipo"]
Reduction = Literal["none", "mean", "sum"]
SftReduction = Literal["sequence", "token"]
EmptyPolicy = Literal["drop", "nan"]
ReportName = Literal["logits", "logits_all", "entropy"]

Parameters = ParamSpec("Parameters")
Options = TypeVar("Options")

Number = float | Tensor
Normalizer = Number | tuple[Number, Number] | None

# The values of the enums in csrc/core/loss_math.h.
LOSS_TYPES = {"sigmoid": 0, "hinge": 1, "ipo": 2}
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
SFT_REDUCTIONS = {"sequence": 0, "token": 1}
EMPTY_POLICIES = {"drop": 0, "nan": 1}

# How much of the logits is held at a time unless the caller says: on a GPU, one part in so many of
# its memory; elsewhere, and for a GPU that this machine lacks, so many bytes.
DEFAULT_LOGITS_BUDGET_SHARE = 16
DEFAULT_LOGITS_BUDGET_BYTES = 1 << 30


def _gpu_memory(device: torch.device) -> int | None:
    """In bytes. None: fake tensors are on a GPU, and this machine has none."""
    if not torch.cuda.is_available():
        return None
    memory: int = torch.cuda.get_device_properties(device).total_memory
    return memory


def default_logits_budget(device: torch.device) -> int:
    """The default of ``logits_budget_bytes``. Under ``torch.compile`` it is a constant."""
    memory = _gpu_memory(device) if device.type == "cuda" else None
    return DEFAULT_LOGITS_BUDGET_BYTES if memory is None else memory // DEFAULT_LOGITS_BUDGET_SHARE


def name_of(value: int, names: dict[str, int]) -> str:
    """The keyword's value that an op takes as ``value``."""
    return next(name for name, number in names.items() if number == value)


class TokenOptions(NamedTuple):
    """The trailing arguments of the token_logps op."""

    ignore_index: int
    shift: bool
    logit_scale: float
    softcap: float  # 0: none


class PreferenceOptions(NamedTuple):
    """The trailing arguments of the preference_loss op."""

    ignore_index: int
    shift: bool
    average_log_prob: bool
    beta: float
    gamma_beta_ratio: float
    loss_type: int
    label_smoothing: float
    alpha: float
    sft_weight: float
    sft_reduction: int
    reduction: int
    empty: int


def _remembered(resolve: Callable[Parameters, Options]) -> Callable[Parameters, Options]:
    """Checks keywords once for all the calls that repeat them. What raises is not remembered."""
    # Typed: True, 1 and 1.0 are equal, and not equally good.
    remember = cast(Callable[Parameters, Options], lru_cache(typed=True)(resolve))

    @wraps(resolve)
    def call(*args: Parameters.args, **keywords: Parameters.kwargs) -> Options:
        if not torch.compiler.is_compiling():  # which has no use for the cache
            try:
                return remember(*args, **keywords)
            except TypeError:  # of a value that cannot be a key, or raised again below
                pass
        return resolve(*args, **keywords)

    return call


@_remembered
def resolve_token_options(
    *, ignore_index: int, shift: bool, logit_scale: float, softcap: float | None
) -> TokenOptions:
    """Checks the keywords of :func:`simpo_ext.functional.token_logps`."""
    return TokenOptions(
        ignore_index=check_ignore_index(ignore_index),
        shift=check_bool("shift", shift),
        # Where float32 keeps the digits of a product or quotient with a logit.
        logit_scale=check_number("logit_scale", logit_scale, at_least=1e-30),
        softcap=0.0
        if softcap is None
        else check_number("softcap", softcap, at_least=1e-30, at_most=1e30),
    )


@_remembered
def resolve_preference_options(
    *,
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
    empty: EmptyPolicy | None = None,
    ignore_index: int = -100,
    shift: bool | None = None,
) -> PreferenceOptions:
    """Checks the keywords of :func:`simpo_ext.functional.simpo_loss`, one by one and together."""
    if gamma is not None and gamma_beta_ratio is not None:
        raise ValueError(
            "gamma, gamma_beta_ratio: expected at most one of the two, "
            f"got gamma={gamma} and gamma_beta_ratio={gamma_beta_ratio}"
        )
    given = with_preset(
        preset,
        loss_type=loss_type,
        beta=beta,
        gamma_beta_ratio=gamma_beta_ratio,
        gamma=gamma,
        sft_weight=sft_weight,
        sft_reduction=sft_reduction,
        average_log_prob=average_log_prob,
        empty=empty,
        shift=shift,
    )
    beta = check_number("beta", given.beta, above=0.0)
    ratio = _resolve_margin(beta, given.gamma_beta_ratio, given.gamma)
    label_smoothing = check_number("label_smoothing", label_smoothing, at_least=0.0, at_most=0.5)
    if given.loss_type != "sigmoid" and label_smoothing > 0.0:
        raise ValueError(
            f"label_smoothing: expected 0 with loss_type={given.loss_type!r}, got {label_smoothing}"
        )
    alpha = check_number("alpha", alpha)
    if alpha != 0.0 and not 1e-30 <= abs(alpha) <= 1e30:
        raise ValueError(f"alpha: expected 0 or a magnitude in [1e-30, 1e30], got {alpha}")
    sft_weight = check_number("sft_weight", given.sft_weight, at_least=0.0)
    if sft_weight == 0.0 and sft_reduction is None:  # a preset's, of a term that is not there
        given = given._replace(sft_reduction="sequence")
    check_choice("sft_reduction", given.sft_reduction, SFT_REDUCTIONS)
    check_choice("reduction", reduction, REDUCTIONS)
    if given.sft_reduction == "token" and reduction == "none":
        raise ValueError(
            "sft_reduction: expected 'sequence' with reduction='none', since a mean over the "
            "batch's tokens belongs to no pair, got 'token'"
        )
    check_choice("empty", given.empty, EMPTY_POLICIES)
    return PreferenceOptions(
        ignore_index=check_ignore_index(ignore_index),
        shift=check_bool("shift", given.shift),
        average_log_prob=check_bool("average_log_prob", given.average_log_prob),
        beta=beta,
        gamma_beta_ratio=ratio,
        loss_type=LOSS_TYPES[given.loss_type],
        label_smoothing=label_smoothing,
        alpha=alpha,
        sft_weight=sft_weight,
        sft_reduction=SFT_REDUCTIONS[given.sft_reduction],
        reduction=REDUCTIONS[reduction],
        empty=EMPTY_POLICIES[given.empty],
    )


def _resolve_margin(beta: float, gamma_beta_ratio: float | None, gamma: float | None) -> float:
    """The one of the two that is not None, over beta."""
    if gamma_beta_ratio is not None:
        return check_number("gamma_beta_ratio", gamma_beta_ratio)
    assert gamma is not None
    ratio = check_number("gamma", gamma) / beta
    if abs(ratio) > sys.float_info.max:
        raise ValueError(f"gamma: expected gamma / beta to be finite, got {gamma} / {beta}")
    return ratio


def resolve_linear_options(
    logits_budget_bytes: int | None, num_valid_tokens: int | None
) -> tuple[int | None, int | None]:
    """Checks the keywords that linear_token_logps has and token_logps has not."""
    if logits_budget_bytes is not None:
        logits_budget_bytes = check_count("logits_budget_bytes", logits_budget_bytes)
    if num_valid_tokens is not None:
        num_valid_tokens = check_count("num_valid_tokens", num_valid_tokens)
    return logits_budget_bytes, num_valid_tokens


def resolve_normalizer(
    normalizer: Normalizer, options: PreferenceOptions
) -> tuple[Number, Number] | None:
    """The denominators of the mean preference loss and of the mean SFT term; None: count them."""
    if normalizer is None:
        return None
    by_token = options.sft_reduction == SFT_REDUCTIONS["token"]
    if options.reduction != REDUCTIONS["mean"]:
        reduction = name_of(options.reduction, REDUCTIONS)
        raise ValueError(
            f"normalizer: expected None with reduction={reduction!r}, which divides by nothing, "
            f"got {normalizer}"
        )
    if isinstance(normalizer, tuple):
        if len(normalizer) != 2:
            raise ValueError(f"normalizer: expected (pairs, tokens), got {len(normalizer)} numbers")
        pairs = _check_denominator("normalizer[0]", normalizer[0])
        tokens = _check_denominator("normalizer[1]", normalizer[1])
        return pairs, tokens if by_token else pairs
    pairs = _check_denominator("normalizer", normalizer)
    if by_token:
        raise ValueError(
            "normalizer: expected (pairs, tokens) with sft_reduction='token', whose denominator is "
            f"a number of tokens, got {normalizer}"
        )
    return pairs, pairs


def _check_denominator(name: str, value: Number) -> Number:
    if isinstance(value, Tensor) and value.dim() == 0:
        if value.dtype in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"{name}: expected a dtype that holds counts, such as float32, got {value.dtype}; "
                "FSDP2 casts what goes through forward, unless its MixedPrecisionPolicy has "
                "cast_forward_inputs=False"
            )
        return value  # not read: that would wait for the device
    return check_number(name, value, above=0.0)
