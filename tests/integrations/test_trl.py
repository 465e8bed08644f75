"""SimPOTrainer beside TRL's CPOTrainer: whole runs, step by step, and single steps of every loss.

Both train copies of one float32 Llama on the same batches, so that all they differ by is the order
of sums. After every optimizer step gradients agree to TOLERANCE of each tensor's largest element,
and losses and metrics to TOLERANCE of themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support import trl_training as trl
from support.trl_training import STEPS, STOCK, TIERS, TOLERANCE, VOCABULARY, SimPOMixin, Trained

pytestmark = pytest.mark.usefixtures("one_thread")

METRICS = [
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/rejected", "logps/chosen", "logits/rejected", "logits/chosen", "nll_loss"),
]
# Names, and options of the config: what the runs are.
RUNS: dict[str, dict[str, Any]] = {
    # The held-out pairs leave a last batch of one.
    "plain": {"eval_strategy": "steps", "eval_steps": 10, "save_strategy": "steps"}
    | {"save_steps": 10},
    # An epoch ends with one micro-batch, of one pair.
    "accumulated": {"gradient_accumulation_steps": 4},
    # As CPOConfig has it but for bfloat16: sums, Adam, and checkpoints of activations.
    "default": {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0, "optim": "adamw_torch"}
    | {"learning_rate": 1e-3, "gradient_checkpointing": True, "max_steps": 6},
}
# Adam's first steps have one size whatever the gradient: its rounding is theirs.
TOLERANCES = {"default": 1e-3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Trained]:
    """A trainer's run of that name, made when first asked for."""

    @cache
    def train(tier: str, run: str) -> Trained:
        folder = tmp_path_factory.mktemp(f"{run}_{tier}")
        return trl.train(trl.make_trainer(tier, folder, **RUNS[run]))

    return train


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One of each, for single steps. They have equal models."""
    folder = tmp_path_factory.mktemp("single")
    return {tier: trl.make_trainer(tier, folder) for tier in (STOCK, *TIERS)}


# ---- whole runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("run", RUNS)
def test_a_run_is_stock_trl_s_step_by_step(trained: Any, run: str, tier: str) -> None:
    stock = trained(STOCK, run)
    assert len(stock.gradients) == RUNS[run].get("max_steps", STEPS)
    tolerance = TOLERANCES.get(run, TOLERANCE)
    trl.assert_same_training(trained(tier, run), stock, tolerance)


def test_the_runs_learn(trained: Any) -> None:
    """Otherwise their agreement would say little."""
    for run in ("plain", "accumulated"):
        losses = [log["loss"] for log in trained(STOCK, run).logs if "loss" in log]
        assert sum(losses[-3:]) < 0.97 * sum(losses[:3]), run
    start = trl.parameters_of(trl.make_model())
    for name, parameter in trained(STOCK, "plain").parameters.items():
        assert not torch.allclose(parameter, start[name], rtol=1e-3), name


@pytest.mark.parametrize("tier", TIERS)
def test_training_and_evaluation_log_trl_s_names(trained: Any, tier: str) -> None:
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
def test_a_run_goes_on_from_a_checkpoint(
    trained: Any, tmp_path: Path, tier: str, saved_by: str
) -> None:
    """Its own, or one of stock TRL: a run can change trainers on its way."""
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
def test_a_checkpoint_holds_what_stock_trl_s_does(trained: Any, tier: str) -> None:
    folders = [Path(trained(name, "plain").trainer.args.output_dir) for name in (tier, STOCK)]
    ours, stock = (sorted(p.name for p in (f / "checkpoint-10").iterdir()) for f in folders)
    assert ours == stock
    models = [type(trl.make_model()).from_pretrained(f / "checkpoint-10") for f in folders]
    trl.assert_same_tensors(*map(trl.parameters_of, models), TOLERANCE)


# ---- bfloat16 --------------------------------------------------------------------------------

# How far a tier's error may be above stock TRL's; below 1 % both are the body's own rounding.
ERROR_FACTOR = 1.1


def run_of_one_point(tier: str, folder: Path, dtype: torch.dtype, **options: Any) -> Trained:
    """Steps on different batches that leave the model, whose weights are bfloat16's, as it is."""
    model = trl.make_model(dtype=torch.bfloat16).to(dtype)
    options = {"learning_rate": 0.0, "max_steps": 6, **options}
    return trl.train(trl.make_trainer(tier, folder, model, **options))


