"""TRL's CPOTrainer with the kernels of this package.

::

    from simpo_ext.integrations.trl import SimPOTrainer
    from trl.experimental.cpo import CPOConfig

    args = CPOConfig(output_dir="out", loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=1.0)
    SimPOTrainer(model, args, train_dataset=pairs, processing_class=tokenizer).train()

Needs trl >= 1.16 (``pip install simpo_ext[trl]``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from .. import functional as F
from .._metrics.report import counted_pairs, row_means, valid_tokens
from ..options import EmptyPolicy
from ..presets import TrainerLossType
from ._fused.causal_lm import FusedOutput
from ._fused.tier import FusedTier, check_options

try:
    from trl.experimental.cpo import CPOTrainer
except ImportError as error:
    raise ImportError(
        f"simpo_ext.integrations.trl: expected trl >= 1.16, with trl.experimental.cpo; {error}"
    ) from error

__all__ = ["SimPOMixin", "SimPOTrainer"]

_logger = logging.getLogger(__name__)

_LABEL_PAD_TOKEN_ID = -100  # the value in CPOTrainer


class SimPOMixin:
    """Makes :class:`SimPOTrainer` from CPOTrainer. List it before CPOTrainer in the bases."""

    if TYPE_CHECKING:  # attributes of CPOTrainer
        accelerator: Any
        args: Any
        model: nn.Module
        is_encoder_decoder: bool
        pad_token_id: int
        loss_type: str
        beta: float
        simpo_gamma: float
        alpha: float
        label_smoothing: float
        cpo_alpha: float
        aux_loss_enabled: bool
        aux_loss_coef: float

        concatenated_inputs: Callable[..., dict[str, Tensor]]
        _shift_right: Callable[[Tensor], Tensor]

    def __init__(
        self,
        *args: Any,
        fused_linear: bool | None = None,
        empty: EmptyPolicy = "drop",
        logits_budget_bytes: int | None = None,
        **kwargs: Any,
    ) -> None:
        """See :class:`SimPOTrainer`."""
        check_options(fused_linear, empty, logits_budget_bytes)
        self._empty: EmptyPolicy = empty
        self._logits_budget_bytes = logits_budget_bytes
        self._has_warned_of_dropped_pairs = False
        super().__init__(*args, **kwargs)
        nothing = torch.zeros(0)
        self.cpo_loss(nothing, nothing)  # checks the loss options before the model runs
        # fused_linear=True raises no error for an encoder-decoder, which always needs logits.
        self._tier = FusedTier(None if self.is_encoder_decoder and fused_linear else fused_linear)
        self._tier.check(self, self.model, self._obstacle())

    @property
    def fused_linear(self) -> bool:
        """Whether the log-probabilities come from hidden states and lm_head, without logits.

        The first batch may change True to False, because the model has not run before it.
        """
        return self._tier.is_in_use

    def _obstacle(self) -> str | None:
        return "the model is an encoder-decoder" if self.is_encoder_decoder else None

    def _semantics(self) -> F.Semantics:
        """The trainer's loss options in the parameters of this package."""
        gamma = self.simpo_gamma if self.loss_type == "simpo" else None
        loss_type = cast("TrainerLossType", self.loss_type)
        return F.with_preset("trl", loss_type=loss_type, beta=self.beta, gamma=gamma)

    @staticmethod
    def get_batch_logps(
        logits: Tensor,  # [B, T, V]
        labels: Tensor,  # [B, T]
        average_log_prob: bool = False,
        label_pad_token_id: int | bool = _LABEL_PAD_TOKEN_ID,
        is_encoder_decoder: bool = False,
    ) -> Tensor:  # [B]
        """Computes the sum or mean of each sequence's token log-probabilities.

        The fourth argument may be an integer or a bool. Princeton's SimPOTrainer passes
        ``label_pad_token_id`` there, and TRL's CPOTrainer passes ``is_encoder_decoder``.

        Args:
            logits: [B, T, V]; see :func:`simpo_ext.token_logps`.
            labels: [B, T]; ``label_pad_token_id`` for positions that are not scored.
            average_log_prob: Whether to return the mean over scored tokens instead of the sum.
            label_pad_token_id: Default -100. A bool is taken as ``is_encoder_decoder``.
            is_encoder_decoder: If True, the logits at t score ``labels[:, t]``; if False, they
                score ``labels[:, t + 1]``.

        Returns:
            [B] float32 (float64 for float64 logits). A sequence without scored tokens has NaN; TRL
            returns 0 for its sum.
        """
        if isinstance(label_pad_token_id, bool):
            is_encoder_decoder = label_pad_token_id
            label_pad_token_id = _LABEL_PAD_TOKEN_ID
        return F.sequence_logps(
            logits,
            labels,
            average_log_prob=average_log_prob,
            ignore_index=label_pad_token_id,
            shift=not is_encoder_decoder,
        )

    def cpo_loss(
        self,
        policy_chosen_logps: Tensor,  # [P]
        policy_rejected_logps: Tensor,  # [P]
    ) -> tuple[Tensor, Tensor, Tensor]:  # [P], [P], [P]
        """Computes each pair's preference loss and rewards with the trainer's ``loss_type``.

        As in CPOTrainer, "hinge" and "ipo" ignore ``label_smoothing``, and only "simpo" uses
        ``simpo_gamma``.
        """
        semantics = self._semantics()
        is_smooth = semantics.loss_type == "sigmoid"
        return F.simpo_loss_from_logps(
            policy_chosen_logps,
            policy_rejected_logps,
            beta=semantics.beta,
            gamma_beta_ratio=semantics.gamma_beta_ratio,
            gamma=semantics.gamma,
            loss_type=semantics.loss_type,
            label_smoothing=self.label_smoothing if is_smooth else 0.0,
            alpha=self.alpha,
        )

    def concatenated_forward(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """Runs the model on chosen and rejected completions together.

        Returns:
            chosen_logps [P], rejected_logps [P], chosen_logits, rejected_logits, nll_loss [] and
            the auxiliary loss of a model that has one. chosen_logits and rejected_logits are
            [P, T, V], or [P] if the logits are never in memory: each row's mean logit, detached.
            With a softcap, that mean is over the scored tokens only.
        """
        inputs = self.concatenated_inputs(
            batch,
            is_encoder_decoder=self.is_encoder_decoder,
            padding_value=self.pad_token_id,
            device=self.accelerator.device,
        )
        input_ids, labels = inputs["concatenated_input_ids"], inputs["concatenated_labels"]
        kwargs: dict[str, Any] = {
            "attention_mask": inputs["concatenated_attention_mask"],
            "use_cache": False,
        }
        if self.aux_loss_enabled:
            kwargs["output_router_logits"] = True
        if self.is_encoder_decoder:
            kwargs["decoder_input_ids"] = self._shift_right(labels)
        outputs = self._tier.forward(
            self, model, input_ids, labels, self._obstacle(), self._logits_budget_bytes, **kwargs
        )
        options: dict[str, Any] = {
            "average_log_prob": self._semantics().average_log_prob,
            "sft_reduction": "token",
            "empty": self._empty,
            "shift": not self.is_encoder_decoder,
        }
        if isinstance(outputs, FusedOutput):
            out = F.simpo_loss_from_token_logps(outputs.token_logps, labels, **options)
            logits, outputs = outputs.mean_logits, outputs.outputs
        else:
            out = F.simpo_loss(outputs.logits, labels, **options)
            logits = outputs.logits
        pairs = batch["chosen_labels"].shape[0]
        # With weight 0 the term must be 0: it may be NaN, and 0 * NaN is NaN.
        nll = out.sft_loss if self.cpo_alpha != 0.0 else torch.zeros_like(out.sft_loss)
        aux_loss = (outputs.aux_loss,) if self.aux_loss_enabled else ()
        return out.chosen_logps, out.rejected_logps, logits[:pairs], logits[pairs:], nll, *aux_loss

    def get_batch_loss_metrics(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        train_eval: Literal["train", "eval"] = "train",
    ) -> tuple[Tensor, dict[str, float]]:
        """Computes the loss of a batch and its metrics under CPOTrainer's names.

        One copy brings all metrics of all processes to the host.
        """
        output = self.concatenated_forward(model, batch)
        chosen_logps, rejected_logps, chosen_logits, rejected_logits, nll, *aux_losses = output
        is_counted = self._counted_pairs(batch).to(chosen_logps.device)
        if self._empty == "drop":
            chosen_logps = torch.where(is_counted, chosen_logps, 0.0)
            rejected_logps = torch.where(is_counted, rejected_logps, 0.0)
        losses, chosen_rewards, rejected_rewards = self.cpo_loss(chosen_logps, rejected_logps)
        num_counted = is_counted.sum()
        preference_loss = torch.where(is_counted, losses, 0.0).sum() / num_counted.clamp(min=1)
        loss = preference_loss + self.cpo_alpha * nll
        for aux_loss in aux_losses:
            loss = loss + self.aux_loss_coef * aux_loss

        by_pair = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": chosen_rewards > rejected_rewards,
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/rejected": rejected_logps,
            "logps/chosen": chosen_logps,
        }
        by_batch = {
            name: torch.where(is_counted, row_means(logits), 0.0).sum() / num_counted
            for name, logits in (
                ("logits/rejected", rejected_logits),
                ("logits/chosen", chosen_logits),
            )
        }
        by_batch["nll_loss"] = nll
        prefix = "eval_" if train_eval == "eval" else ""
        values = self._read(by_pair, by_batch, is_counted)
        return loss, {f"{prefix}{name}": value for name, value in values.items()}

    def _counted_pairs(self, batch: dict[str, Any]) -> Tensor:  # [P], bool
        """Which pairs of a batch are not dropped."""
        shift = not self.is_encoder_decoder
        sides: tuple[Tensor, ...] = batch["chosen_labels"], batch["rejected_labels"]
        num_valid = [valid_tokens(side, _LABEL_PAD_TOKEN_ID, shift).sum(1) for side in sides]
        is_counted = counted_pairs(torch.cat(num_valid), self._empty)
        if is_counted is None:
            return torch.ones_like(num_valid[0], dtype=torch.bool)
        return is_counted

    def _read(
        self,
        by_pair: dict[str, Tensor],  # [P] each, 0 for dropped pairs
        by_batch: dict[str, Tensor],  # [] each
        is_counted: Tensor,  # [P]
    ) -> dict[str, float]:
        """Means over the counted pairs and over the batches of all processes."""
        # accelerate pads the last batch of an evaluation and cuts the padding off by rows. So
        # values with one row for each pair and values with one for each batch are in two tensors.
        batch = [value.unsqueeze(0) for value in by_batch.values()]
        tables = self.accelerator.gather_for_metrics(
            (
                _table([*by_pair.values()], is_counted),
                _table(batch, is_counted.any().unsqueeze(0)),
            )
        )
        sums = [table.sum(0) for table in tables]
        means = [total[:-1] / total[-1] for total in sums]
        *found, num_counted = torch.cat((*means, sums[0][-1:])).tolist()
        num_pairs = tables[0].shape[0]
        dropped = num_pairs - int(num_counted)
        if dropped and not self._has_warned_of_dropped_pairs:
            self._has_warned_of_dropped_pairs = True
            _logger.warning(
                "SimPOTrainer drops %d of %d pairs from the loss and metrics of a batch, because "
                "they have a completion without scored tokens; a larger max_length may keep them. "
                "Later batches drop such pairs without a warning.",
                dropped,
                num_pairs,
            )
        return dict(zip((*by_pair, *by_batch), found, strict=True))


