"""SimPO as an ``nn.Module``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from . import functional
from ._checks import check_bool
from ._options import (
    EMPTY_POLICIES,
    LOSS_TYPES,
    SFT_REDUCTIONS,
    EmptyPolicy,
    Normalizer,
    Reduction,
    ReportName,
    SftReduction,
    name_of,
    resolve_linear_options,
    resolve_normalizer,
    resolve_preference_options,
    resolve_token_options,
)
from ._presets import Preset, TrainerLossType
from ._report import check_linear_report, check_report

__all__ = ["LinearSimPOLoss", "SimPOLoss"]


class _Options(nn.Module):
    """The options of a loss, checked when it is made, with those of a preset spelt out."""

    def __init__(
        self,
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
        normalizer: Normalizer = None,
        empty: EmptyPolicy | None = None,
        ignore_index: int = -100,
        shift: bool | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        inplace_backward: bool = False,
        report: Collection[ReportName] = (),
    ) -> None:
        super().__init__()
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
        resolve_normalizer(normalizer, options)
        resolve_token_options(
            ignore_index=ignore_index, shift=options.shift, logit_scale=logit_scale, softcap=softcap
        )
        self.beta = options.beta
        self.gamma_beta_ratio = options.gamma_beta_ratio
        self.loss_type = name_of(options.loss_type, LOSS_TYPES)
        self.label_smoothing = options.label_smoothing
        self.alpha = options.alpha
        self.sft_weight = options.sft_weight
        self.sft_reduction = name_of(options.sft_reduction, SFT_REDUCTIONS)
        self.average_log_prob = options.average_log_prob
        self.reduction = reduction
        self.normalizer = normalizer
        self.empty = name_of(options.empty, EMPTY_POLICIES)
        self.ignore_index = ignore_index
        self.shift = options.shift
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.inplace_backward = check_bool("inplace_backward", inplace_backward)
        self.report = check_report(report)
        # Not those that a subclass or a caller may set besides.
        self._options = tuple(
            name for name in vars(self) if not name.startswith("_") and name != "training"
        )

    def _keywords(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._options}

    def extra_repr(self) -> str:
        """Every option, as the constructor takes it."""
        return ", ".join(f"{name}={value!r}" for name, value in self._keywords().items())


class SimPOLoss(_Options):
    """:func:`simpo_ext.functional.simpo_loss` with its options kept; it has no parameters.

    Takes the keywords of that function, with the same defaults, and raises the same errors when it
    is made.
    """

    def forward(
        self,
        logits: Tensor,  # [2P, T, V]
        labels: Tensor,  # [2P, T]
        *,
        cu_seqlens: Tensor | None = None,  # [S + 1]
        pairs: Tensor | None = None,  # [P, 2]
        pair_weight: Tensor | None = None,  # [P]
        normalizer: Normalizer = None,
    ) -> functional.SimPOOutput:
        """See :func:`simpo_ext.functional.simpo_loss`.

        Args:
            logits: [2P, T, V], chosen rows first; packed [N, V].
            labels: [2P, T]; packed [N].
            cu_seqlens: [S + 1], of packed sequences.
            pairs: [P, 2], the sequences of each pair.
            pair_weight: [P], factors on the pairs' losses.
            normalizer: Replaces the module's own for this call, since the denominator of an
                accumulation step is often known only with its batch.

        Returns:
            A :class:`~simpo_ext.functional.SimPOOutput`.
        """
        options = self._keywords()
        if normalizer is not None:
            options["normalizer"] = normalizer
        return functional.simpo_loss(
            logits,
            labels,
            cu_seqlens=cu_seqlens,
            pairs=pairs,
            pair_weight=pair_weight,
            **options,
        )


class LinearSimPOLoss(_Options):
    """:func:`simpo_ext.functional.linear_simpo_loss` with its options kept; it has no parameters.

    Takes the keywords of :class:`SimPOLoss` and ``logits_budget_bytes``, with the same defaults as
    that function, and raises the same errors when it is made.
    """

    def __init__(
        self,
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
        normalizer: Normalizer = None,
        empty: EmptyPolicy | None = None,
        ignore_index: int = -100,
        shift: bool | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        inplace_backward: bool = False,
        logits_budget_bytes: int | None = None,
        report: Collection[ReportName] = (),
    ) -> None:
        super().__init__(
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
            normalizer=normalizer,
            empty=empty,
            ignore_index=ignore_index,
            shift=shift,
            logit_scale=logit_scale,
            softcap=softcap,
            inplace_backward=inplace_backward,
            report=report,
        )
        resolve_linear_options(logits_budget_bytes, None)
        check_linear_report(report, softcap)
        self.logits_budget_bytes = logits_budget_bytes
        self._options += ("logits_budget_bytes",)

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
    ) -> functional.SimPOOutput:
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
            A :class:`~simpo_ext.functional.SimPOOutput`.
        """
        options = self._keywords()
        if normalizer is not None:
            options["normalizer"] = normalizer
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
