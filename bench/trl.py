"""Steps of SimPOTrainer beside those of TRL's CPOTrainer, on this machine's CPU.

The subjects are stock CPOTrainer, SimPOTrainer from logits, and SimPOTrainer from hidden states and
lm_head. All have the same model and batch. The model is the last part of a large one: a Llama of
few layers with a whole vocabulary, so that what lies between hidden states and loss takes much of
the step's time and most of its memory, as in small language models. A step is one of an evaluation,
or one of training without its optimizer's part, which is the same for all.

The losses, metrics and gradients of SimPOTrainer are compared with stock TRL's.
"""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from bench.common import cases, program
from bench.common.cases import DTYPES, IGNORE_INDEX, Batch, Case
from bench.common.measure import Problem
from bench.common.peers import Candidate, Forward
from bench.common.reference import BETA, GAMMA_BETA_RATIO

STOCK = "TRL CPOTrainer"
FUSED_LINEAR = {"simpo_ext, from logits": False, "simpo_ext, from hidden states": True}

EVALUATION, TRAINING = "evaluation", "training"
LAYERS, HEAD_SIZE = 2, 64
LOGITS_STD = 2.5  # about as peaked as a trained model's
CPO_ALPHA = 0.5
# Of losses and metrics beside stock TRL's, whose averages in bfloat16 are sums of rounded numbers;
# and of the gradients as a whole, which are rounded to the dtype.
TOLERANCES = {"float32": (2e-5, 1e-4), "bfloat16": (2e-2, 3e-2)}


# ---- model and batch -------------------------------------------------------------------------


def make_model(batch: Batch) -> Any:
    """On the CPU, with gradients for all parameters."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=batch.vocabulary,
        hidden_size=batch.hidden,
        intermediate_size=4 * batch.hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=max(1, batch.hidden // HEAD_SIZE),
        max_position_embeddings=max(batch.time, 16),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=LOGITS_STD / math.sqrt(batch.hidden))
    return model.to(DTYPES[batch.dtype])


def make_batch(batch: Batch) -> dict[str, Tensor]:
    """As TRL's collator makes it: completions after prompts, without padding."""
    generator = torch.Generator().manual_seed(1)
    pairs, prompt = batch.batch // 2, batch.prompts[0]
    opening = torch.randint(3, batch.vocabulary, (pairs, prompt), generator=generator)
    made: dict[str, Tensor] = {}
    for half in ("chosen", "rejected"):
        ids = torch.randint(3, batch.vocabulary, (pairs, batch.time), generator=generator)
        ids[:, :prompt] = opening
        labels = ids.clone()
        labels[:, :prompt] = IGNORE_INDEX
        made[f"{half}_input_ids"] = ids
        made[f"{half}_attention_mask"] = torch.ones_like(ids)
        made[f"{half}_labels"] = labels
    return made


# ---- trainers --------------------------------------------------------------------------------


