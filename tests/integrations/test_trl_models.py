"""SimPOTrainer on models that compute logits from hidden states in different ways.

The results match stock TRL on every model. The trainer uses hidden states if it knows how the model
computes logits from them, and otherwise the logits. With fused_linear=True, it raises an error
instead. Models are float32, and tolerances those of test_trl_runs.py.
"""

from __future__ import annotations

import copy
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from support import trl_models
from support import trl_training as trl
from support.trl_models import CAPPED, CHANGED, EXPERTS, FUSED, HEADS, OTHERS, UNUSUAL
from support.trl_training import STOCK, TIERS

pytestmark = pytest.mark.usefixtures("one_thread")

LOGITS = ("logits/chosen", "logits/rejected")


def stock_step(folder: Path, model: Any, **options: Any) -> tuple[Any, trl.Step]:
    """A batch, and a step of stock TRL on it."""
    trainer = trl.make_trainer(STOCK, folder, model, **options)
    batch = trl.first_batch(trainer)
    return batch, trl.step(trainer, batch)


def without_logits(step: trl.Step) -> trl.Step:
    metrics = {name: value for name, value in step["metrics"].items() if name not in LOGITS}
    return {**step, "metrics": metrics}


def mean_logits_of_completions(model: Any, batch: Any) -> dict[str, float]:
    """Means over the rows of each row's mean over its completion."""
    means = {}
    for half in ("rejected", "chosen"):
        with torch.no_grad():
            ids, mask = batch[f"{half}_input_ids"], batch[f"{half}_attention_mask"]
            of_positions = model(ids, attention_mask=mask).logits[:, :-1].mean(2)
        is_scored = batch[f"{half}_labels"][:, 1:] != -100
        rows = (of_positions * is_scored).sum(1) / is_scored.sum(1)
        means[f"logits/{half}"] = rows.mean().item()
    return means


# ---- families --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("tier", ["auto", *TIERS])
def test_a_family_whose_head_is_known(tmp_path: Path, name: str, tier: str) -> None:
    model = FUSED[name]()
    batch, stock = stock_step(tmp_path, model)
    trainer = trl.make_trainer(tier, tmp_path, model)
    assert trainer.fused_linear is (tier != "logits")
    ours = trl.step(trainer, batch)
    assert trainer.fused_linear is (tier != "logits")
    if name in CAPPED and trainer.fused_linear:
        expected = mean_logits_of_completions(model, batch)
        got = {metric: ours["metrics"][metric] for metric in expected}
        trl.assert_same_floats(got, expected, 1e-4)
        ours, stock = without_logits(ours), without_logits(stock)
    trl.assert_same_step(ours, stock)


@pytest.mark.parametrize("name", sorted(EXPERTS))
def test_the_experts_balance_is_part_of_loss_and_gradients(tmp_path: Path, name: str) -> None:
    """The balance loss is large enough to matter in the comparison with stock TRL above."""
    model = FUSED[name]()
    batch, stock = stock_step(tmp_path, model)
    model.config.router_aux_loss_coef = 0.0
    _, without = stock_step(tmp_path, model)
    assert stock["loss"] > without["loss"] + 0.1
    for tier in TIERS:
        trl.assert_same_step(trl.step(trl.make_trainer(tier, tmp_path, model), batch), without)
    routers = [n for n in stock["gradients"] if "gate.weight" in n]
    assert routers
    for router in routers:
        a, b = stock["gradients"][router], without["gradients"][router]
        assert not torch.allclose(a, b, rtol=1e-2)


def agrees_or_refuses(model: Any, folder: Path, *, must_refuse: bool = False) -> None:
    """fused_linear=None matches stock TRL. fused_linear=True matches it, or raises an error."""
    batch, stock = stock_step(folder, model)
    trainer = trl.make_trainer("auto", folder, model)
    ours = trl.step(trainer, batch)
    trl.assert_same_step(ours, stock)
    # What the first batch shows holds for other batches, in training and evaluation.
    trainers = [trl.make_trainer(STOCK, folder, model), trainer]
    rest = trl.batches(trainer, "eval")[-1]
    steps = [trl.step(each, rest) for each in trainers]
    trl.assert_same_step(steps[1], steps[0])
    with torch.no_grad():
        steps = [
            each.get_batch_loss_metrics(each.model.eval(), rest, "eval")[1] for each in trainers
        ]
    trl.assert_same_floats(steps[1], steps[0], trl.TOLERANCE)
    if must_refuse:
        assert trainer.fused_linear is False

    def insist() -> trl.Step:
        return trl.step(trl.make_trainer("fused", folder, model), batch)

    if must_refuse:
        with pytest.raises(ValueError, match="fused_linear"):
            insist()
        return
    try:
        insisted = insist()
    except ValueError as error:
        if "fused_linear" not in str(error):
            raise
    else:
        trl.assert_same_step(insisted, stock)


