"""The formulas, defaults and names of well-known trainers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

from ._inputs.checks import check_choice
from ._ops.records import EmptyPolicy, LossType, SftReduction

Preset = Literal["princeton", "trl", "liger", "llamafactory"]
TrainerLossType = Literal["sigmoid", "hinge", "ipo", "simpo", "alphapo"]


class Semantics(NamedTuple):
    """The keywords that a preset sets. One of ``gamma_beta_ratio`` and ``gamma`` is None."""

    loss_type: LossType = "sigmoid"
    beta: float = 2.0
    gamma_beta_ratio: float | None = 0.5
    gamma: float | None = None
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    sft_reduction: SftReduction = "sequence"
    average_log_prob: bool = True
    empty: EmptyPolicy = "drop"
    shift: bool = True


_OWN: Final = Semantics()
_PRINCETON: Final = Semantics(gamma_beta_ratio=0.25, sft_reduction="token", empty="nan")
_TRL: Final = Semantics(
    beta=0.1, gamma_beta_ratio=None, gamma=0.5, sft_weight=1.0, sft_reduction="token", empty="nan"
)
_TRL_CPO: Final = _TRL._replace(gamma_beta_ratio=0.0, gamma=None, average_log_prob=False)
_LIGER: Final = _TRL._replace(shift=False)
_LLAMAFACTORY: Final = _TRL._replace(sft_weight=0.0, sft_reduction="sequence")

# The keys are the trainer's names for loss_type. The first is the default.
OWN: Final[Mapping[str, Semantics]] = {
    "sigmoid": _OWN,
    "hinge": _OWN._replace(loss_type="hinge"),
    "ipo": _OWN._replace(loss_type="ipo", gamma_beta_ratio=0.0),
}
PRESETS: Final[Mapping[str, Mapping[str, Semantics]]] = {
    "princeton": {
        "sigmoid": _PRINCETON,
        "hinge": _PRINCETON._replace(loss_type="hinge"),
    },
    "trl": {
        "simpo": _TRL,
        "alphapo": _TRL._replace(sft_weight=0.0),
        "sigmoid": _TRL_CPO,
        "hinge": _TRL_CPO._replace(loss_type="hinge"),
        "ipo": _TRL_CPO._replace(loss_type="ipo", average_log_prob=True),
    },
    "liger": {"sigmoid": _LIGER},
    "llamafactory": {"sigmoid": _LLAMAFACTORY, "simpo": _LLAMAFACTORY},
}


def with_preset(
    preset: Preset | None,
    *,
    loss_type: TrainerLossType | None = None,
    beta: float | None = None,
    gamma_beta_ratio: float | None = None,
    gamma: float | None = None,
    label_smoothing: float | None = None,
    sft_weight: float | None = None,
    sft_reduction: SftReduction | None = None,
    average_log_prob: bool | None = None,
    empty: EmptyPolicy | None = None,
    shift: bool | None = None,
) -> Semantics:
    r"""Replaces None by a trainer's defaults, or by those of simpo_ext.

    Let l be the mean log-probability of a completion's valid tokens, delta = l_chosen - l_rejected,
    s = label_smoothing, and

        S(x) = -logsigmoid(x) (1 - s) - logsigmoid(-x) s
        nll  = mean of -log p over all valid tokens of the chosen completions of the batch

    The presets are:

    ``"princeton"``: SimPOTrainer of the paper's authors (scripts/simpo_trainer.py and
    scripts/simpo_config.py of github.com/princeton-nlp/SimPO)::

        "sigmoid" (default)  mean(S(beta (delta - gamma_beta_ratio))) + sft_weight nll
        "hinge"              mean(relu(1 - beta (delta - gamma_beta_ratio))) + sft_weight nll
        beta 2, gamma_beta_ratio 0.25, label_smoothing 0, sft_weight 0

    ``"trl"``: CPOTrainer (trl/experimental/cpo of trl 1.16). Its ``cpo_alpha`` is ``sft_weight``,
    its ``simpo_gamma`` is ``gamma``, and ``loss_type`` takes its names::

        "simpo" (default)    mean(S(beta delta - gamma)) + sft_weight nll
        "alphapo"            the same with sft_weight 0, for use with ``alpha``
        "sigmoid"            mean(S(beta Delta)) + sft_weight nll
        "hinge"              mean(relu(1 - beta Delta)) + sft_weight nll
        "ipo"                mean((delta - 1 / (2 beta))^2) + sft_weight nll
        beta 0.1, gamma 0.5, label_smoothing 0, sft_weight 1

    where Delta is the difference of the summed, not averaged, log-probabilities. CPOConfig's own
    default is "sigmoid", which is CPO. An ``alpha`` other than 0 acts on all of them, as in the
    trainer.

    ``"liger"``: LigerFusedLinearSimPOLoss (liger_kernel/chunked_loss of liger-kernel 0.8.5). Its
    ``alpha`` is ``sft_weight``. ``shift`` is False, since the caller aligns the labels::

        "sigmoid"            mean(S(beta delta - gamma)) + sft_weight nll
        beta 0.1, gamma 0.5, label_smoothing 0, sft_weight 1 (0: compute_nll_loss=False)

    ``"llamafactory"``: ``pref_loss: simpo`` of LLaMA-Factory (src/llamafactory/train/dpo/trainer.py
    of github.com/hiyouga/LLaMA-Factory). Its ``pref_beta`` is ``beta``, its ``simpo_gamma`` is
    ``gamma``, and its ``pref_ftx`` is ``sft_weight``. Its own "sigmoid" is DPO with a reference
    model::

        "simpo" or "sigmoid"  mean(S(beta delta - gamma) - sft_weight l_chosen), with s = 0
        beta 0.1, gamma 0.5, sft_weight 0

    With each preset, a completion without a valid token makes the loss NaN, as 0 / 0 does in the
    trainer. TRL's sums are an exception: for them, TRL scores such a completion as 0, the highest
    possible log-probability. Here, the loss is NaN for sums, too.

    Args:
        preset: One of these; None: ``loss_type`` "sigmoid", "hinge" or "ipo", ``beta`` 2,
            ``gamma_beta_ratio`` 0.5 (0 for "ipo"), no label smoothing and no SFT term
            (``sft_reduction`` "sequence"), averages, ``empty`` "drop" and ``shift`` True.
        loss_type: The trainer's name for it. The result has simpo_ext's name.
        beta: See :func:`simpo_ext.functional.simpo_loss`. A given keyword overrides the preset.
        gamma_beta_ratio: If given, it replaces the preset's margin.
        gamma: If given, it replaces the preset's margin.
        label_smoothing: See :func:`simpo_ext.functional.simpo_loss`.
        sft_weight: See :func:`simpo_ext.functional.simpo_loss`.
        sft_reduction: See :func:`simpo_ext.functional.simpo_loss`.
        average_log_prob: See :func:`simpo_ext.functional.simpo_loss`.
        empty: See :func:`simpo_ext.functional.simpo_loss`.
        shift: See :func:`simpo_ext.functional.simpo_loss`.

    Returns:
        The keywords. One of ``gamma_beta_ratio`` and ``gamma`` is None. Only ``preset`` and
        ``loss_type`` are checked.

    Raises:
        TypeError: ``preset`` or ``loss_type`` is not a string.
        ValueError: There is no such preset, or the trainer has no such ``loss_type``.
    """
    default = _semantics_of(preset, loss_type)
    if gamma_beta_ratio is not None or gamma is not None:
        default = default._replace(gamma_beta_ratio=None, gamma=None)
    given: dict[str, Any] = {
        "beta": beta,
        "gamma_beta_ratio": gamma_beta_ratio,
        "gamma": gamma,
        "label_smoothing": label_smoothing,
        "sft_weight": sft_weight,
        "sft_reduction": sft_reduction,
        "average_log_prob": average_log_prob,
        "empty": empty,
        "shift": shift,
    }
    return default._replace(**{name: value for name, value in given.items() if value is not None})


def _semantics_of(preset: object, loss_type: object) -> Semantics:
    rows = OWN if preset is None else PRESETS[check_choice("preset", preset, PRESETS)]
    if loss_type is None:
        return next(iter(rows.values()))
    if preset is not None and isinstance(loss_type, str) and loss_type not in rows:
        expected = ", ".join(repr(name) for name in rows)
        raise ValueError(
            f"loss_type: expected one of {expected} with preset={preset!r}, got {loss_type!r}"
        )
    return rows[check_choice("loss_type", loss_type, rows)]
