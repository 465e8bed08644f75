"""Small models that TRL's trainers train on preference pairs, and records of the runs.

The text is that of the demo, from CPython's documentation. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

from simpo_ext.cli.demo import documentation

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from simpo_ext.integrations.trl import SimPOMixin, SimPOTrainer  # noqa: F401

disable_progress_bars()

STOCK, TIERS = "stock", ("logits", "fused")
VOCABULARY = 1000
MAX_LENGTH = 56
STEPS = 20
TRAIN_PAIRS, HELD_OUT_PAIRS = 37, 7
# Sums of a few hundred float32 products, relative to the largest element of a tensor.
TOLERANCE = 2e-5
# The metrics in the order of TRL's logs.
METRICS = [
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/rejected", "logps/chosen", "logits/rejected", "logits/chosen", "nll_loss"),
]
# Values that differ between any two runs.
TIMES = ("_runtime", "_per_second", "total_flos", "_preparation_time")

Step = dict[str, Any]


# ---- text, tokens and models -----------------------------------------------------------------


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the text of the pairs."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (pair.prompt + pair.chosen for pair in documentation.pairs(0).train)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@cache
def pairs() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Pairs for training, and held-out pairs. The last batch of both is smaller than the others."""
    split = documentation.pairs(0)
    return tuple(
        [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in part[:count]]
        for part, count in ((split.train, TRAIN_PAIRS), (split.held_out, HELD_OUT_PAIRS))
    )


# The config of a small Llama, and of models configured like one.
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # The logits differ more than those of a new model.
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_model(
    model_class: type[nn.Module] = LlamaForCausalLM,
    config_class: type[Any] = LlamaConfig,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    torch.manual_seed(0)
    return model_class(config_class(**{**SMALL, **options})).to(dtype)


def make_config(folder: Path, **options: Any) -> CPOConfig:
    """The config of a float32 run on the CPU that reports to no service."""
    given = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "max_steps": STEPS,
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 3,
        # Adam would scale up gradients that are rounding errors.
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        # The norm is logged, but never clipped.
        "max_grad_norm": 1e9,
        "max_length": MAX_LENGTH,
        "loss_type": "simpo",
        "beta": 2.0,
        "simpo_gamma": 1.0,
        "cpo_alpha": 0.5,
        "seed": 0,
    }
    with warnings.catch_warnings():  # CPOConfig warns about its own defaults.
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
        return CPOConfig(**{**given, **options})


def make_trainer(
    tier: str,
    folder: Path,
    model: Any = None,
    *,
    train: Sequence[Mapping[str, str]] | None = None,
    held_out: Sequence[Mapping[str, str]] | None = None,
    peft_config: Any = None,
    ours: Mapping[str, Any] | None = None,
    **options: Any,
) -> CPOTrainer:
    """A trainer of a copy of the model.

    Args:
        tier: ``"stock"`` for CPOTrainer. For SimPOTrainer, ``"logits"``, ``"fused"`` or ``"auto"``.
        folder: The folder of checkpoints.
        model: The model. The default is the small Llama.
        train: Pairs for training. The default is all.
        held_out: Pairs for evaluation. The default is all.
        peft_config: Passed to the trainer.
        ours: Options of SimPOTrainer alone.
        **options: Options of the config.
    """
    train_pairs, held_out_pairs = pairs()
    arguments = {
        "model": make_model() if model is None else copy.deepcopy(model),
        "args": make_config(folder, **options),
        "train_dataset": Dataset.from_list(list(train_pairs if train is None else train)),
        "eval_dataset": Dataset.from_list(list(held_out_pairs if held_out is None else held_out)),
        "processing_class": tokenizer(),
        "peft_config": peft_config,
    }
    if tier == STOCK:
        trainer = CPOTrainer(**arguments)
    else:
        fused_linear = {"logits": False, "fused": True, "auto": None}[tier]
        trainer = SimPOTrainer(**arguments, fused_linear=fused_linear, **(ours or {}))
        if tier != "auto":
            assert trainer.fused_linear is (tier == "fused")
    trainer.remove_callback(PrinterCallback)
    return trainer


# ---- whole runs ------------------------------------------------------------------------------


class Trained(NamedTuple):
    """The record of a run."""

    logs: list[dict[str, float]]
    gradients: list[dict[str, Tensor]]  # one dict for each optimizer step
    parameters: dict[str, Tensor]
    trainer: CPOTrainer


