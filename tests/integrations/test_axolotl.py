"""simpo_ext.integrations.axolotl, called as axolotl calls its plugins."""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pydantic
import pytest
import torch
from torch import Tensor, nn

from simpo_ext.integrations import axolotl
from support import callers_axolotl as callers
from support.callers_axolotl import Run
from support.tiny_causal_lm import TinyCausalLM
from support.trainer_formulas import trl_loss

PLUGIN = "simpo_ext.integrations.axolotl.SimPOPlugin"
MIXIN = "simpo_ext.integrations.trl"
YAML = {"rl": "simpo", "rl_beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0, "plugins": [PLUGIN]}


class RecordingMixin:
    """Has the signature of SimPOMixin."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        names = ("fused_linear", "empty", "logits_budget_bytes")
        self.options = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().__init__(*args, **kwargs)


class AxolotlCPOTrainer:
    """Has the signature of axolotl's trainer."""

    def __init__(self, model: Any = None, args: Any = None, **kwargs: Any) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs


@pytest.fixture(autouse=True)
def _fresh_classes() -> Iterator[None]:
    """Drops the module's cached classes, which derive from the axolotl of an earlier test."""
    axolotl._simpo_plugin.cache_clear()
    yield
    axolotl._simpo_plugin.cache_clear()


@pytest.fixture
def _recording(monkeypatch: pytest.MonkeyPatch) -> None:
    callers.install_package(monkeypatch, AxolotlCPOTrainer)
    mixin = ModuleType(MIXIN)
    mixin.SimPOMixin = RecordingMixin
    monkeypatch.setitem(sys.modules, MIXIN, mixin)


recording = pytest.mark.usefixtures("_recording")


@recording
def test_the_trainer_gets_the_model_that_axolotl_does_not_pass() -> None:
    model = nn.Linear(2, 2)
    trainer = Run(YAML).build(model, AxolotlCPOTrainer, args="arguments", train_dataset="data")
    assert isinstance(trainer, RecordingMixin) and isinstance(trainer, AxolotlCPOTrainer)
    assert trainer.model is model and trainer.args == "arguments"
    assert trainer.kwargs == {
        "callbacks": [],
        "processing_class": "the tokenizer",
        "train_dataset": "data",
    }
    assert trainer.options == {}  # the mixin's own defaults


@recording
def test_a_model_that_the_builder_passes_is_used() -> None:
    run, model = Run(YAML), nn.Linear(2, 2)
    trainer_class = run.plugins[0].get_trainer_cls(run.cfg)
    run.plugins[0].add_callbacks_pre_trainer(cfg=run.cfg, model=nn.Linear(3, 3))
    assert trainer_class(model, args=None).model is model
    assert trainer_class(model=model, args=None).model is model
    assert trainer_class(args=None).model is None


@recording
def test_the_plugin_does_not_keep_the_model_alive() -> None:
    run, model = Run(YAML), nn.Linear(2, 2)
    alive = weakref.ref(model)
    trainer = run.build(model, AxolotlCPOTrainer)
    del trainer, model
    gc.collect()
    assert alive() is None


@recording
@pytest.mark.parametrize(
    "options",
    [
        {"empty": "nan"},
        {"fused_linear": False, "logits_budget_bytes": 0},
        {"fused_linear": True, "empty": "drop", "logits_budget_bytes": 1 << 28},
    ],
)
def test_options_of_the_yaml_become_keywords_of_the_mixin(options: dict[str, Any]) -> None:
    run = Run({**YAML, **{f"simpo_{name}": value for name, value in options.items()}})
    assert run.build(None, AxolotlCPOTrainer).options == options


@recording
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("simpo_empty", "zero"),
        ("simpo_fused_linear", "perhaps"),
        ("simpo_logits_budget_bytes", "much"),
        ("simpo_unknown", 1),
    ],
)
def test_the_configuration_is_checked(name: str, value: object) -> None:
    with pytest.raises(pydantic.ValidationError, match=name):
        Run({**YAML, name: value})


@recording
@pytest.mark.parametrize("rl", ["dpo", None])
def test_other_training_is_not_changed(rl: str | None) -> None:
    run, model = Run({"rl": rl, "plugins": [PLUGIN]}), nn.Linear(2, 2)
    trainer = run.build(model, AxolotlCPOTrainer)
    assert type(trainer) is AxolotlCPOTrainer and trainer.model is model
    assert run.plugins[0]._take_model() is None


@recording
@pytest.mark.parametrize("rl", ["simpo", callers.RLType.SIMPO])
def test_rl_may_be_a_string_or_axolotl_s_enum(rl: str) -> None:
    plugin = Run(YAML).plugins[0]
    trainer_class = plugin.get_trainer_cls(callers.Config(rl=rl, simpo_gamma=0.5))
    assert issubclass(trainer_class, AxolotlCPOTrainer)


