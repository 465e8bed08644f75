"""Single steps of SimPOTrainer match TRL's CPOTrainer: losses, methods, host reads and options."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support import trl_training as trl
from support.trl_training import METRICS, STOCK, TIERS, VOCABULARY

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One trainer of each kind for single steps. Their models are equal."""
    folder = tmp_path_factory.mktemp("single")
    return {tier: trl.make_trainer(tier, folder) for tier in (STOCK, *TIERS)}


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
    # With the other losses, alpha makes rewards of summed logps infinite.
    if alpha == 0.0 or loss_type in ("ipo", "simpo")
}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_every_loss_matches_stock_trl(trainers: Any, tier: str, options: dict[str, Any]) -> None:
    batch = trl.first_batch(trainers[STOCK])
    # Margins on both sides of the hinge's kink.
    options = {**options, "beta": 0.05 if options["loss_type"] == "hinge" else 0.5}
    stock, ours = (
        trl.with_attributes(trainer, options, lambda trainer=trainer: trl.step(trainer, batch))
        for trainer in (trainers[STOCK], trainers[tier])
    )
    assert trl.largest(stock["gradients"]) > 0.0
    trl.assert_same_step(ours, stock)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("alpha", [0.5, -0.5])
def test_infinite_rewards_match_stock_trl(trainers: Any, tier: str, alpha: float) -> None:
    chosen, rejected = torch.tensor([-1.0, -900.0, -2.0]), torch.tensor([-2.0, -3.0, -900.0])
    parts = [
        trl.with_attributes(
            trainer, {"alpha": alpha}, lambda trainer=trainer: trainer.cpo_loss(chosen, rejected)
        )
        for trainer in (trainers[STOCK], trainers[tier])
    ]
    (stock, *rewards), (ours, *our_rewards) = parts
    # TRL multiplies the infinite loss of a flipped label by a smoothing of 0, which gives NaN.
    torch.testing.assert_close(ours, stock.nan_to_num(0.0, torch.inf))
    for expected, got in zip(rewards, our_rewards, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("tier", TIERS)
def test_alphapo_of_the_config_matches_stock_trl(tmp_path: Path, tier: str) -> None:
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
def test_label_smoothing_above_one_half_is_refused(
    trainers: Any, tier: str, loss_type: str
) -> None:
    trainer = trainers[tier]
    batch = trl.first_batch(trainer)
    options = {"loss_type": loss_type, "label_smoothing": 0.6}
    with pytest.raises(ValueError, match=r"label_smoothing: .*0\.6"):
        trl.with_attributes(trainer, options, lambda: trl.step(trainer, batch))


@pytest.mark.parametrize("tier", TIERS)
def test_the_methods_of_a_step_match_stock_trl(trainers: Any, tier: str) -> None:
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
        # Without logits, the outputs are their mean of each row.
        expected_shape = [3] if tier == "fused" else [3, max(time), VOCABULARY]
        for logits in ours[2:4]:
            assert list(logits.shape) == expected_shape
        parts = [trainer.cpo_loss(*stock[:2]) for trainer in (trainers[STOCK], trainers[tier])]
        for expected, got in zip(*parts, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("average", [False, True])
def test_get_batch_logps_takes_arguments_of_trl_and_princeton(
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
        # Princeton's fourth argument is the ignored label, followed by a bool.
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
def test_a_prediction_step_matches_stock_trl(trainers: Any, tier: str) -> None:
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


# ---- host reads and memory of a step ---------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Counts the ops for which the host would wait on a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
        )
        return func(*args, **(kwargs or {}))


class HostCopies(TorchFunctionMode):
    """Counts the methods for which the host would wait. On CPUs they call no ops."""

    METHODS = (Tensor.tolist, Tensor.numpy, Tensor.cpu)
    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self.METHODS
        return func(*args, **(kwargs or {}))


def host_reads(trainer: Any, batch: Any) -> int:
    trainer.get_batch_loss_metrics(trainer.model, batch)  # The first step may probe the model.
    with HostReads() as ops, HostCopies() as methods:
        trainer.get_batch_loss_metrics(trainer.model, batch)
    return ops.count + methods.count


@pytest.mark.cpu_only
def test_a_step_reads_its_metrics_once(trainers: Any) -> None:
    batch = trl.first_batch(trainers[STOCK])
    # Reads of the model's forward are in every count.
    with HostReads() as ops, HostCopies() as methods, torch.no_grad():
        trainers[STOCK].model(batch["chosen_input_ids"], batch["chosen_attention_mask"])
    body = ops.count + methods.count
    assert host_reads(trainers[STOCK], batch) - body >= len(METRICS)
    assert host_reads(trainers["logits"], batch) - body <= 1
    # The number of scored tokens is read once more, for the sizes of tensors.
    assert host_reads(trainers["fused"], batch) - body <= 2


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest result of an op."""

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
def test_fused_linear_computes_no_logits(trainers: Any, tmp_path: Path) -> None:
    batch = trl.first_batch(trainers[STOCK])
    logits = (
        6 * max(batch[f"{half}_labels"].shape[1] for half in ("chosen", "rejected")) * VOCABULARY
    )
    for tier in (STOCK, "logits"):
        assert largest_result(trainers[tier], batch) >= logits
    # With a budget, the forward would keep logits for the backward.
    fused = trl.make_trainer("fused", tmp_path, ours={"logits_budget_bytes": 0})
    assert largest_result(fused, batch) <= VOCABULARY * trl.SMALL["hidden_size"]
    with torch.no_grad(), Largest() as mode:
        trainers["fused"].get_batch_loss_metrics(trainers["fused"].model, batch, "eval")
    assert mode.elements <= VOCABULARY * trl.SMALL["hidden_size"]


# ---- options ---------------------------------------------------------------------------------


def test_a_llama_is_fused_by_default(tmp_path: Path) -> None:
    trainer = trl.make_trainer("auto", tmp_path)
    assert trainer.fused_linear is True


@pytest.mark.parametrize("budget", [0, 1 << 18])
def test_the_logits_budget_changes_no_result(trainers: Any, tmp_path: Path, budget: int) -> None:
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
def test_invalid_options_are_refused(tmp_path: Path, option: str, value: Any, error: Any) -> None:
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
def test_a_subclass_can_override_cpo_loss(
    trainers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tier: str
) -> None:
    """Users of CPOTrainer override cpo_loss with their own losses."""

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
