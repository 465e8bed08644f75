"""SimPO for TRL: its CPOTrainer, on the kernels of this package.

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

_LABEL_PAD_TOKEN_ID = -100  # CPOTrainer's own


class SimPOMixin:
    """What turns a CPOTrainer into a :class:`SimPOTrainer`; it goes before it among the bases."""

    if TYPE_CHECKING:  # of CPOTrainer
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
        self.cpo_loss(nothing, nothing)  # checks its options, before a model has been run
        # What kind of model it is, is no error of the caller's.
        self._tier = FusedTier(None if self.is_encoder_decoder and fused_linear else fused_linear)
        self._tier.check(self, self.model, self._obstacle())

    @property
    def fused_linear(self) -> bool:
        """Whether the log-probabilities come from hidden states and lm_head, without logits.

        Before the first batch, as far as can be told from the model without running it.
        """
        return self._tier.is_in_use

    def _obstacle(self) -> str | None:
        return "the model is an encoder-decoder" if self.is_encoder_decoder else None

    def _semantics(self) -> F.Semantics:
        """What loss_type and its parameters are to this package."""
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
        """Sum, or mean, of each sequence's token log-probabilities.

        Takes the arguments of both trainers in use: as the fourth, Princeton's SimPOTrainer has
        ``label_pad_token_id``, and TRL's CPOTrainer ``is_encoder_decoder``, which is a bool.

        Args:
            logits: [B, T, V]; see :func:`simpo_ext.token_logps`.
            labels: [B, T]; ``label_pad_token_id`` where nothing is scored.
            average_log_prob: The mean over valid tokens instead of their sum.
            label_pad_token_id: Default -100; or ``is_encoder_decoder``.
            is_encoder_decoder: The logits at t are scored with ``labels[:, t]``; otherwise with
                ``labels[:, t + 1]``.

        Returns:
            [B], float32 (float64 for float64 logits); NaN for a sequence without a valid token,
            where TRL has 0 for a sum.
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
        """The preference loss of each pair and the rewards, by the trainer's ``loss_type``.

        As CPOTrainer's: ``label_smoothing`` is without effect on "hinge" and "ipo", ``simpo_gamma``
        on all but "simpo".
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
            chosen_logps [P], rejected_logps [P], chosen_logits, rejected_logits, nll_loss [] and,
            of a model with an auxiliary loss, that. The logits are [P, T, V], or, where they have
            not been formed, the detached mean of each row's, [P]: under a softcap that of the
            completion only.
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
        # Without a weight there is no term, not one of weight 0: it may be NaN.
        nll = out.sft_loss if self.cpo_alpha != 0.0 else torch.zeros_like(out.sft_loss)
        aux_loss = (outputs.aux_loss,) if self.aux_loss_enabled else ()
        return out.chosen_logps, out.rejected_logps, logits[:pairs], logits[pairs:], nll, *aux_loss

    def get_batch_loss_metrics(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        train_eval: Literal["train", "eval"] = "train",
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch, and its metrics under CPOTrainer's names.

        All metrics of all processes come to the host in one copy.
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
        """Those that are not dropped."""
        shift = not self.is_encoder_decoder
        sides: tuple[Tensor, ...] = batch["chosen_labels"], batch["rejected_labels"]
        num_valid = [valid_tokens(side, _LABEL_PAD_TOKEN_ID, shift).sum(1) for side in sides]
        is_counted = counted_pairs(torch.cat(num_valid), self._empty)
        if is_counted is None:
            return torch.ones_like(num_valid[0], dtype=torch.bool)
        return is_counted

    def _read(
        self,
        by_pair: dict[str, Tensor],  # [P] each, 0 of pairs that are not counted
        by_batch: dict[str, Tensor],  # [] each
        is_counted: Tensor,  # [P]
    ) -> dict[str, float]:
        """Means over the counted pairs, and over the batches, of all processes."""
        # Two tensors, as accelerate cuts off what fills up an evaluation's last batch by rows.
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
                "%d of %d pairs are left out of a batch's loss and metrics, and so are others from "
                "here on: a completion of theirs has no token left; see max_length",
                dropped,
                num_pairs,
            )
        return dict(zip((*by_pair, *by_batch), found, strict=True))


def _table(columns: list[Tensor], is_counted: Tensor) -> Tensor:
    """[R, C + 1] of columns [R], 0 in rows that are not counted, and of whether they are."""
    values = torch.stack([column.detach().double() for column in columns], 1)
    is_counted = is_counted.unsqueeze(1)
    return torch.cat((torch.where(is_counted, values, 0.0), is_counted.double()), 1)


class SimPOTrainer(SimPOMixin, CPOTrainer):  # type: ignore[misc]
    """TRL's CPOTrainer on simpo_ext's kernels.

    The same losses, gradients and metrics, to rounding, with the same arguments; ``CPOConfig`` has
    the options of the loss. Its ``loss_type`` is "sigmoid" unless told otherwise, which is CPO:
    SimPO is ``loss_type="simpo"``, and ``cpo_alpha=0.0`` unless the cross entropy of the chosen
    completions is to be added.

    There are two tiers. In the fused one, token log-probabilities come from the last hidden states
    and lm_head, and there are no logits in memory (:func:`simpo_ext.linear_token_logps`). It is
    for causal language models with an ``nn.Linear`` for lm_head, be there a bias, a factor or a
    softcap on the logits, tied embeddings, an auxiliary loss, or PEFT adapters on other layers. In
    the other one the model forms its logits, and all else is the same.

    Args:
        args: As of ``trl.experimental.cpo.CPOTrainer``, and ``kwargs``.
        fused_linear: None (default): the fused tier where the model allows it; otherwise a warning
            says why not. True: an error does, but for encoder-decoders. False: the logits tier.
        empty: What becomes of a pair with a completion of which truncation has left no token.
            ``"drop"`` (default): it is left out of loss, gradient and metrics, with a warning the
            first time. ``"nan"``: its loss is NaN, as CPOTrainer's is for averages.
        logits_budget_bytes: Of the fused tier; see :func:`simpo_ext.linear_token_logps`.

    Raises:
        TypeError: ``fused_linear``, ``empty`` or ``logits_budget_bytes`` is of the wrong type.
        ValueError: One of them is out of range; ``fused_linear=True`` does not fit the model, which
            may show at the first batch only; or as CPOTrainer.
    """

    _tag_names = ["trl", "cpo", "simpo_ext"]  # noqa: RUF012
