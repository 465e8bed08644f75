"""SimPO as an ``nn.Module``."""

from __future__ import annotations

from torch import Tensor, nn

from . import functional
from ._checks import check_bool
from ._options import (
    EmptyPolicy,
    LossType,
    Normalizer,
    Reduction,
    SftReduction,
    resolve_normalizer,
    resolve_preference_options,
    resolve_token_options,
)

__all__ = ["SimPOLoss"]


class SimPOLoss(nn.Module):
    """:func:`simpo_ext.functional.simpo_loss` with its options kept; it has no parameters.

    Takes the keywords of that function, with the same defaults, and raises the same errors when it
    is made.
    """

    def __init__(
        self,
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
    ) -> None:
        super().__init__()
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
        resolve_normalizer(normalizer, reduction, sft_reduction)
        resolve_token_options(
            ignore_index=ignore_index, shift=shift, logit_scale=logit_scale, softcap=softcap
        )
        self.beta = options.beta
        self.gamma_beta_ratio = options.gamma_beta_ratio
        self.loss_type = loss_type
        self.label_smoothing = options.label_smoothing
        self.sft_weight = options.sft_weight
        self.sft_reduction = sft_reduction
        self.average_log_prob = average_log_prob
        self.reduction = reduction
        self.normalizer = normalizer
        self.empty = empty
        self.ignore_index = ignore_index
        self.shift = shift
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.inplace_backward = check_bool("inplace_backward", inplace_backward)

    def forward(
        self,
        logits: Tensor,  # [2P, T, V]
        labels: Tensor,  # [2P, T]
        *,
        normalizer: Normalizer = None,
    ) -> functional.SimPOOutput:
        """See :func:`simpo_ext.functional.simpo_loss`.

        Args:
            logits: [2P, T, V], chosen rows first.
            labels: [2P, T].
            normalizer: Replaces the module's own for this call, since the denominator of an
                accumulation step is often known only with its batch.

        Returns:
            A :class:`~simpo_ext.functional.SimPOOutput`.
        """
        return functional.simpo_loss(
            logits,
            labels,
            beta=self.beta,
            gamma_beta_ratio=self.gamma_beta_ratio,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
            sft_weight=self.sft_weight,
            sft_reduction=self.sft_reduction,
            average_log_prob=self.average_log_prob,
            reduction=self.reduction,
            normalizer=self.normalizer if normalizer is None else normalizer,
            empty=self.empty,
            ignore_index=self.ignore_index,
            shift=self.shift,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            inplace_backward=self.inplace_backward,
        )

    def extra_repr(self) -> str:
        """Every option, as the constructor takes it."""
        options = {
            name: value
            for name, value in vars(self).items()
            if not name.startswith("_") and name != "training"
        }
        return ", ".join(f"{name}={value!r}" for name, value in options.items())