def errors(run: Trained, truth: Trained) -> dict[str, float]:
    """Over all steps, of all gradients together and of each metric."""
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
def test_in_bfloat16_errors_are_no_larger_than_stock_trl_s(tmp_path: Path, way: str) -> None:
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


# ---- every loss, on one batch ----------------------------------------------------------------

LOSSES = {
    f"{loss_type} alpha={alpha} cpo_alpha={cpo_alpha} label_smoothing={smoothing}": {
        "loss_type": loss_type,
        "alpha": alpha,
        "cpo_alpha": cpo_alpha,
        "label_smoothing": smoothing,
    }
    for loss_type, alpha, cpo_alpha, smoothing in itertools.product(
        ("sigmoid", "hinge", "ipo", "simpo"), (0.0, 0.1), (0.0, 0.7), (0.0, 0.1)
    )
    # Which a sum of logps far below zero makes infinite.
    if alpha == 0.0 or loss_type in ("ipo", "simpo")
}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_every_loss_is_stock_trl_s(trainers: Any, tier: str, options: dict[str, Any]) -> None:
    batch = trl.first_batch(trainers[STOCK])
    # Of a hinge, on both sides of its kink.
    options = {**options, "beta": 0.05 if options["loss_type"] == "hinge" else 0.5}
    stock, ours = (
        trl.with_attributes(trainer, options, lambda trainer=trainer: trl.step(trainer, batch))
        for trainer in (trainers[STOCK], trainers[tier])
    )
    assert trl.largest(stock["gradients"]) > 0.0
    trl.assert_same_step(ours, stock)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("alpha", [0.5, -0.5])
