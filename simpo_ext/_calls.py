"""Turns the keywords of a public function into the checked options of a call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from functools import lru_cache, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from ._inputs.checks import check_number
from ._metrics.report import ReportName
from ._ops.records import LossOptions, TokenOptions
from .options import DEFAULTS, OPTIONS, Normalizer, Number, check_optional_count
from .presets import Semantics, with_preset

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _remembered(resolve: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Caches ``resolve``, so that repeated calls do not check the same keywords again."""
    # Typed: True, 1 and 1.0 are equal as keys, but 1 is an error where a bool is expected.
    remember = cast(Callable[Parameters, Result], lru_cache(typed=True)(resolve))

    @wraps(resolve)
    def call(*args: Parameters.args, **keywords: Parameters.kwargs) -> Result:
        if not torch.compiler.is_compiling():  # Dynamo cannot trace the cache
            try:
                return remember(*args, **keywords)
            except TypeError:  # an unhashable value, or an error that the call below raises again
                pass
        return resolve(*args, **keywords)

    return call


def _completed(keywords: type, given: dict[str, Any]) -> dict[str, Any]:
    """Adds the defaults of the keywords that were not given."""
    defaults = DEFAULTS[keywords]
    for name in given:
        if name not in defaults:
            raise TypeError(
                f"unexpected keyword argument {name!r}: expected one of {', '.join(defaults)}"
            )
    return {**defaults, **given}


class TokenCall(NamedTuple):
    """The options of a function that returns token log-probabilities."""

    tokens: TokenOptions
    inplace_backward: bool = False
    logits_budget_bytes: int | None = None
    num_valid_tokens: int | None = None

    def with_count(self, num_valid_tokens: object) -> TokenCall:
        """Adds ``num_valid_tokens``. It varies by batch, so it is not in the cache."""
        count = check_optional_count("num_valid_tokens", num_valid_tokens)
        return self._replace(num_valid_tokens=count)


class LossCall(NamedTuple):
    """The options of a function that returns a loss."""

    loss: LossOptions
    tokens: TokenOptions
    inplace_backward: bool
    logits_budget_bytes: int | None
    report: tuple[ReportName, ...]


# The options of a loss that are not part of LossOptions. No function has all of them.
_BESIDE_LOSS = ("logit_scale", "softcap", "inplace_backward", "report", "logits_budget_bytes")
_DEFAULTS_BESIDE_LOSS = {name: OPTIONS[name].default for name in _BESIDE_LOSS}


def _checked(names: Collection[str], values: dict[str, Any]) -> dict[str, Any]:
    return {name: OPTIONS[name].check(name, values[name]) for name in names}


@_remembered
def resolve_token_options(keywords: type, **given: Any) -> TokenCall:
    """Checks the options of a function that takes :class:`TokenKeywords`, and possibly more."""
    values = _completed(keywords, given)
    checked = _checked(values.keys(), values)
    tokens = TokenOptions(**{name: checked.pop(name) for name in TokenOptions._fields})
    return TokenCall(tokens, **checked)


@_remembered
def resolve_loss_options(keywords: type, **given: Any) -> LossCall:
    """Checks the options of a loss, one by one and together, except ``normalizer``."""
    values = _completed(keywords, given)
    if values["gamma"] is not None and values["gamma_beta_ratio"] is not None:
        raise ValueError(
            "gamma, gamma_beta_ratio: expected at most one of the two, "
            f"got gamma={values['gamma']} and gamma_beta_ratio={values['gamma_beta_ratio']}"
        )
    semantics = with_preset(values["preset"], **{name: values[name] for name in Semantics._fields})
    has_sft_reduction = values["sft_reduction"] is not None
    values.update(semantics._asdict())
    beta = OPTIONS["beta"].check("beta", semantics.beta)
    values["gamma_beta_ratio"] = _margin_over_beta(semantics, beta)
    loss = LossOptions(**_checked(LossOptions._fields, values))
    if loss.loss_type != "sigmoid" and loss.label_smoothing > 0.0:
        raise ValueError(
            f"label_smoothing: expected 0 with loss_type={loss.loss_type!r}, got "
            f"{loss.label_smoothing}"
        )
    if loss.sft_weight == 0.0 and not has_sft_reduction:
        loss = loss._replace(sft_reduction="sequence")  # ignores a preset's "token": no SFT term
    if loss.sft_reduction == "token" and loss.reduction == "none":
        raise ValueError(
            "sft_reduction: expected 'sequence' with reduction='none', since a mean over the "
            "batch's tokens belongs to no pair, got 'token'"
        )
    rest = _checked(_BESIDE_LOSS, {**_DEFAULTS_BESIDE_LOSS, **values})
    tokens = TokenOptions(loss.ignore_index, loss.shift, rest["logit_scale"], rest["softcap"])
    is_linear = "logits_budget_bytes" in DEFAULTS[keywords]
    if is_linear and "logits_all" in rest["report"] and values["softcap"] is not None:
        # Without logits, "logits_all" is computed from the weight's mean row; a cap is not linear.
        raise ValueError(
            "report: expected no 'logits_all' with a softcap, because the mean of capped logits "
            f"needs all of these logits, got softcap={values['softcap']}"
        )
    return LossCall(
        loss, tokens, rest["inplace_backward"], rest["logits_budget_bytes"], rest["report"]
    )


def _margin_over_beta(semantics: Semantics, beta: float) -> float:
    """Returns ``gamma_beta_ratio``, or computes it from ``gamma``."""
    if semantics.gamma_beta_ratio is not None:
        return check_number("gamma_beta_ratio", semantics.gamma_beta_ratio)
    assert semantics.gamma is not None
    ratio = check_number("gamma", semantics.gamma) / beta
    if abs(ratio) > sys.float_info.max:
        raise ValueError(
            f"gamma: expected gamma / beta to be finite, got {semantics.gamma} / {beta}"
        )
    return ratio


def resolve_normalizer(
    normalizer: Normalizer, options: LossOptions
) -> tuple[Number, Number] | None:
    """The denominators of the mean preference loss and of the mean SFT term; None: count them."""
    if normalizer is None:
        return None
    by_token = options.sft_reduction == "token"
    if options.reduction != "mean":
        raise ValueError(
            f"normalizer: expected None with reduction={options.reduction!r}, which has no "
            f"denominator, got {normalizer}"
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
                "FSDP2 casts the arguments of forward, unless its MixedPrecisionPolicy has "
                "cast_forward_inputs=False"
            )
        return value  # To check its value, the host would wait for the GPU.
    return check_number(name, value, above=0.0)
