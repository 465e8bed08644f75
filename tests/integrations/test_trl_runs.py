"""Whole runs of SimPOTrainer match TRL's CPOTrainer step by step.

Both train copies of one float32 Llama on the same batches, so only the order of sums differs. At
every optimizer step, gradients agree within TOLERANCE of each tensor's largest element. Losses and
metrics agree within a relative TOLERANCE.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from support import trl_training as trl
from support.trl_training import METRICS, STEPS, STOCK, TIERS, TOLERANCE, SimPOMixin, Trained

pytestmark = pytest.mark.usefixtures("one_thread")

# The runs: options of the config by name.
RUNS: dict[str, dict[str, Any]] = {
    # The last batch of held-out pairs has one pair.
    "plain": {"eval_strategy": "steps", "eval_steps": 10, "save_strategy": "steps"}
    | {"save_steps": 10},
    # An epoch ends with a single micro-batch of one pair.
    "accumulated": {"gradient_accumulation_steps": 4},
    # CPOConfig's defaults without bfloat16: sums, Adam, and activation checkpointing.
    "default": {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0, "optim": "adamw_torch"}
    | {"learning_rate": 1e-3, "gradient_checkpointing": True, "max_steps": 6},
}
# The size of Adam's first steps does not depend on the gradient, so rounding errors grow.
TOLERANCES = {"default": 1e-3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Trained]:
    """Returns a trainer's run by name, and caches it."""

    @cache
    def train(tier: str, run: str) -> Trained:
        folder = tmp_path_factory.mktemp(f"{run}_{tier}")
        return trl.train(trl.make_trainer(tier, folder, **RUNS[run]))

    return train


# ---- whole runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("run", RUNS)
def test_a_run_matches_stock_trl_step_by_step(trained: Any, run: str, tier: str) -> None:
    stock = trained(STOCK, run)
    assert len(stock.gradients) == RUNS[run].get("max_steps", STEPS)
    tolerance = TOLERANCES.get(run, TOLERANCE)
    trl.assert_same_training(trained(tier, run), stock, tolerance)


def test_the_runs_learn(trained: Any) -> None:
    """Runs that learn nothing would agree trivially."""
    for run in ("plain", "accumulated"):
        losses = [log["loss"] for log in trained(STOCK, run).logs if "loss" in log]
        assert sum(losses[-3:]) < 0.97 * sum(losses[:3]), run
    start = trl.parameters_of(trl.make_model())
    for name, parameter in trained(STOCK, "plain").parameters.items():
        assert not torch.allclose(parameter, start[name], rtol=1e-3), name


@pytest.mark.parametrize("tier", TIERS)
def test_training_and_evaluation_log_the_names_of_trl(trained: Any, tier: str) -> None:
    for got, expected in zip(
        trained(tier, "plain").logs, trained(STOCK, "plain").logs, strict=True
    ):
        assert list(got) == list(expected)
    training = next(log for log in trained(tier, "plain").logs if "loss" in log)
    assert [name for name in training if name in METRICS] == METRICS
    evaluation = next(log for log in trained(tier, "plain").logs if "eval_loss" in log)
    names = [f"eval_{name}" for name in METRICS]
    assert [name for name in evaluation if name in names] == names


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("saved_by", ["stock", "itself"])
def test_a_run_resumes_from_a_checkpoint(
    trained: Any, tmp_path: Path, tier: str, saved_by: str
) -> None:
    """The checkpoint may be stock TRL's: a run can switch to SimPOTrainer."""
    whole = trained(STOCK, "plain")
    source = trained(STOCK if saved_by == "stock" else tier, "plain")
    checkpoint = Path(source.trainer.args.output_dir) / "checkpoint-10"
    rest = trl.train(
        trl.make_trainer(tier, tmp_path, **{**RUNS["plain"], "save_strategy": "no"}),
        resume=checkpoint,
    )
    assert len(rest.gradients) == STEPS - 10
    for got, expected in zip(rest.gradients, whole.gradients[10:], strict=True):
        trl.assert_same_tensors(got, expected, TOLERANCE)
    trl.assert_same_tensors(rest.parameters, whole.parameters, TOLERANCE)
    losses = [[log["loss"] for log in run.logs if "loss" in log] for run in (rest, whole)]
    assert losses[0] == pytest.approx(losses[1][10:], rel=TOLERANCE)


