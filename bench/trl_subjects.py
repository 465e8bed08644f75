"""TRL's CPOTrainer and this project's two tiers of it, on one model and one batch.

The model is the last part of a large one: a Llama of few layers whose vocabulary is whole, so that
what lies between hidden states and loss is a good part of the step, as it is in small language
models, and its memory most of it. Logits are about as peaked as a trained model's.
"""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cases import DTYPES
from bench.reference import BETA, GAMMA_BETA_RATIO
from bench.workload import IGNORE_INDEX

STOCK = "TRL CPOTrainer"
LOGITS = "simpo_ext, from logits"
FUSED = "simpo_ext, from hidden states"
FUSED_LINEAR = {LOGITS: False, FUSED: True}
SUBJECTS = (STOCK, LOGITS, FUSED)
OURS = (LOGITS, FUSED)

LAYERS, HEAD_SIZE = 2, 64
PROMPT_SHARE = 0.4
LOGITS_STD = 2.5
CPO_ALPHA = 0.5
# Of losses and metrics beside stock TRL's; in bfloat16 its averages are sums of roundings.
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2}
# Of gradients as a whole, which are rounded to the dtype.
GRADIENT_TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Geometry:
    """A batch and its model; JSON carries it from process to process."""

    pairs: int
    time: int
    hidden: int
    vocabulary: int
    dtype: str

    @property
    def name(self) -> str:
        """With the number of sequences, as the other benchmarks have it."""
        return f"{2 * self.pairs}x{self.time}x{self.hidden}x{self.vocabulary} {self.dtype}"

    @property
    def logits_bytes(self) -> int:
        """Of all positions."""
        return 2 * self.pairs * self.time * self.vocabulary * DTYPES[self.dtype].itemsize

    def warming(self) -> Geometry:
        """A batch that is over at once, for the same model."""
        return replace(self, time=min(self.time, 16))

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)


# ---- model and batch -------------------------------------------------------------------------


def make_model(each: Geometry) -> Any:
    """On the CPU, with gradients for all parameters."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=each.vocabulary,
        hidden_size=each.hidden,
        intermediate_size=4 * each.hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=max(1, each.hidden // HEAD_SIZE),
        max_position_embeddings=max(each.time, 16),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=LOGITS_STD / math.sqrt(each.hidden))
    return model.to(DTYPES[each.dtype])


def make_batch(each: Geometry) -> dict[str, Any]:
    """As TRL's collator makes it: completions after prompts, of which none is padded."""
    generator = torch.Generator().manual_seed(1)
    prompt = max(1, round(PROMPT_SHARE * each.time))
    shape = (each.pairs, each.time)
    opening = torch.randint(3, each.vocabulary, (each.pairs, prompt), generator=generator)
    batch: dict[str, Any] = {}
    for half in ("chosen", "rejected"):
        ids = torch.randint(3, each.vocabulary, shape, generator=generator)
        ids[:, :prompt] = opening
        labels = ids.clone()
        labels[:, :prompt] = IGNORE_INDEX
        batch[f"{half}_input_ids"] = ids
        batch[f"{half}_attention_mask"] = torch.ones_like(ids)
        batch[f"{half}_labels"] = labels
    return batch


# ---- trainers --------------------------------------------------------------------------------


def _tokenizer() -> Any:
    """Of what the trainers' data set is, which nobody looks at."""
    import tokenizers
    import transformers

    words = tokenizers.models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="a")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


def make_trainer(name: str, model: Any) -> Any:
    """A subject of that model; nothing is looked up or reported anywhere."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's, that this part of it is experimental
        import datasets
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        from simpo_ext.integrations.trl import SimPOTrainer

        datasets.disable_progress_bars()
        config = CPOConfig(
            output_dir=tempfile.gettempdir(),
            use_cpu=True,
            bf16=False,  # The model's own dtype is that of the case.
            report_to=[],
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            loss_type="simpo",
            beta=BETA,
            simpo_gamma=BETA * GAMMA_BETA_RATIO,
            cpo_alpha=CPO_ALPHA,
        )
    pair = {"prompt": "a", "chosen": "a", "rejected": "a"}
    arguments = {
        "model": model,
        "args": config,
        "train_dataset": datasets.Dataset.from_list([pair]),
        "processing_class": _tokenizer(),
    }
    if name == STOCK:
        return CPOTrainer(**arguments)
    return SimPOTrainer(**arguments, fused_linear=FUSED_LINEAR[name])


# ---- steps -----------------------------------------------------------------------------------


def evaluate(trainer: Any, batch: dict[str, Any]) -> float:
    """A step of an evaluation; its loss."""
    trainer.model.eval()
    loss, _, _ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
    trainer._stored_metrics.clear()
    return loss.item()


def train(trainer: Any, batch: dict[str, Any]) -> float:
    """A step of training without its optimizer's, which is the same for all; its loss."""
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    trainer._stored_metrics.clear()
    return loss.item()


PHASES: dict[str, Callable[[Any, dict[str, Any]], float]] = {
    "evaluation": evaluate,
    "training": train,
}


def free_gradients(trainer: Any) -> None:
    """As the optimizer does after its step."""
    trainer.model.zero_grad(set_to_none=True)


def gradient_bytes(model: Any) -> int:
    """What a step of training leaves in any case."""
    return sum(value.numel() * value.element_size() for value in model.parameters())


# ---- verification ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What a subject makes of the batch."""

    evaluation: float
    metrics: dict[str, float]  # of training, and the loss
    gradients: list[Tensor]


def find(trainer: Any, batch: dict[str, Any]) -> Found:
    """Runs both steps."""
    evaluation = evaluate(trainer, batch)
    trainer.model.train()
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch, train_eval="train")
    loss.backward()
    gradients = [value.grad for value in trainer.model.parameters()]
    free_gradients(trainer)
    return Found(evaluation, {"loss": loss.item(), **metrics}, gradients)


def compare(found: Found, stock: Found, dtype: str) -> dict[str, Any]:
    """Whether a subject's numbers are stock TRL's: ``status``, errors, and ``reason`` if not."""
    own = {**found.metrics, "evaluation": found.evaluation}
    theirs = {**stock.metrics, "evaluation": stock.evaluation}
    size = max(1.0, *(abs(value) for name, value in theirs.items() if "rewards/" in name))
    differences = {
        name: abs(own.get(name, math.nan) - value) / max(size, abs(value))
        for name, value in theirs.items()
    }
    worst = max(differences, key=lambda name: (math.isnan(differences[name]), differences[name]))
    squares = [0.0, 0.0]
    for ours, expected in zip(found.gradients, stock.gradients, strict=True):
        squares[0] += (ours.float() - expected.float()).square().sum().item()
        squares[1] += expected.float().square().sum().item()
    gradient_error = math.sqrt(squares[0] / squares[1])
    result: dict[str, Any] = {
        "status": "right",
        "value_error": differences[worst],
        "gradient_error": gradient_error,
    }
    if not differences[worst] <= TOLERANCES[dtype]:
        result |= {"status": "wrong", "reason": f"{worst}: {own.get(worst)}, not {theirs[worst]}"}
    elif not gradient_error <= GRADIENT_TOLERANCES[dtype]:
        result |= {"status": "wrong", "reason": f"gradients differ by {gradient_error:.1e}"}
    return result


def laps(trainer: Any, batch: dict[str, Any]) -> dict[str, Callable[[Any], None]]:
    """Of both phases, as bench.timing takes them."""

    def lap(run: Callable[[Any, dict[str, Any]], float], _: Any) -> None:
        run(trainer, batch)

    return {phase: partial(lap, run) for phase, run in PHASES.items()}
