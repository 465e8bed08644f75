"""Trains with SimPO from random weights, and evaluates before, during and after training."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

import simpo_ext

from .batches import Example, collate
from .messages import DemoError, require

EVALUATIONS = 6  # held-out evaluations after the first
WARMUP_STEPS = 20
EVALUATION_PAIRS = 32


@dataclass(frozen=True)
class Settings:
    """The options that, with the data and the number of threads, determine a run."""

    steps: int
    batch_pairs: int
    lr: float
    beta: float
    gamma_beta_ratio: float
    loss_type: Literal["sigmoid", "hinge"]
    label_smoothing: float
    sft_weight: float
    seed: int

    def loss_function(self) -> simpo_ext.SimPOLoss:
        """The loss with these settings."""
        return simpo_ext.SimPOLoss(
            beta=self.beta,
            gamma_beta_ratio=self.gamma_beta_ratio,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
            sft_weight=self.sft_weight,
        )


@dataclass(frozen=True)
class Scores:
    """Means over pairs. Log-probabilities are per byte, and the loss has no SFT term."""

    accuracy: float
    margin: float
    chosen_logps: float
    rejected_logps: float
    loss: float


@dataclass
class Result:
    """The metrics of a run. scores[i] were measured after scored_steps[i] steps."""

    settings: Settings
    margins: list[float] = field(default_factory=list)  # of the training batches
    accuracies: list[float] = field(default_factory=list)
    scored_steps: list[int] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def steps(self) -> int:
        """The number of steps done."""
        return len(self.margins)


def train(
    model: nn.Module, training: Sequence[Example], held_out: Sequence[Example], settings: Settings
) -> Result:
    """Train `model` in place. Ctrl-C ends the training, not the program."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _learning_rate(step, settings.steps)
    )
    loss_function = settings.loss_function()
    result = Result(settings)
    started = time.perf_counter()
    # A log file gets a new line for each update of the bar, so it needs fewer updates.
    interval = 0.1 if sys.stderr.isatty() else 15.0
    with require("tqdm").tqdm(
        total=settings.steps, unit="step", dynamic_ncols=True, mininterval=interval
    ) as bar:

        def score() -> None:
            scores = evaluate(model, held_out, settings)
            result.scored_steps.append(result.steps)
            result.scores.append(scores)
            bar.write(
                f"step {result.steps:>{len(str(settings.steps))}}: held-out accuracy "
                f"{scores.accuracy:6.1%}, margin {scores.margin:6.3f}",
                file=sys.stderr,
            )

        score()
        try:
            for batch in _batches(training, settings):
                ids, labels = collate(batch)
                output = loss_function(model(ids), labels)
                loss = output.loss.item()
                if not math.isfinite(loss):
                    raise DemoError(
                        f"the loss is {loss} at step {result.steps + 1}; try a lower --lr"
                    )
                optimizer.zero_grad()
                torch.autograd.backward(output.loss)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()

                metrics = output.metrics()
                margin, accuracy = metrics["rewards/margins"], metrics["rewards/accuracies"]
                result.margins.append(margin)
                result.accuracies.append(accuracy)
                bar.set_postfix_str(
                    f"loss {loss:.3f}, margin {margin:.2f}, accuracy {accuracy:.0%}", refresh=False
                )
                bar.update()
                if result.steps * EVALUATIONS // settings.steps > len(result.scores) - 1:
                    score()
        except KeyboardInterrupt:
            result.interrupted = True
        if result.scored_steps[-1] != result.steps:
            score()
    result.seconds = time.perf_counter() - started
    return result


@torch.no_grad()
def evaluate(model: nn.Module, examples: Sequence[Example], settings: Settings) -> Scores:
    """Score the pairs with `model`. The loss is the preference term alone."""
    loss_function = settings.loss_function()
    chosen, rejected, losses = [], [], []
    for start in range(0, len(examples), EVALUATION_PAIRS):
        ids, labels = collate(examples[start : start + EVALUATION_PAIRS])
        output = loss_function(model(ids), labels)
        chosen.append(output.chosen_logps)
        rejected.append(output.rejected_logps)
        losses.append(output.losses)
    chosen_logps, rejected_logps = torch.cat(chosen), torch.cat(rejected)
    return Scores(
        accuracy=(chosen_logps > rejected_logps).float().mean().item(),
        margin=settings.beta * (chosen_logps - rejected_logps).mean().item(),
        chosen_logps=chosen_logps.mean().item(),
        rejected_logps=rejected_logps.mean().item(),
        loss=torch.cat(losses).mean().item(),
    )


def _batches(examples: Sequence[Example], settings: Settings) -> Iterator[list[Example]]:
    """Yield a batch for each step. Each pass over the pairs has a new order."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = min(settings.batch_pairs, len(examples))
    order: list[int] = []
    for _ in range(settings.steps):
        if len(order) < size:
            order = torch.randperm(len(examples), generator=generator).tolist()
        yield [examples[i] for i in order[-size:]]
        del order[-size:]


def _learning_rate(step: int, steps: int) -> float:
    """The factor of the peak rate: a linear warm-up, then half a cosine down to a twentieth."""
    warmup = min(WARMUP_STEPS, steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.525 + 0.475 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