def _tokenizer() -> Any:
    """For the trainers' data set, which no step uses."""
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
    """A subject with that model. It downloads nothing and reports nowhere."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL warns that this part of it is experimental
        import datasets
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        from simpo_ext.integrations.trl import SimPOTrainer

        datasets.disable_progress_bars()
        config = CPOConfig(
            output_dir=tempfile.gettempdir(),
            use_cpu=True,
            bf16=False,  # the model's own dtype is that of the case
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


def evaluate(trainer: Any, batch: dict[str, Tensor]) -> float:
    """A step of an evaluation; its loss."""
    trainer.model.eval()
    loss, _, _ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
    trainer._stored_metrics.clear()
    return loss.item()


def train(trainer: Any, batch: dict[str, Tensor]) -> float:
    """A step of training; its loss."""
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    trainer._stored_metrics.clear()
    return loss.item()


STEPS = {EVALUATION: evaluate, TRAINING: train}


@dataclass(frozen=True)
class Found:
    """What a trainer makes of the batch."""

    metrics: dict[str, float]  # of training, and both losses
    gradients: list[Tensor]


def find(trainer: Any, batch: dict[str, Tensor]) -> Found:
    """Runs both steps."""
    evaluation = evaluate(trainer, batch)
    trainer.model.train()
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch, train_eval="train")
    loss.backward()
    gradients = [value.grad for value in trainer.model.parameters()]
    trainer.model.zero_grad(set_to_none=True)
    return Found({"loss": loss.item(), EVALUATION: evaluation, **metrics}, gradients)


def compare(found: Found, stock: Found) -> tuple[float, float]:
    """Errors of the worst loss or metric, and of the gradients as a whole, beside stock TRL's."""
    theirs = stock.metrics
    size = max(1.0, *(abs(value) for name, value in theirs.items() if "rewards/" in name))
    differences = [
        abs(found.metrics.get(name, math.nan) - value) / max(size, abs(value))
        for name, value in theirs.items()
    ]
    squares = [0.0, 0.0]
    for ours, expected in zip(found.gradients, stock.gradients, strict=True):
        squares[0] += (ours.float() - expected.float()).square().sum().item()
        squares[1] += expected.float().square().sum().item()
    # The largest, or NaN if there is one.
    return torch.tensor(differences).max().item(), math.sqrt(squares[0] / squares[1])


# ---- the problem -----------------------------------------------------------------------------


class TrainerProblem(Problem):
    """A model and a batch. Each candidate lets a function of trainer and batch run."""

    phases = (EVALUATION, TRAINING)
    baseline = STOCK

    def __init__(self, batch: Batch) -> None:
        self._model, self._inputs = make_model(batch), make_batch(batch)
        self.batch = batch
        self.candidates = [
            Candidate(name, "step", partial(self._load, name), is_ours=name != STOCK)
            for name in (STOCK, *FUSED_LINEAR)
        ]

    @property
    def gradient_bytes(self) -> int:
        """See the base class."""
        return sum(each.numel() * each.element_size() for each in self._model.parameters())

    def _load(self, name: str) -> Forward:
        trainer = make_trainer(name, self._model)
        return lambda function: function(trainer, self._inputs)

    @cached_property
    def _stock(self) -> Found:
        return self.candidate(STOCK).forward(find)

    def errors(self, candidate: Candidate) -> dict[str, tuple[float, float]]:
        """See the base class."""
        found = compare(candidate.forward(find), self._stock)
        allowed = TOLERANCES[self.batch.dtype]
        return dict(zip(("value", "gradient"), zip(found, allowed, strict=True), strict=True))

    def prepare(self, candidate: Candidate) -> None:
        """Frees the gradients, as the optimizer does after its step."""
        self._model.zero_grad(set_to_none=True)

    def lap(self, candidate: Candidate, phase: str, prepared: None) -> float:
        """The loss of a step."""
        return candidate.forward(STEPS[phase])


def make_problem(case: Case) -> TrainerProblem:
    """For a process of its own."""
    return TrainerProblem(case.batch)


def small(case: Case) -> Case:
    """Loads the same code."""
    batch = case.batch
    return replace(case, batch=cases.synthetic(batch.batch, 16, 4096, batch.dtype, 0.6, 64))


# ---- the program -----------------------------------------------------------------------------


def _case(time: int, hidden: int, vocabulary: int, dtype: str) -> Case:
    return Case(cases.synthetic(4, time, vocabulary, dtype, 0.6, hidden), is_featured=True)


PROGRAM = program.Program(
    name="trl",
    module=__name__,
    description=(__doc__ or "").splitlines()[0],
    cases=(_case(512, 512, 128256, "bfloat16"), _case(256, 512, 128256, "float32")),
    quick_cases=(_case(24, 64, 600, "float32"),),
    phases={EVALUATION: "evaluation", TRAINING: "training"},
    baseline=STOCK,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; 0 if all of this project's candidates were right and timed."""
    return program.run(PROGRAM, arguments)
