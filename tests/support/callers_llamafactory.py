"""Calls the methods that simpo_ext.integrations.llamafactory replaces, as LLaMA-Factory does.

Written from the public interface of CustomDPOTrainer (llamafactory.train.dpo.trainer) and of
get_batch_logps (llamafactory.train.trainer_utils), without transformers and TRL.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

AVERAGED = ("ipo", "orpo", "simpo")


def preference_batch(pairs: int = 3, time: int = 12, vocabulary: int = 61) -> dict[str, Tensor]:
    """A batch of PairwiseDataCollatorWithPadding: chosen rows, then rejected, padded right."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(vocabulary, (2 * pairs, time), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    labels = input_ids.clone()
    for row in range(2 * pairs):
        padding = row % 4
        labels[row, : 2 + row % pairs] = -100
        labels[row, time - padding :] = -100
        attention_mask[row, time - padding :] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def get_batch_logps(
    logits: Tensor, labels: Tensor, label_pad_token_id: int = -100, ld_alpha: float | None = None
) -> tuple[Tensor, Tensor]:
    """Sums over valid tokens. ld_alpha weights tokens beyond the length of a pair's shorter one."""
    is_valid = labels[:, 1:] != label_pad_token_id
    targets = torch.where(is_valid, labels[:, 1:], 0)
    logps = logits[:, :-1].log_softmax(-1).gather(2, targets.unsqueeze(2)).squeeze(2)
    lengths = is_valid.sum(1)
    weights = is_valid.to(logits.dtype)
    if ld_alpha is not None:
        chosen, rejected = lengths.chunk(2)
        for row, length in enumerate(torch.minimum(chosen, rejected).tolist() * 2):
            start = int(is_valid[row].int().argmax())
            weights[row, start + length :] *= ld_alpha
    return (logps * weights).sum(1), lengths


class DPOTrainerCaller:
    """The methods of CustomDPOTrainer that compute a batch's loss.

    Up to version 0.9.3 the forward returns a tuple (``returns=tuple``), and later a dict.
    """

    returns: Callable[..., Any] = dict

    def __init__(
        self,
        pref_loss: str = "simpo",
        *,
        pref_beta: float = 0.1,
        pref_ftx: float = 0.0,
        simpo_gamma: float = 0.5,
        ld_alpha: float | None = None,
    ) -> None:
        use_ref_model = pref_loss not in ("orpo", "simpo")
        self.finetuning_args = SimpleNamespace(use_ref_model=use_ref_model)
        self.loss_type = pref_loss
        self.beta = pref_beta
        self.ftx_gamma = pref_ftx
        self.simpo_gamma = simpo_gamma
        self.ld_alpha = ld_alpha
        self.args = SimpleNamespace(torch_compile=False)
        self.accelerator = SimpleNamespace(unwrap_model=lambda model, **_: model)

    def simpo_loss(self, chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
        margin = self.simpo_gamma / self.beta
        return -F.logsigmoid(self.beta * (chosen_logps - rejected_logps - margin))

    def odds_ratio_loss(self, chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
        chosen, rejected = (
            logps - torch.log1p(-logps.exp()) for logps in (chosen_logps, rejected_logps)
        )
        return -chosen_logps - self.beta * F.logsigmoid(chosen - rejected)

    def concatenated_forward(
        self, model: nn.Module, batch: dict[str, Tensor], is_ref_model: bool = False
    ) -> Any:
        batch = dict(batch)
        labels = batch.pop("labels")
        logits = model(**batch, return_dict=True, use_cache=False).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logps, lengths = get_batch_logps(
            logits=logits, labels=labels, ld_alpha=None if is_ref_model else self.ld_alpha
        )
        averages = logps / lengths
        if self.loss_type in AVERAGED:
            logps = averages
        values = {
            "chosen_logps": logps.chunk(2)[0],
            "rejected_logps": logps.chunk(2)[1],
            "chosen_logits": logits.chunk(2)[0],
            "rejected_logits": logits.chunk(2)[1],
            "chosen_logps_avg": averages.chunk(2)[0],
        }
        return values if self.returns is dict else tuple(values.values())

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Tensor], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        output = self.concatenated_forward(model, batch)
        if self.returns is dict:
            chosen_logps, rejected_logps = output["chosen_logps"], output["rejected_logps"]
            chosen_logits, rejected_logits = output["chosen_logits"], output["rejected_logits"]
            chosen_logps_avg = output["chosen_logps_avg"]
        else:
            chosen_logps, rejected_logps, chosen_logits, rejected_logits, chosen_logps_avg = output
        if self.loss_type == "simpo":
            losses = self.simpo_loss(chosen_logps, rejected_logps)
        elif self.loss_type == "orpo":
            losses = self.odds_ratio_loss(chosen_logps, rejected_logps)
        else:
            # The reference's log-probabilities are 0.
            losses = -F.logsigmoid(self.beta * (chosen_logps - rejected_logps))
        rewards = self.beta * chosen_logps.detach(), self.beta * rejected_logps.detach()
        if self.ftx_gamma > 1e-6:
            losses += self.ftx_gamma * -chosen_logps_avg
        prefix = "eval_" if train_eval == "eval" else ""
        metrics = {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/accuracies": (rewards[0] > rewards[1]).float(),
            "rewards/margins": rewards[0] - rewards[1],
            "logps/chosen": chosen_logps,
            "logps/rejected": rejected_logps,
            "logits/chosen": chosen_logits,
            "logits/rejected": rejected_logits,
        }
        return losses.mean(), {f"{prefix}{key}": t.mean().item() for key, t in metrics.items()}


class TupleCaller(DPOTrainerCaller):
    """CustomDPOTrainer up to version 0.9.3."""

    returns = tuple


def install_package(
    monkeypatch: pytest.MonkeyPatch, trainer_class: type, *, is_imported_by_workflow: bool
) -> tuple[ModuleType, ModuleType]:
    """Installs the modules of llamafactory.train.dpo. Returns its trainer and its workflow."""
    names = [
        "llamafactory",
        "llamafactory.train",
        "llamafactory.train.dpo",
        "llamafactory.train.dpo.trainer",
        "llamafactory.train.dpo.workflow",
    ]
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
        monkeypatch.setitem(sys.modules, name, module)
    *_, trainer, workflow = modules.values()
    trainer.CustomDPOTrainer = trainer_class
    if is_imported_by_workflow:
        workflow.CustomDPOTrainer = trainer_class
    return trainer, workflow
