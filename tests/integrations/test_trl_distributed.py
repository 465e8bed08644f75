"""SimPOTrainer on two ranks matches stock TRL on two ranks: accelerate's DDP, and FSDP2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from support import trl_training as trl
from support.ranks import run_on_ranks
from support.trl_training import STOCK, TIERS

# The ranks' processes always run the CPU kernels.
pytestmark = pytest.mark.cpu_only

TIMEOUT = 240.0  # seconds, mostly for imports
DDP = {
    # The last micro-batches of an epoch have three pairs and one pair. The last batch of an
    # evaluation has one.
    "max_steps": 8,
    "gradient_accumulation_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
}


@contextmanager
def accelerated() -> Iterator[None]:
    """Sets torchrun's environment for accelerate, which uses the existing process group."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "true"}
    with mock.patch.dict(os.environ, told):
        _forget()
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    """Resets accelerate's state, which belongs to one process group."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def run_with_ddp(tier: str, folder: Path, options: dict[str, Any]) -> Any:
    with accelerated():
        trainer = trl.make_trainer(tier, folder, **options)
        assert trainer.accelerator.num_processes == dist.get_world_size()
        run = trl.train(trainer)
        if tier != STOCK:
            assert trainer.fused_linear is (tier != "logits")
        return run._replace(trainer=None)


@cache
def stock_with_ddp(folder: Path) -> list[Any]:
    return run_on_ranks(2, run_with_ddp, STOCK, folder, DDP, timeout=TIMEOUT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ddp")


@pytest.mark.parametrize("tier", ["auto", *TIERS])
def test_a_run_with_ddp_matches_stock_trl(folder: Path, tier: str) -> None:
    stock = stock_with_ddp(folder)
    trl.assert_same_tensors(stock[0].gradients[0], stock[1].gradients[0], 0.0)
    assert any("eval_loss" in log for log in stock[0].logs)
    ours = run_on_ranks(2, run_with_ddp, tier, folder, DDP, timeout=TIMEOUT)
    for got, expected in zip(ours, stock, strict=True):
        trl.assert_same_training(got, expected)


# ---- a pair that one rank drops --------------------------------------------------------------

LONG = " ".join(map(str, range(100, 100 + trl.MAX_LENGTH)))
EMPTY = {"prompt": LONG, "chosen": " yes, it is", "rejected": " no, it is not"}


def evaluate_with_ddp(tier: str, folder: Path) -> dict[str, float]:
    train, _ = trl.pairs()
    held_out = [train[0], EMPTY, train[1], train[2]]
    with accelerated():
        options = {"per_device_eval_batch_size": 1}
        trainer = trl.make_trainer(tier, folder, held_out=held_out, **options)
        return trainer.evaluate()


@pytest.mark.parametrize("tier", TIERS)
def test_a_dropped_pair_is_in_no_rank_s_metrics(tmp_path: Path, tier: str) -> None:
    train, _ = trl.pairs()
    parts = []
    for batch in ([train[0]], [train[1], train[2]]):
        trainer = trl.make_trainer(STOCK, tmp_path, held_out=batch)
        parts.append(trainer.evaluate())
    names = [
        name
        for name in parts[0]
        # The loss is a mean over ranks, and the mean of the logits over all positions.
        if name.startswith("eval_") and not name.endswith((*trl.TIMES, "loss")) and "/" in name
        and "logits/" not in name
    ]  # fmt: skip
    assert len(names) == 6
    results = run_on_ranks(2, evaluate_with_ddp, tier, tmp_path, timeout=TIMEOUT)
    for got in results:
        expected = {name: sum(part[name] for part in parts) / 2 for name in names}
        trl.assert_same_floats({name: got[name] for name in names}, expected, trl.TOLERANCE)


def train_with_empty_pairs(tier: str, folder: Path) -> Any:
    train, _ = trl.pairs()
    with accelerated():
        options = {"per_device_train_batch_size": 1, "max_steps": 4}
        trainer = trl.make_trainer(tier, folder, train=[train[0], EMPTY, EMPTY, EMPTY], **options)
        return trl.train(trainer)._replace(trainer=None)


@pytest.mark.parametrize("tier", TIERS)
def test_ranks_without_valid_pairs_do_not_hang(tmp_path: Path, tier: str) -> None:
    runs = run_on_ranks(2, train_with_empty_pairs, tier, tmp_path, timeout=TIMEOUT)
    sizes = [trl.largest(gradients) for gradients in runs[0].gradients]
    # In two of the steps, one rank has the only valid pair. In the others, no rank has one.
    assert sorted(size > 0.0 for size in sizes) == [False, False, True, True]
    for name, parameter in runs[0].parameters.items():
        assert parameter.isfinite().all()
        assert torch.equal(parameter, runs[1].parameters[name])


# ---- FSDP2 -----------------------------------------------------------------------------------


def step_with_fsdp(tier: str, folder: Path, sharding: str, tied: bool) -> Any:
    """A step on each rank's own batch. accelerate would need an accelerator to shard the model."""
    model = trl.make_model(tie_word_embeddings=tied)
    trainer = trl.make_trainer(tier, folder, model)
    batch = trl.batches(trainer)[dist.get_rank()]
    model = trainer.model
    for layer in model.model.layers:
        fully_shard(layer)
    if sharding == "head":
        fully_shard(model.lm_head)
    fully_shard(model)
    if tier != STOCK:
        with torch.no_grad():
            trainer.get_batch_loss_metrics(model.eval(), batch, train_eval="eval")
    step = trl.step(trainer, batch)
    if tier != STOCK:
        assert trainer.fused_linear is (tier != "logits")
    for name, gradient in step["gradients"].items():
        assert isinstance(gradient, DTensor)
        step["gradients"][name] = gradient.full_tensor()
    return step


@pytest.mark.parametrize("tier", ["auto", *TIERS])
@pytest.mark.parametrize(("sharding", "tied"), [("root", False), ("head", False), ("root", True)])
def test_a_step_with_fsdp_matches_stock_trl(
    tmp_path: Path, tier: str, sharding: str, tied: bool
) -> None:
    stock, ours = (
        run_on_ranks(2, step_with_fsdp, name, tmp_path, sharding, tied, timeout=TIMEOUT)
        for name in (STOCK, tier)
    )
    assert stock[0]["loss"] != stock[1]["loss"]
    for got, expected in zip(ours, stock, strict=True):
        trl.assert_same_step(got, expected)
