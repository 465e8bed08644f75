"""Defines the options of the losses: their names, types, defaults, meanings and checks.

The public functions and modules take the keywords of a ``TypedDict`` below. :func:`takes` makes
their signatures and the options in their docstrings from it. :mod:`simpo_ext._calls` checks the
given options and adds the defaults.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Collection
from functools import partial
from typing import (
    Annotated,
    Any,
    NamedTuple,
    TypedDict,
    TypeVar,
    cast,
    get_args,
    get_type_hints,
)

from torch import Tensor

from ._inputs.checks import check_bool, check_choice, check_count, check_ignore_index, check_number
from ._metrics.report import ReportName, check_report
from ._ops.records import (
    ENUMS,
    EmptyPolicy,
    LossType,
    Reduction,
    SftReduction,
)
from .presets import Preset, TrainerLossType

__all__ = [
    "EmptyPolicy",
    "LinearKeywords",
    "LinearLossKeywords",
    "LinearModuleKeywords",
    "LogitsKeywords",
    "LossKeywords",
    "LossType",
    "Normalizer",
    "PreferenceKeywords",
    "Preset",
    "Reduction",
    "ReportName",
    "SftReduction",
    "TokenKeywords",
    "TrainerLossType",
]

Number = float | Tensor
Normalizer = Number | tuple[Number, Number] | None


class Option(NamedTuple):
    """An option of a function, without its name and type."""

    default: Any
    check: Callable[[str, Any], Any]
    """Takes name and value; returns the value to use, or raises."""
    meaning: str


def _unchecked(_name: str, value: Any) -> Any:
    return value


def _check_alpha(name: str, value: object) -> float:
    alpha = check_number(name, value)
    if alpha != 0.0 and not 1e-30 <= abs(alpha) <= 1e30:
        raise ValueError(f"{name}: expected 0 or a magnitude in [1e-30, 1e30], got {alpha}")
    return alpha


def _check_softcap(name: str, value: object) -> float:
    return 0.0 if value is None else check_number(name, value, at_least=1e-30, at_most=1e30)


def check_optional_count(name: str, value: object) -> int | None:
    """A count, or None."""
    return None if value is None else check_count(name, value)


def _one_of(name: str) -> Callable[[str, object], str]:
    return partial(check_choice, choices=ENUMS[name])


IgnoreIndex = Annotated[
    int, Option(-100, check_ignore_index, "The label of positions that are not scored.")
]
Shift = Option(
    True,
    check_bool,
    "True (default): position t is scored with ``labels[:, t + 1]``, as trainers of causal "
    "language models do, and the last position is masked. False: with ``labels[:, t]``.",
)
LogitScale = Annotated[
    float,
    # Above this bound, float32 keeps the digits of a product or quotient with a logit.
    Option(1.0, partial(check_number, at_least=1e-30), "Factor on the logits, at least 1e-30."),
]
Softcap = Annotated[
    float | None, Option(None, _check_softcap, "Bound of the logits, in [1e-30, 1e30], or None.")
]
InplaceBackward = Annotated[
    bool,
    Option(
        False,
        check_bool,
        "The backward overwrites ``logits`` with their gradient and allocates no memory for it. "
        "Code that reads the logits afterwards gets the gradient. A later backward through another "
        "function that saved the logits raises an error, and so does a second backward through "
        "this one. No effect under ``torch.compile`` or for hidden states.",
    ),
]
LogitsBudgetBytes = Annotated[
    int | None,
    Option(
        None,
        check_optional_count,
        "How many bytes of logits may be in memory at a time, >= 0. Default: a sixteenth of the "
        "GPU's memory, and 1 GiB on CPUs.",
    ),
]
NumValidTokens = Annotated[
    int | None,
    Option(
        None,
        check_optional_count,
        "An upper bound of the number of valid tokens. The call costs as much as that many valid "
        "tokens, but the host does not wait for the GPU. Default: the function counts the valid "
        "tokens; in a CUDA graph capture and under ``torch.compile``, it takes the number of all "
        "positions as the bound.",
    ),
]
Report = Annotated[
    Collection[ReportName],
    Option(
        (),
        check_report,
        'Metrics to add, out of ``"logits"``, ``"logits_all"`` and ``"entropy"``, each for '
        "``/chosen`` and ``/rejected``; NaN if no pair was counted. ``logits``: the mean of the "
        "logits after scale and softcap over the vocabulary, averaged over the completion tokens "
        "of the counted pairs. ``logits_all``: the same over all positions of all pairs, prompt "
        "and padding included, as trainers log it; this reads masked positions. ``entropy``: the "
        "entropy of the softmax in nats, averaged as ``logits``. The forward computes them in its "
        "one pass over the logits. Loss and gradients stay bitwise equal.",
    ),
]


class TokenKeywords(TypedDict, total=False):
    """How a position is scored."""

    ignore_index: IgnoreIndex
    shift: Annotated[bool, Shift]
    logit_scale: LogitScale
    softcap: Softcap


class LogitsKeywords(TokenKeywords, total=False):
    """The options of :func:`simpo_ext.token_logps`."""

    inplace_backward: InplaceBackward


class LinearKeywords(TokenKeywords, total=False):
    """The options of :func:`simpo_ext.linear_token_logps`."""

    logits_budget_bytes: LogitsBudgetBytes
    num_valid_tokens: NumValidTokens


class PreferenceKeywords(TypedDict, total=False):
    """The options of :func:`simpo_ext.simpo_loss_from_token_logps`."""

    preset: Annotated[
        Preset | None,
        Option(
            None,
            _unchecked,
            '``"princeton"``, ``"trl"``, ``"liger"`` or ``"llamafactory"``: that trainer\'s '
            "formula, defaults and names for ``loss_type``. A given keyword overrides the preset. "
            "See :func:`with_preset`.",
        ),
    ]
    beta: Annotated[
        float | None,
        Option(None, partial(check_number, above=0.0), "Scale of the rewards, > 0. Default 2.0."),
    ]
    gamma_beta_ratio: Annotated[
        float | None,
        Option(None, check_number, 'Target margin over beta. Default 0.5, and 0 for ``"ipo"``.'),
    ]
    gamma: Annotated[
        float | None,
        Option(None, check_number, "Target margin, instead of ``gamma_beta_ratio``."),
    ]
    loss_type: Annotated[
        TrainerLossType | None,
        Option(None, _one_of("loss_type"), '``"sigmoid"`` (default), ``"hinge"`` or ``"ipo"``.'),
    ]
    label_smoothing: Annotated[
        float,
        Option(
            0.0,
            partial(check_number, at_least=0.0, at_most=0.5),
            "Probability in [0, 0.5] that a pair's order is wrong; sigmoid only.",
        ),
    ]
    alpha: Annotated[
        float, Option(0.0, _check_alpha, "AlphaPO's alpha: 0, or a magnitude in [1e-30, 1e30].")
    ]
    sft_weight: Annotated[
        float | None,
        Option(
            None, partial(check_number, at_least=0.0), "Weight of the SFT term, >= 0. Default 0."
        ),
    ]
    sft_reduction: Annotated[
        SftReduction | None,
        Option(
            None,
            _one_of("sft_reduction"),
            '``"sequence"`` (default): -chosen_logps, reduced like the losses. ``"token"``: the '
            "cross entropy over all valid chosen tokens of the batch, as in Princeton's trainer, "
            "TRL and Liger.",
        ),
    ]
    average_log_prob: Annotated[
        bool | None,
        Option(
            None,
            check_bool,
            "True (default): the log-probability of a completion is the mean over its valid "
            "tokens. False: their sum.",
        ),
    ]
    reduction: Annotated[
        Reduction,
        Option(
            "mean",
            _one_of("reduction"),
            '``"mean"`` over counted pairs (for a token-wise SFT term, over their chosen tokens), '
            '``"sum"``, or ``"none"``: loss is [P].',
        ),
    ]
    normalizer: Annotated[
        Normalizer,
        Option(
            None,
            _unchecked,
            'Replaces the denominator of ``"mean"``, for gradient accumulation and data '
            "parallelism: a number of pairs, or (pairs, tokens); a token-wise SFT term needs both. "
            "Each is a number or a tensor of shape []. The host does not read such a tensor. See "
            ":func:`count_pairs` and :func:`simpo_ext.distributed.global_normalizer`.",
        ),
    ]
    empty: Annotated[
        EmptyPolicy | None,
        Option(
            None,
            _one_of("empty"),
            'What happens to a pair with a completion that has no valid token. ``"drop"`` '
            "(default): it adds nothing to loss, gradient and denominators; the metrics count it. "
            "If all pairs are dropped, the loss is 0. The other completion keeps its "
            'log-probability and its gradient. ``"nan"``: the loss is NaN.',
        ),
    ]
    ignore_index: IgnoreIndex
    shift: Annotated[bool | None, Shift._replace(default=None)]


class _CommonLossKeywords(PreferenceKeywords, total=False):
    logit_scale: LogitScale
    softcap: Softcap
    inplace_backward: InplaceBackward


class LossKeywords(_CommonLossKeywords, total=False):
    """The options of :func:`simpo_ext.simpo_loss` and :class:`simpo_ext.SimPOLoss`."""

    report: Report


class LinearModuleKeywords(_CommonLossKeywords, total=False):
    """The options of :class:`simpo_ext.LinearSimPOLoss`."""

    logits_budget_bytes: LogitsBudgetBytes
    report: Report


class LinearLossKeywords(_CommonLossKeywords, total=False):
    """The options of :func:`simpo_ext.linear_simpo_loss`."""

    logits_budget_bytes: LogitsBudgetBytes
    num_valid_tokens: NumValidTokens
    report: Report


def _options_of(keywords: type) -> dict[str, tuple[Any, Option]]:
    """Maps each name to its type and option: first those of the base classes."""
    hints = get_type_hints(keywords, include_extras=True)
    return {name: cast(tuple[Any, Option], get_args(hint)[:2]) for name, hint in hints.items()}


_KEYWORDS: dict[type, dict[str, tuple[Any, Option]]] = {
    keywords: _options_of(keywords)
    for keywords in (
        TokenKeywords,
        LogitsKeywords,
        LinearKeywords,
        PreferenceKeywords,
        LossKeywords,
        LinearModuleKeywords,
        LinearLossKeywords,
    )
}
OPTIONS = {name: option for rows in _KEYWORDS.values() for name, (_, option) in rows.items()}
DEFAULTS: dict[type, dict[str, Any]] = {
    keywords: {name: option.default for name, (_, option) in rows.items()}
    for keywords, rows in _KEYWORDS.items()
}

Function = TypeVar("Function", bound=Callable[..., Any])


def takes(keywords: type) -> Callable[[Function], Function]:
    """Writes out ``**options`` in a function's signature and docstring.

    :func:`inspect.signature` and :func:`help` then show every keyword with its default.
    """
    rows = _KEYWORDS[keywords]

    def document(function: Any) -> Any:
        signature = inspect.signature(function)
        *explicit, options = signature.parameters.values()
        assert options.kind is inspect.Parameter.VAR_KEYWORD
        written_out = (
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=type_
            )
            for name, (type_, option) in rows.items()
        )
        function.__signature__ = signature.replace(parameters=[*explicit, *written_out])
        if function.__doc__ is not None:  # python -OO removes docstrings
            function.__doc__ = _with_options(function.__doc__, rows)
        return function

    return document


def _with_options(text: str, rows: dict[str, tuple[Any, Option]]) -> str:
    """Replaces the line ``**options: ...`` of a docstring by one entry for each option."""
    lines = text.split("\n")
    at = next(i for i, line in enumerate(lines) if line.lstrip().startswith("**options:"))
    indent = lines[at][: -len(lines[at].lstrip())]
    entries = (
        textwrap.fill(
            f"{name}: {option.meaning}",
            width=100,
            initial_indent=indent,
            subsequent_indent=f"{indent}    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, (_, option) in rows.items()
    )
    return "\n".join([*lines[:at], *entries, *lines[at + 1 :]])