@recording
def test_a_missing_margin_is_refused() -> None:
    run = Run({key: value for key, value in YAML.items() if key != "simpo_gamma"})
    assert run.training_arguments()["simpo_gamma"] is None
    with pytest.raises(ValueError, match=r"simpo_gamma: expected a number.*got None"):
        run.build(None, AxolotlCPOTrainer)
    assert Run({**YAML, "simpo_gamma": 0.0}).build(None, AxolotlCPOTrainer)


@recording
def test_another_trainer_class_is_refused() -> None:
    run = Run({**YAML, "trainer_cls": "mine.Trainer"})
    with pytest.raises(ValueError, match=r"trainer_cls: .* got 'mine\.Trainer'"):
        run.build(None, AxolotlCPOTrainer)


@recording
def test_the_classes_are_created_once() -> None:
    assert axolotl.SimPOPlugin is axolotl.SimPOPlugin
    assert axolotl.SimPOPlugin.__mro__[1:3] == (axolotl.PluginHooks, callers.BasePlugin)
    assert axolotl.SimPOArgs.__module__ == axolotl.__name__
    with pytest.raises(AttributeError, match=r"axolotl' has no attribute 'Other'"):
        _ = axolotl.Other


def test_without_axolotl_the_plugin_raises_an_error() -> None:
    with pytest.raises(ImportError, match="axolotl"):
        _ = axolotl.SimPOPlugin


# ---- with the real SimPOMixin and CPOTrainer -----------------------------------------------------


def cpo_trainer_class() -> type:
    """A subclass of TRL's CPOTrainer that needs no data set and no tokenizer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")
        from trl.experimental.cpo import CPOTrainer

    class Trainer(CPOTrainer):
        def __init__(self, model: Any = None, args: Any = None, **_: Any) -> None:
            self.model, self.args = model, args
            for name in ("beta", "label_smoothing", "loss_type", "cpo_alpha", "simpo_gamma"):
                setattr(self, name, getattr(args, name))
            self.alpha = args.alpha
            self.is_encoder_decoder = self.aux_loss_enabled = False
            self.pad_token_id = 0
            self.accelerator = SimpleNamespace(
                device=torch.device("cpu"),
                gather_for_metrics=lambda values: values,
                unwrap_model=lambda model, **_: model,
            )

    return Trainer


def preference_batch(pairs: int = 3, time: int = 11) -> dict[str, Tensor]:
    """A batch in the format of TRL's collator."""
    generator = torch.Generator().manual_seed(2)
    batch = {}
    for half in ("chosen", "rejected"):
        labels = torch.randint(61, (pairs, time), generator=generator)
        batch[f"{half}_input_ids"] = labels.clone()
        batch[f"{half}_attention_mask"] = torch.ones_like(labels)
        labels[:, :3] = -100
        labels[0, -2:] = -100
        batch[f"{half}_labels"] = labels
    return batch


@pytest.mark.kernels
@pytest.mark.parametrize("fused_linear", [True, False])
@pytest.mark.parametrize("keys", [{"rl_beta": 2.0, "cpo_alpha": 0.0}, {}])
def test_the_loss_matches_cpo_trainer_with_axolotl_s_defaults(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, float], fused_linear: bool
) -> None:
    trainer_class = cpo_trainer_class()
    callers.install_package(monkeypatch, trainer_class)
    run = Run(
        {
            "rl": "simpo",
            "simpo_gamma": 1.0,
            "plugins": [PLUGIN],
            "simpo_fused_linear": fused_linear,
            **keys,
        }
    )
    defaults = {"beta": 0.1, "cpo_alpha": 1.0, "label_smoothing": 0.0, "alpha": 0.0}
    arguments = {**defaults, "torch_compile": False, **run.training_arguments()}
    model, batch = TinyCausalLM().double(), preference_batch()
    trainer = run.build(model, trainer_class, args=SimpleNamespace(**arguments))
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    loss.backward()
    ours = [parameter.grad.clone() for parameter in model.parameters()]

    model.zero_grad()
    labels = torch.cat([batch["chosen_labels"], batch["rejected_labels"]])
    input_ids = torch.cat([batch["chosen_input_ids"], batch["rejected_input_ids"]])
    options = {name: arguments[name] for name in ("beta", "simpo_gamma", "cpo_alpha")}
    theirs = trl_loss(model(input_ids).logits, labels, **options)
    theirs.loss.backward()
    exact = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(loss.detach(), theirs.loss.detach(), **exact)
    torch.testing.assert_close(ours, [p.grad for p in model.parameters()], **exact)
    assert metrics["rewards/chosen"] == pytest.approx(theirs.chosen_rewards.mean().item(), rel=1e-5)
