"""SimPO as an ``nn.Module``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from . import functional
from ._calls import resolve_loss_options, resolve_normalizer
from ._metrics.output import SimPOOutput
from .options import (
    DEFAULTS,
    EmptyPolicy,
    LinearModuleKeywords,
    LossKeywords,
    LossType,
    Normalizer,
    Reduction,
    ReportName,
    SftReduction,
    takes,
)

__all__ = ["LinearSimPOLoss", "SimPOLoss"]


class _Loss(nn.Module):
    """Checks the options of a loss once and keeps them as attributes, with a preset resolved."""

    beta: float
    gamma_beta_ratio: float
    loss_type: LossType
    label_smoothing: float
    alpha: float
    sft_weight: float
    sft_reduction: SftReduction
    average_log_prob: bool
    reduction: Reduction
    normalizer: Normalizer
    empty: EmptyPolicy
    ignore_index: int
    shift: bool
    logit_scale: float
    softcap: float | None
    inplace_backward: bool
    report: tuple[ReportName, ...]

    def __init__(self, keywords: type, given: dict[str, Any]) -> None:
        super().__init__()
        normalizer = given.pop("normalizer", None)
        call = resolve_loss_options(keywords, **given)
        resolve_normalizer(normalizer, call.loss)
        values = {**DEFAULTS[keywords], **given, **call.loss._asdict()}
        values.update(normalizer=normalizer, report=call.report)
        # call.loss has the effect of preset and gamma.
        self._options = tuple(name for name in values if name not in ("preset", "gamma"))
        for name in self._options:
            setattr(self, name, values[name])

    def _keywords(self, normalizer: Normalizer) -> dict[str, Any]:
        """The options of a call, with its own ``normalizer`` if it has one."""
        options = {name: getattr(self, name) for name in self._options}
        return options if normalizer is None else {**options, "normalizer": normalizer}

    def extra_repr(self) -> str:
        """Every option, as the constructor takes it."""
        return ", ".join(f"{name}={value!r}" for name, value in self._keywords(None).items())


class SimPOLoss(_Loss):
    """:func:`simpo_ext.simpo_loss` as a module that keeps the options, without parameters.

    The constructor takes the options of that function, with the same defaults and errors.
    """

    @takes(LossKeywords)
    def __init__(self, **options: Unpack[LossKeywords]) -> None:
        super().__init__(LossKeywords, dict(options))

    def forward(
        self,
        logits: Tensor,  # [2P, T, V]
        labels: Tensor,  # [2P, T]
        *,
        cu_seqlens: Tensor | None = None,  # [S + 1]
        pairs: Tensor | None = None,  # [P, 2]
        pair_weight: Tensor | None = None,  # [P]
        normalizer: Normalizer = None,
    ) -> SimPOOutput:
        """See :func:`simpo_ext.functional.simpo_loss`.

        Args:
            logits: [2P, T, V], chosen rows first; packed [N, V].
            labels: [2P, T]; packed [N].
            cu_seqlens: [S + 1], of packed sequences.
            pairs: [P, 2], the sequences of each pair.
            pair_weight: [P], factors on the pairs' losses.
            normalizer: Replaces the module's own for this call.

        Returns:
            A :class:`~simpo_ext.SimPOOutput`.
        """
        options = self._keywords(normalizer)
        return functional.simpo_loss(
            logits,
            labels,
            cu_seqlens=cu_seqlens,
            pairs=pairs,
            pair_weight=pair_weight,
            **options,
        )


class LinearSimPOLoss(_Loss):
    """:func:`simpo_ext.linear_simpo_loss` as a module that keeps the options, without parameters.

    The constructor takes the options of that function except ``num_valid_tokens``, with the same
    defaults and errors.
    """

    logits_budget_bytes: int | None

    @takes(LinearModuleKeywords)
    def __init__(self, **options: Unpack[LinearModuleKeywords]) -> None:
        super().__init__(LinearModuleKeywords, dict(options))

    def forward(
        self,
        hidden: Tensor,  # [2P, T, H]
        weight: Tensor,  # [V, H]
        labels: Tensor,  # [2P, T]
        *,
        bias: Tensor | None = None,  # [V]
        cu_seqlens: Tensor | None = None,  # [S + 1]
        pairs: Tensor | None = None,  # [P, 2]
        pair_weight: Tensor | None = None,  # [P]
        normalizer: Normalizer = None,
        num_valid_tokens: int | None = None,
    ) -> SimPOOutput:
        """See :func:`simpo_ext.functional.linear_simpo_loss`.

        Args:
            hidden: [2P, T, H], chosen rows first; packed [N, H].
            weight: [V, H]: ``lm_head.weight``.
            labels: [2P, T]; packed [N].
            bias: [V]: ``lm_head.bias``, or None.
            cu_seqlens: [S + 1], of packed sequences.
            pairs: [P, 2], the sequences of each pair.
            pair_weight: [P], factors on the pairs' losses.
            normalizer: Replaces the module's own for this call.
            num_valid_tokens: An upper bound of the number of valid tokens in ``labels``.

        Returns:
            A :class:`~simpo_ext.SimPOOutput`.
        """
        options = self._keywords(normalizer)
        return functional.linear_simpo_loss(
            hidden,
            weight,
            labels,
            bias=bias,
            cu_seqlens=cu_seqlens,
            pairs=pairs,
            pair_weight=pair_weight,
            num_valid_tokens=num_valid_tokens,
            **options,
        )