@pytest.mark.parametrize("name", OTHERS)
def test_a_family_whose_config_does_not_describe_its_logits(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "softcap" in name:  # Mean logits may be those before the softcap.
        monkeypatch.setattr(trl, "step", lambda *a, step=trl.step: without_logits(step(*a)))
        monkeypatch.setattr(
            trl,
            "assert_same_floats",
            lambda ours, stock, tolerance, where="", same=trl.assert_same_floats: same(
                *({n: v for n, v in m.items() if "logits/" not in n} for m in (ours, stock)),
                tolerance,
                where,
            ),
        )
    agrees_or_refuses(OTHERS[name](), tmp_path)


@pytest.mark.parametrize("model_class", CHANGED, ids=lambda c: c.__name__)
def test_logits_that_are_not_only_the_head_s(tmp_path: Path, model_class: Any) -> None:
    agrees_or_refuses(trl.make_model(model_class), tmp_path, must_refuse=True)


@pytest.mark.parametrize("model_class", UNUSUAL, ids=lambda c: c.__name__)
def test_unusual_uses_of_logits_or_head(tmp_path: Path, model_class: Any) -> None:
    agrees_or_refuses(trl.make_model(model_class), tmp_path)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_not_a_plain_linear(tmp_path: Path, name: str) -> None:
    agrees_or_refuses(HEADS[name](), tmp_path)


def test_a_model_may_change_after_the_first_step(tmp_path: Path) -> None:
    """The hook is registered after the trainer has checked the head."""
    model = trl.make_model()
    trainers = [trl.make_trainer(name, tmp_path, model) for name in (STOCK, "auto")]
    batch = trl.first_batch(trainers[0])
    trl.assert_same_step(*(trl.step(each, batch) for each in reversed(trainers)))
    for each in trainers:
        each.model.lm_head.register_forward_hook(trl_models._Double())
    stock = trl.step(trainers[0], batch)
    trl.assert_same_step(trl.step(trainers[1], batch), stock)


@pytest.mark.parametrize("model_class", [trl_models.Affine, trl_models.NeverCalled])
def test_falling_back_to_logits_logs_a_warning(
    tmp_path: Path, model_class: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = trl.make_trainer("auto", tmp_path, trl.make_model(model_class))
        trl.step(trainer, trl.first_batch(trainer))
    assert any("fused" in record.getMessage() for record in caplog.records)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer = trl.make_trainer("auto", tmp_path)
        trl.step(trainer, trl.first_batch(trainer))
    assert not any("fused" in record.getMessage() for record in caplog.records)


# ---- encoder and decoder ---------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["auto", "logits", "insisted"])
def test_an_encoder_decoder_is_trained_from_its_logits(
    tmp_path: Path, tier: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = trl.make_model(
        transformers.T5ForConditionalGeneration,
        transformers.T5Config,
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        dropout_rate=0.0,
    )  # fmt: skip
    options = {"max_completion_length": 24, "max_steps": 3}
    stock = trl.make_trainer(STOCK, tmp_path, model, **options)
    with caplog.at_level(logging.WARNING):
        if tier == "insisted":
            ours = {"fused_linear": True}
            arguments = ours_arguments(tmp_path, model, **options)
            trainer = trl.SimPOTrainer(**arguments, **ours)
            trainer.remove_callback(trl.PrinterCallback)
        else:
            trainer = trl.make_trainer(tier, tmp_path, model, **options)
    assert trainer.fused_linear is False
    warned = any("fused" in record.getMessage() for record in caplog.records)
    assert warned is (tier != "logits")
    batch = trl.first_batch(stock)
    trl.assert_same_step(trl.step(trainer, batch), trl.step(stock, batch))
    trl.assert_same_training(trl.train(trainer), trl.train(stock))


def ours_arguments(folder: Path, model: Any, **options: Any) -> dict[str, Any]:
    train, held_out = trl.pairs()
    return {
        "model": copy.deepcopy(model),
        "args": trl.make_config(folder, **options),
        "train_dataset": trl.Dataset.from_list(train),
        "eval_dataset": trl.Dataset.from_list(held_out),
        "processing_class": trl.tokenizer(),
    }


# ---- other uses of the model -----------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_of_activations(tmp_path: Path, tier: str, use_reentrant: bool) -> None:
    options = {
        "gradient_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": use_reentrant},
        "max_steps": 3,
    }
    ours, stock = (trl.train(trl.make_trainer(n, tmp_path, **options)) for n in (tier, STOCK))
    trl.assert_same_training(ours, stock)


@pytest.mark.parametrize("tier", ["auto", "fused"])
def test_a_compiled_model(tmp_path: Path, tier: str) -> None:
    """Uses Dynamo and AOTAutograd, without a compiler backend."""
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 1}
    try:
        trainer = trl.make_trainer(tier, tmp_path, **options)
    except ValueError as error:
        if tier == "auto" or not re.search("fused_linear: .*compile", str(error)):
            raise
        return  # A traced graph would not see the replaced head.
    torch._dynamo.reset()
    ours = trl.train(trainer)
    torch._dynamo.reset()
    trl.assert_same_training(ours, trl.train(trl.make_trainer(STOCK, tmp_path, max_steps=1)))


@pytest.mark.parametrize("tier", ["auto", *TIERS])
def test_random_numbers_are_drawn_as_in_stock_trl(tmp_path: Path, tier: str) -> None:
    """``disable_dropout`` changes modules only, and attention's dropout is no module."""
    model = trl.make_model(attention_dropout=0.3)
    stock, ours = (
        trl.train(trl.make_trainer(name, tmp_path, model, max_steps=3)) for name in (STOCK, tier)
    )
    trl.assert_same_training(ours, stock)
    without = trl.train(trl.make_trainer(STOCK, tmp_path, max_steps=3))
    assert abs(without.logs[0]["loss"] - stock.logs[0]["loss"]) > 1e-3


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("trained", ["all but lm_head", "lm_head alone", "one layer"])
def test_parameters_that_are_frozen(tmp_path: Path, tier: str, trained: str) -> None:
    model = trl.make_model()
    for name, parameter in model.named_parameters():
        is_head = name.startswith("lm_head")
        is_trained = {
            "all but lm_head": not is_head,
            "lm_head alone": is_head,
            "one layer": "layers.1" in name,
        }
        parameter.requires_grad_(is_trained[trained])
    batch, stock = stock_step(tmp_path, model)
    trl.assert_same_step(trl.step(trl.make_trainer(tier, tmp_path, model), batch), stock)


class _Generating(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.texts: list[Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        self.texts.append(generate(about["model"]))


def generate(model: Any) -> Tensor:
    ids = torch.arange(3, 11).unsqueeze(0)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
    model.train(was_training)
    return tokens


@pytest.mark.parametrize("tier", TIERS)
def test_the_model_generates_before_between_and_after_steps(tmp_path: Path, tier: str) -> None:
    texts = []
    for name in (STOCK, tier):
        trainer = trl.make_trainer(name, tmp_path, max_steps=3)
        callback = _Generating()
        trainer.add_callback(callback)
        before = generate(trainer.model)
        trl.train(trainer)
        texts.append([before, *callback.texts, generate(trainer.model)])
    assert len(texts[0]) == 5
    for got, expected in zip(*texts, strict=True):
        assert torch.equal(got, expected)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 11).unsqueeze(0)).logits


@pytest.mark.parametrize("tier", ["auto", *TIERS])
def test_a_step_does_not_change_the_model(tmp_path: Path, tier: str) -> None:
    trainer = trl.make_trainer(tier, tmp_path)
    model = trainer.model
    expected = logits_of(model)
    keys = list(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    trl.step(trainer, trl.first_batch(trainer))
    assert list(model.state_dict()) == keys
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(each), expected)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(type(model).from_pretrained(tmp_path / "saved")), expected)


@pytest.mark.parametrize("tier", ["auto", *TIERS])
def test_a_step_that_fails_does_not_change_the_model(tmp_path: Path, tier: str) -> None:
    trainer = trl.make_trainer(tier, tmp_path)
    expected = logits_of(trainer.model)
    batch = trl.first_batch(trainer)
    before = trl.step(trainer, batch)
    for broken in (
        {**batch, "chosen_input_ids": torch.full_like(batch["chosen_input_ids"], 5000)},
        {
            **batch,
            "chosen_labels": batch["chosen_labels"].masked_fill(batch["chosen_labels"] > 0, 5000),
        },
    ):
        with pytest.raises((IndexError, RuntimeError)):
            trl.step(trainer, broken)
        assert torch.equal(logits_of(trainer.model), expected)
    trl.assert_same_step(trl.step(trainer, batch), before)


def test_two_trainers_share_one_model(tmp_path: Path) -> None:
    model = trl.make_model()
    batch, stock = stock_step(tmp_path, model)
    trainers = [trl.make_trainer(tier, tmp_path, model) for tier in ("auto", *TIERS)]
    for trainer in trainers:
        trl.assert_same_step(trl.step(trainer, batch, model), stock)