def test_rewards_that_alpha_makes_infinite_are_so_in_both(
    trainers: Any, tier: str, alpha: float
) -> None:
    chosen, rejected = torch.tensor([-1.0, -900.0, -2.0]), torch.tensor([-2.0, -3.0, -900.0])
    parts = [
        trl.with_attributes(
            trainer, {"alpha": alpha}, lambda trainer=trainer: trainer.cpo_loss(chosen, rejected)
        )
        for trainer in (trainers[STOCK], trainers[tier])
    ]
    (stock, *rewards), (ours, *our_rewards) = parts
    # Whose loss of a pair that is infinitely far apart is 0 times infinity where nothing is smooth.
    torch.testing.assert_close(ours, stock.nan_to_num(0.0, torch.inf))
    for expected, got in zip(rewards, our_rewards, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("tier", TIERS)
def test_alphapo_of_the_config_is_stock_trl_s(tmp_path: Path, tier: str) -> None:
    options = {"loss_type": "alphapo", "alpha": 0.2, "label_smoothing": 0.1}
    stock, ours = (trl.make_trainer(name, tmp_path, **options) for name in (STOCK, tier))
    assert ours.cpo_alpha == 0.0
    batch = trl.first_batch(stock)
    trl.assert_same_step(trl.step(ours, batch), trl.step(stock, batch))


@pytest.mark.parametrize("tier", TIERS)
def test_an_unknown_loss_type_is_refused(trainers: Any, tier: str) -> None:
    trainer = trainers[tier]
    batch = trl.first_batch(trainer)
    with pytest.raises(ValueError, match="bogus"):
        trl.with_attributes(trainer, {"loss_type": "bogus"}, lambda: trl.step(trainer, batch))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_smoothing_that_prefers_the_rejected_is_refused(
    trainers: Any, tier: str, loss_type: str
) -> None:
    trainer = trainers[tier]
    batch = trl.first_batch(trainer)
    options = {"loss_type": loss_type, "label_smoothing": 0.6}
    with pytest.raises(ValueError, match=r"label_smoothing: .*0\.6"):
        trl.with_attributes(trainer, options, lambda: trl.step(trainer, batch))


@pytest.mark.parametrize("tier", TIERS)
def test_parts_of_a_step_are_stock_trl_s(trainers: Any, tier: str) -> None:
    batch = trl.first_batch(trainers[STOCK])
    with torch.no_grad():
        stock, ours = (
            trainer.concatenated_forward(trainer.model, batch)
            for trainer in (trainers[STOCK], trainers[tier])
        )
        assert len(ours) == len(stock) == 5
        for got, expected in zip(ours, stock, strict=True):
            torch.testing.assert_close(got.mean(), expected.mean(), rtol=1e-5, atol=1e-6)
        for position in (0, 1, 4):
            torch.testing.assert_close(ours[position], stock[position], rtol=1e-5, atol=1e-6)
        time = batch["chosen_labels"].shape[1], batch["rejected_labels"].shape[1]
        # Where there are no logits, each row's mean of them.
        expected_shape = [3] if tier == "fused" else [3, max(time), VOCABULARY]
        for logits in ours[2:4]:
            assert list(logits.shape) == expected_shape
        parts = [trainer.cpo_loss(*stock[:2]) for trainer in (trainers[STOCK], trainers[tier])]
        for expected, got in zip(*parts, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("average", [False, True])
def test_get_batch_logps_takes_trl_s_arguments_and_princeton_s(
    trainers: Any, tier: str, average: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 9, 31, generator=generator)
    labels = torch.randint(31, (4, 9), generator=generator)
    labels[:, :3] = -100
    labels[1, 7:] = -100
    given = labels.clone()
    stock, ours = trainers[STOCK].get_batch_logps, trainers[tier].get_batch_logps
    for shift in ({}, {"is_encoder_decoder": False}, {"is_encoder_decoder": True}):
        expected = stock(logits, labels.clone(), average, **shift)
        torch.testing.assert_close(ours(logits, labels, average, **shift), expected)
        torch.testing.assert_close(ours(logits, labels, average, *shift.values()), expected)
        torch.testing.assert_close(
            ours(logits, labels, average_log_prob=average, **shift), expected
        )
        # Princeton's: the ignored label comes fourth, a bool after it.
        other = labels.masked_fill(labels == -100, 7)
        sevens = labels.masked_fill(labels == 7, -100)
        expected = stock(logits, sevens, average, **shift)
        torch.testing.assert_close(ours(logits, other, average, 7, **shift), expected)
        torch.testing.assert_close(
            ours(logits, other, average, label_pad_token_id=7, **shift), expected
        )
        torch.testing.assert_close(ours(logits, other, average, 7, *shift.values()), expected)
    assert torch.equal(labels, given)


def test_get_batch_logps_refuses_shapes_that_do_not_match(trainers: Any) -> None:
    with pytest.raises(ValueError, match="labels"):
        trainers["logits"].get_batch_logps(torch.zeros(2, 5, 7), torch.zeros(2, 4).long())


@pytest.mark.parametrize("tier", TIERS)
def test_a_prediction_step_is_stock_trl_s(trainers: Any, tier: str) -> None:
    batch = trl.batches(trainers[STOCK], "eval")[-1]
    assert len(batch["chosen_labels"]) == 1
    for loss_only in (True, False):
        ours, stock = (
            trainer.prediction_step(trainer.model, batch, loss_only)
            for trainer in (trainers[tier], trainers[STOCK])
        )
        assert len(ours) == len(stock) == 3
        for got, expected in zip(ours, stock, strict=True):
            assert (got is None) is (expected is None)
            if got is not None:
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


# ---- what a step costs -----------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Counts the waits for a device's number that a step would have on one: of ops."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
        )
        return func(*args, **(kwargs or {}))


class HostCopies(TorchFunctionMode):
    """And of methods, which on the CPU are no ops."""

    METHODS = (Tensor.tolist, Tensor.numpy, Tensor.cpu)
    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self.METHODS
        return func(*args, **(kwargs or {}))


def host_reads(trainer: Any, batch: Any) -> int:
    trainer.get_batch_loss_metrics(trainer.model, batch)  # A trainer's first may look at the model.
    with HostReads() as ops, HostCopies() as methods:
        trainer.get_batch_loss_metrics(trainer.model, batch)
    return ops.count + methods.count


@pytest.mark.cpu_only
def test_a_step_reads_its_metrics_once(trainers: Any) -> None:
    batch = trl.first_batch(trainers[STOCK])
    # What the model's own forward reads counts in all.
    with HostReads() as ops, HostCopies() as methods, torch.no_grad():
        trainers[STOCK].model(batch["chosen_input_ids"], batch["chosen_attention_mask"])
    body = ops.count + methods.count
    assert host_reads(trainers[STOCK], batch) - body >= len(METRICS)
    assert host_reads(trainers["logits"], batch) - body <= 1
    # And how many tokens are scored, for whose products there is room to be made.
    assert host_reads(trainers["fused"], batch) - body <= 2


class Largest(TorchDispatchMode):
    """The most elements that one result of an op has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def largest_result(trainer: Any, batch: Any) -> int:
    with Largest() as mode:
        trl.step(trainer, batch)
    return mode.elements


@pytest.mark.cpu_only
def test_the_fused_tier_makes_no_logits(trainers: Any, tmp_path: Path) -> None:
    batch = trl.first_batch(trainers[STOCK])
    logits = (
        6 * max(batch[f"{half}_labels"].shape[1] for half in ("chosen", "rejected")) * VOCABULARY
    )
    for tier in (STOCK, "logits"):
        assert largest_result(trainers[tier], batch) >= logits
    # The budget lets the backward have some of the forward's.
    fused = trl.make_trainer("fused", tmp_path, ours={"logits_budget_bytes": 0})
    assert largest_result(fused, batch) <= VOCABULARY * trl.SMALL["hidden_size"]
    with torch.no_grad(), Largest() as mode:
        trainers["fused"].get_batch_loss_metrics(trainers["fused"].model, batch, "eval")
    assert mode.elements <= VOCABULARY * trl.SMALL["hidden_size"]


# ---- options ---------------------------------------------------------------------------------


def test_the_fused_tier_is_what_a_llama_gets(tmp_path: Path) -> None:
    trainer = trl.make_trainer("auto", tmp_path)
    assert trainer.fused_linear is True


@pytest.mark.parametrize("budget", [0, 1 << 18])
def test_a_budget_of_logits_changes_nothing_else(
    trainers: Any, tmp_path: Path, budget: int
) -> None:
    trainer = trl.make_trainer("fused", tmp_path, ours={"logits_budget_bytes": budget})
    batch = trl.first_batch(trainers[STOCK])
    trl.assert_same_step(trl.step(trainer, batch), trl.step(trainers[STOCK], batch))


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("empty", "keep", ValueError),
        ("empty", None, (TypeError, ValueError)),
        ("fused_linear", "yes", TypeError),
        ("logits_budget_bytes", -1, ValueError),
        ("logits_budget_bytes", "1 GB", TypeError),
    ],
)
def test_an_option_that_is_none_is_refused(
    tmp_path: Path, option: str, value: Any, error: Any
) -> None:
    train, _ = trl.pairs()
    with pytest.raises(error, match=option):
        trl.SimPOTrainer(
            model=trl.make_model(),
            args=trl.make_config(tmp_path),
            train_dataset=trl.Dataset.from_list(train),
            processing_class=trl.tokenizer(),
            **{option: value},
        )


@pytest.mark.parametrize("tier", TIERS)
def test_a_cpo_loss_of_a_subclass_is_the_one_that_counts(
    trainers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tier: str
) -> None:
    """It is where users of CPOTrainer put losses of their own."""

    class Own(trl.SimPOTrainer):
        def cpo_loss(self, *logps: Tensor) -> Any:
            chosen, rejected = logps
            return (rejected - chosen).exp(), 3.0 * chosen.detach(), rejected.detach()

    class OwnOfStock(trl.CPOTrainer):
        cpo_loss = Own.cpo_loss

    monkeypatch.setattr(trl, "SimPOTrainer", Own)
    monkeypatch.setattr(trl, "CPOTrainer", OwnOfStock)
    ours, stock = (trl.make_trainer(name, tmp_path) for name in (tier, STOCK))
    batch = trl.first_batch(stock)
    trl.assert_same_step(trl.step(ours, batch), trl.step(stock, batch))


@pytest.mark.parametrize("tier", TIERS)
def test_the_mixin_goes_before_other_subclasses_of_cpo_trainer(
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
