"""Pairs with empty completions, because the prompt alone fills ``max_length``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from support import trl_training as trl
from support.trl_training import MAX_LENGTH, STOCK, TIERS

pytestmark = pytest.mark.usefixtures("one_thread")

LOSSES = {"simpo": {}, "sigmoid": {"beta": 0.1}, "ipo": {"beta": 0.5}, "alphapo": {"alpha": 0.1}}


def filling_prompt() -> str:
    """A prompt of MAX_LENGTH tokens, including the one that TRL prepends."""
    tokenizer = trl.tokenizer()
    words = " ".join(map(str, range(100, 100 + MAX_LENGTH)))
    prompt = tokenizer.decode(tokenizer(words)["input_ids"][: MAX_LENGTH - 1])
    assert len(tokenizer(prompt)["input_ids"]) == MAX_LENGTH - 1
    return prompt


def pairs_with(*which: str) -> list[dict[str, str]]:
    """Valid pairs by number, and empty ones.

    The rejected completion of pair 0 is cut at MAX_LENGTH, so an empty pair does not make a batch
    with it longer.
    """
    train, _ = trl.pairs()
    first = {**train[0], "rejected": f" {filling_prompt()}"}
    made = {"0": first, "1": train[1], "2": train[2]}
    made["empty"] = {
        "prompt": filling_prompt(),
        "chosen": " yes, it is",
        "rejected": " no, it is not",
    }
    return [made[name] for name in which]


def trainer_of(tier: str, folder: Path, *which: str, empty: str = "drop", **options: Any) -> Any:
    given = pairs_with(*which)
    options = {"per_device_train_batch_size": len(given), "loss_type": "simpo", **options}
    ours = {} if tier == STOCK else {"empty": empty}
    return trl.make_trainer(tier, folder, train=given, ours=ours, **options)


def step_of(tier: str, folder: Path, *which: str, empty: str = "drop", **options: Any) -> trl.Step:
    trainer = trainer_of(tier, folder, *which, empty=empty, **options)
    batch = trl.first_batch(trainer)
    counted = [(batch[f"{half}_labels"] != -100).any(1) for half in ("chosen", "rejected")]
    assert (counted[0] & counted[1]).sum() == len(which) - which.count("empty")
    return trl.step(trainer, batch)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_empty_nan_matches_the_averages_of_stock_trl(
    tmp_path: Path, tier: str, loss_type: str
) -> None:
    which = ("0", "empty", "1")
    options = {"loss_type": loss_type, **LOSSES[loss_type]}
    stock = step_of(STOCK, tmp_path, *which, **options)
    ours = step_of(tier, tmp_path, *which, empty="nan", **options)
    assert math.isnan(ours["loss"])
    if loss_type == "sigmoid":  # Stock TRL's sum of no tokens is 0.
        assert math.isfinite(stock["loss"])
        assert math.isnan(ours["metrics"]["logps/chosen"])
    else:
        assert math.isnan(stock["loss"])
        trl.assert_same_floats(ours["metrics"], stock["metrics"], trl.TOLERANCE)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("which", [("0", "empty", "1"), ("empty", "0", "1", "empty", "2")])
def test_empty_drop_equals_a_batch_without_the_pair(
    tmp_path: Path, tier: str, loss_type: str, which: tuple[str, ...]
) -> None:
    options = {"loss_type": loss_type, **LOSSES[loss_type]}
    rest = [name for name in which if name != "empty"]
    without = step_of(STOCK, tmp_path, *rest, **options)
    trl.assert_same_step(step_of(tier, tmp_path, *which, **options), without)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("half", ["chosen", "rejected"])
def test_one_empty_completion_drops_the_pair(tmp_path: Path, tier: str, half: str) -> None:
    trainer = trainer_of(tier, tmp_path, "0", "1", "2")
    stock = trainer_of(STOCK, tmp_path, "0", "1", "2")
    batch = trl.first_batch(trainer)
    row = next(  # not the longest row
        index
        for index, prompt in enumerate(batch["prompt"])
        if prompt != pairs_with("0")[0]["prompt"]
    )
    rest = [index for index in range(3) if index != row]
    expected = trl.step(
        stock,
        {
            name: value[rest] if isinstance(value, torch.Tensor) else [value[i] for i in rest]
            for name, value in batch.items()
        },
    )
    labels = batch[f"{half}_labels"].clone()
    labels[row] = -100
    trl.assert_same_step(trl.step(trainer, {**batch, f"{half}_labels": labels}), expected)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("cpo_alpha", [0.0, 0.5])
def test_a_batch_of_empty_pairs_has_loss_and_gradient_zero(
    tmp_path: Path, tier: str, cpo_alpha: float
) -> None:
    step = step_of(tier, tmp_path, "empty", "empty", cpo_alpha=cpo_alpha)
    assert step["loss"] == 0.0
    assert list(step["metrics"]) == list(step_of(STOCK, tmp_path, "0", "1")["metrics"])
    # DDP waits for the gradients of all parameters.
    assert len(step["gradients"]) == len(list(trl.make_model().parameters()))
    assert trl.largest(step["gradients"]) == 0.0


@pytest.mark.parametrize("tier", TIERS)
def test_a_run_with_an_empty_pair_equals_one_without_it(tmp_path: Path, tier: str) -> None:
    options = {"max_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    ours = trl.train(trainer_of(tier, tmp_path, "0", "empty", "1", **options))
    stock = trl.train(trainer_of(STOCK, tmp_path, "0", "1", **options))
    trl.assert_same_training(ours, stock)


@pytest.mark.parametrize("tier", TIERS)
def test_the_metrics_of_an_evaluation_exclude_empty_pairs(tmp_path: Path, tier: str) -> None:
    logs = []
    for name, which in ((tier, ("0", "empty", "1")), (STOCK, ("0", "1"))):
        given = pairs_with(*which)
        options = {"per_device_eval_batch_size": len(given)}
        ours = {} if name == STOCK else {"empty": "drop"}
        trainer = trl.make_trainer(name, tmp_path, held_out=given, ours=ours, **options)
        found = trainer.evaluate()
        logs.append({n: v for n, v in found.items() if not n.endswith(trl.TIMES)})
    trl.assert_same_floats(*logs, trl.TOLERANCE)