def _table(columns: list[Tensor], is_counted: Tensor) -> Tensor:
    """Stacks columns [R] and the mask to [R, C + 1], with 0 in rows that are not counted."""
    values = torch.stack([column.detach().double() for column in columns], 1)
    is_counted = is_counted.unsqueeze(1)
    return torch.cat((torch.where(is_counted, values, 0.0), is_counted.double()), 1)


class SimPOTrainer(SimPOMixin, CPOTrainer):  # type: ignore[misc]
    """TRL's CPOTrainer with simpo_ext's kernels.

    Losses, gradients and metrics equal CPOTrainer's up to rounding, and the arguments are the same.
    ``CPOConfig`` has the options of the loss. Its default ``loss_type="sigmoid"`` is CPO. Set
    ``loss_type="simpo"`` and ``cpo_alpha=0.0`` for SimPO. Any other ``cpo_alpha`` adds the cross
    entropy of the chosen completions.

    By default, token log-probabilities come from the last hidden states and lm_head, and the logits
    are never in memory (:func:`simpo_ext.linear_token_logps`). This works for causal language
    models whose lm_head is an ``nn.Linear``, with or without a bias. It supports a scale or softcap
    of the logits, tied embeddings, an auxiliary loss, and PEFT adapters on other layers. For other
    models, the model computes its logits, and everything else stays the same.

    Args:
        args: Like ``kwargs``, arguments of ``trl.experimental.cpo.CPOTrainer``.
        fused_linear: Whether to train without logits. None (default): if the model allows it;
            otherwise a warning gives the reason. True: an error gives the reason instead, except
            for an encoder-decoder. False: never.
        empty: What happens to a pair if truncation leaves no token of a completion. ``"drop"``
            (default): the loss, its gradient and the metrics leave the pair out, with one warning.
            ``"nan"``: the pair's loss is NaN, as in CPOTrainer for means over tokens.
        logits_budget_bytes: Used without logits only; see :func:`simpo_ext.linear_token_logps`.

    Raises:
        TypeError: ``fused_linear``, ``empty`` or ``logits_budget_bytes`` has the wrong type.
        ValueError: One of them is out of range; or the model does not allow ``fused_linear=True``,
            which may show only at the first batch; or CPOTrainer raises it.
    """

    _tag_names = ["trl", "cpo", "simpo_ext"]  # noqa: RUF012