class _Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        self.gradients.append(gradients_of(about["model"]))

    def on_log(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        self.logs.append(dict(about["logs"]))


def train(trainer: CPOTrainer, *, resume: Path | None = None) -> Trained:
    """Trains, or resumes from a checkpoint."""
    recorder = _Recorder()
    trainer.add_callback(recorder)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    trainer.remove_callback(recorder)
    logs = [
        {name: value for name, value in each.items() if not name.endswith(TIMES)}
        for each in recorder.logs
    ]
    return Trained(logs, recorder.gradients, parameters_of(trainer.model), trainer)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {_bare(name): value.detach().clone() for name, value in model.named_parameters()}


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of all parameters that have one."""
    return {
        _bare(name): value.grad.detach().clone()
        for name, value in model.named_parameters()
        if value.grad is not None
    }


def _bare(name: str) -> str:
    """The name without the prefixes of DDP and torch.compile."""
    return name.removeprefix("module.").replace("_orig_mod.", "")


# ---- single steps ----------------------------------------------------------------------------


def batches(trainer: CPOTrainer, train_eval: str = "train") -> list[Any]:
    """The batches of the first epoch."""
    torch.manual_seed(0)
    loader = (
        trainer.get_train_dataloader() if train_eval == "train" else trainer.get_eval_dataloader()
    )
    return [trainer._prepare_inputs(batch) for batch in loader]


def first_batch(trainer: CPOTrainer) -> Any:
    torch.manual_seed(0)
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def step(trainer: CPOTrainer, batch: Any, model: nn.Module | None = None) -> Step:
    """Loss, metrics and gradients of one batch."""
    model = trainer.model if model is None else model
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # Some models have dropout that TRL does not disable.
    loss, metrics = trainer.get_batch_loss_metrics(model, batch, train_eval="train")
    loss.backward()
    result = {"loss": loss.item(), "metrics": metrics, "gradients": gradients_of(model)}
    model.zero_grad(set_to_none=True)
    return result


def with_attributes(
    trainer: CPOTrainer, values: Mapping[str, Any], run: Callable[[], Step]
) -> Step:
    """Runs a step with these attributes of the trainer, and restores them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(trainer, name, value)
        return run()


# ---- comparison ------------------------------------------------------------------------------


def assert_same_step(ours: Step, stock: Step, tolerance: float = TOLERANCE) -> None:
    assert ours["loss"] == pytest.approx(stock["loss"], rel=tolerance, nan_ok=True)
    assert_same_floats(ours["metrics"], stock["metrics"], tolerance)
    assert_same_tensors(ours["gradients"], stock["gradients"], tolerance)


def assert_same_training(ours: Trained, stock: Trained, tolerance: float = TOLERANCE) -> None:
    assert len(ours.logs) == len(stock.logs)
    assert len(ours.gradients) == len(stock.gradients)
    for position, (got, expected) in enumerate(zip(ours.logs, stock.logs, strict=True)):
        assert_same_floats(got, expected, tolerance, f"log {position}: ")
    for position, (got, expected) in enumerate(zip(ours.gradients, stock.gradients, strict=True)):
        assert_same_tensors(got, expected, tolerance, f"step {position}: ")
    assert_same_tensors(ours.parameters, stock.parameters, tolerance)


def assert_same_floats(
    ours: Mapping[str, float], stock: Mapping[str, float], tolerance: float, where: str = ""
) -> None:
    """Compares names, their order, and values. Margins are as exact as the rewards."""
    assert list(ours) == list(stock)
    size = max((abs(value) for name, value in stock.items() if "rewards/" in name), default=0.0)
    for name, expected in stock.items():
        assert isinstance(ours[name], type(expected)), f"{where}{name}: {ours[name]!r}"
        slack = tolerance * (size if name.endswith("rewards/margins") else 0.05)
        got = pytest.approx(expected, rel=tolerance, abs=slack, nan_ok=True)
        assert ours[name] == got, f"{where}{name}: {ours[name]!r}, expected {expected!r}"


def assert_same_tensors(
    ours: Mapping[str, Tensor], stock: Mapping[str, Tensor], tolerance: float, where: str = ""
) -> None:
    assert list(ours) == list(stock)
    assert stock
    # Smaller gradients are rounding errors, such as that of a bias of keys, which softmax ignores.
    floor = torch.finfo(torch.float32).eps * largest(stock)
    for name, expected in stock.items():
        assert ours[name].dtype == expected.dtype
        slack = max(tolerance * expected.abs().max().item(), floor)
        torch.testing.assert_close(
            ours[name],
            expected,
            rtol=0.0,
            atol=slack if slack == slack else 0.0,
            equal_nan=True,
            msg=lambda text, name=name: f"{where}{name}: {text}",
        )


def largest(tensors: Mapping[str, Tensor]) -> float:
    return max(value.abs().max().item() for value in tensors.values())


assert os.environ.get("HF_HUB_OFFLINE") == "1", "conftest.py must keep tests off the network"