@pytest.mark.parametrize("tier", TIERS)
def test_a_checkpoint_has_the_files_of_stock_trl(trained: Any, tier: str) -> None:
    folders = [Path(trained(name, "plain").trainer.args.output_dir) for name in (tier, STOCK)]
    ours, stock = (sorted(p.name for p in (f / "checkpoint-10").iterdir()) for f in folders)
    assert ours == stock
    models = [type(trl.make_model()).from_pretrained(f / "checkpoint-10") for f in folders]
    trl.assert_same_tensors(*map(trl.parameters_of, models), TOLERANCE)


# ---- bfloat16 --------------------------------------------------------------------------------

# The allowed error relative to stock TRL's. Most of the error comes from the model's layers.
ERROR_FACTOR = 1.1


def run_of_one_point(tier: str, folder: Path, dtype: torch.dtype, **options: Any) -> Trained:
    """Steps on several batches that do not change the weights, which bfloat16 represents."""
    model = trl.make_model(dtype=torch.bfloat16).to(dtype)
    options = {"learning_rate": 0.0, "max_steps": 6, **options}
    return trl.train(trl.make_trainer(tier, folder, model, **options))


def errors(run: Trained, truth: Trained) -> dict[str, float]:
    """The errors over all steps: of all gradients together, and of each metric."""
    squares = {"gradients": 0.0}
    norm = 0.0
    for got, expected in zip(run.gradients, truth.gradients, strict=True):
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            norm += gradient.square().sum().item()
            squares["gradients"] += (got[name].double() - gradient).square().sum().item()
    squares["gradients"] /= norm
    for got, expected in zip(run.logs, truth.logs, strict=True):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            squares[name] = squares.get(name, 0.0) + (got[name] - value) ** 2
    return {name: square**0.5 for name, square in squares.items()}


@pytest.mark.parametrize("way", ["model", "autocast"])
def test_bfloat16_errors_are_no_larger_than_in_stock_trl(tmp_path: Path, way: str) -> None:
    truth = run_of_one_point(STOCK, tmp_path, torch.float64)
    if way == "model":
        dtype, options = torch.bfloat16, {}
    else:
        dtype, options = torch.float32, {"bf16": True}
    stock = errors(run_of_one_point(STOCK, tmp_path, dtype, **options), truth)
    assert 1e-3 < stock["gradients"] < 0.1
    for tier in TIERS:
        ours = errors(run_of_one_point(tier, tmp_path, dtype, **options), truth)
        assert ours.keys() == stock.keys()
        for name, error in ours.items():
            assert error <= ERROR_FACTOR * stock[name] + 1e-3, (tier, name, error, stock[name])
        assert ours["gradients"] <= ERROR_FACTOR * stock["gradients"], tier


# ---- subclasses ------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
def test_the_mixin_combines_with_a_subclass_of_cpo_trainer(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tier: str
) -> None:
    assert [*trl.SimPOTrainer.__mro__[1:3]] == [SimPOMixin, trl.CPOTrainer]

    class Own(trl.CPOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 2.0 * super().compute_loss(*args, **kwargs)

    class Both(SimPOMixin, Own):
        pass

    monkeypatch.setattr(trl, "SimPOTrainer", Both)
    run = trl.train(trl.make_trainer(tier, tmp_path, max_steps=1))
    doubled = {n: 2.0 * g for n, g in trained(STOCK, "plain").gradients[0].items()}
    trl.assert_same_tensors(run.gradients[0], doubled, TOLERANCE)
