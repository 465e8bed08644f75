"""The result of a loss, made from the outputs of the preference_loss op."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._ops.records import Layout, LossOptions, LossOutputs
from .report import asked_for, metric_names, report_values


class SimPOOutput(NamedTuple):
    """The result of :func:`simpo_loss`, float32, or float64 for float64 logits.

    ``loss``, ``losses``, ``chosen_logps``, ``rejected_logps`` and ``sft_loss`` are differentiable;
    the rewards and the metrics are detached.
    """

    loss: Tensor
    """The loss to call ``backward()`` on: a scalar, or [P] with ``reduction="none"``."""
    losses: Tensor
    """[P] preference loss of each pair, without the SFT term; 0 for a dropped pair."""
    chosen_logps: Tensor
    """[P] mean (or sum) log-probability of each chosen completion; NaN if it is empty."""
    rejected_logps: Tensor
    """[P] the same for each rejected completion."""
    chosen_rewards: Tensor
    """[P] beta * chosen_logps, detached."""
    rejected_rewards: Tensor
    """[P] beta * rejected_logps, detached."""
    sft_loss: Tensor
    """The SFT term before its weight: a scalar, or [P] with ``reduction="none"``."""
    metrics_values: Tensor
    """[9], or more with a ``report``, float64, detached: the values for :meth:`metrics`."""

    def metrics(self) -> dict[str, float]:
        """The training metrics as floats. This makes one copy from the device to the host.

        They cover the counted pairs of this batch: ``rewards/chosen`` and ``rewards/rejected``
        (means of beta * logps), ``rewards/accuracies`` (the share with chosen > rejected),
        ``rewards/margins`` (mean difference, without gamma), ``logps/chosen`` and
        ``logps/rejected`` (means), ``num_pairs``, ``dropped_pairs`` and ``num_tokens`` (scored
        tokens of both sides). Means are NaN if no pair was counted. The metrics that ``report``
        names follow.
        """
        values = self.metrics_values.tolist()
        return dict(zip(metric_names(values), values, strict=False))


class Report(NamedTuple):
    """The metrics to add to those of the loss, and the labels and layout of their tokens."""

    names: tuple[str, ...]
    labels: Tensor  # [B, T]
    layout: Layout
    # [B, T]: the mean logit of every position, if the forward's mean_logit does not have it.
    all_mean_logits: Tensor | None = None

    def values(self, out: LossOutputs, options: LossOptions) -> Tensor:
        """The values of ``names``, then :func:`asked_for`, which says which names these are."""
        of_all = out.mean_logit if self.all_mean_logits is None else self.all_mean_logits
        values = {"logits": out.mean_logit, "logits_all": of_all, "entropy": out.entropy}
        means = report_values(
            self.names,
            {name: value for name, value in values.items() if value is not None},
            self.labels,
            ignore_index=options.ignore_index,
            shift=options.shift,
            empty=options.empty,
            cu_seqlens=self.layout.cu_seqlens,
            pairs=self.layout.pairs,
        )
        return torch.cat((means, asked_for(self.names, means)))


def compose_output(
    options: LossOptions,
    denominators: tuple[float | Tensor, float | Tensor] | None,
    loss: Callable[[LossOptions], LossOutputs],
    report: Report | None = None,
) -> SimPOOutput:
    """The SimPOOutput of a loss. ``denominators`` replace the counts of the batch."""
    if denominators is None:
        out = loss(options)
    else:
        # Divides outside the op: torch.compile treats floats of an op as constants, and these vary.
        out = loss(options._replace(reduction="sum", sft_weight=0.0))
        total = (out.loss / denominators[0]).to(out.loss.dtype)
        sft_loss = (out.sft_loss / denominators[1]).to(out.loss.dtype)
        if options.sft_weight > 0.0:
            total = total + options.sft_weight * sft_loss
        out = out._replace(loss=total, sft_loss=sft_loss)
    metrics = out.metrics
    if report is not None:
        metrics = torch.cat((metrics, report.values(out, options)))
    pairs = out.losses.shape[0]
    return SimPOOutput(
        loss=out.loss,
        losses=out.losses,
        chosen_logps=out.logps[:pairs],
        rejected_logps=out.logps[pairs:],
        chosen_rewards=out.rewards[:pairs],
        rejected_rewards=out.rewards[pairs:],
        sft_loss=out.sft_loss,
        metrics_values=metrics,
    )
