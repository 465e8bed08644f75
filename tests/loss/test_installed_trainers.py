"""Compares the presets of TRL and Liger with the installed packages."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss
from torch import Tensor

import simpo_ext
from simpo_ext.presets import PRESETS, with_preset
from support.batches import make_batch

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")
    from trl.experimental.cpo import CPOConfig, CPOTrainer


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def cpo_config(**options: object) -> CPOConfig:
    with warnings.catch_warnings():  # CPOConfig warns about its own defaults.
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
        return CPOConfig(output_dir="never_written", bf16=False, use_cpu=True, **options)


def cpo_trainer(config: CPOConfig) -> CPOTrainer:
    """A CPOTrainer that has what its loss needs, without model, data set and tokenizer."""
    trainer = object.__new__(CPOTrainer)
    for name in ("beta", "label_smoothing", "loss_type", "cpo_alpha", "simpo_gamma", "alpha"):
        setattr(trainer, name, getattr(config, name))
    trainer.is_encoder_decoder = False
    trainer.aux_loss_enabled = False
    trainer.pad_token_id = 0
    trainer.accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda values: values
    )
    return trainer


@pytest.mark.kernels
@pytest.mark.parametrize("alpha", [0.0, 0.25])
@pytest.mark.parametrize("sft_weight", [None, 0.0])
@pytest.mark.parametrize("loss_type", PRESETS["trl"])
def test_the_trl_preset_equals_the_installed_trainer(
    loss_type: str, sft_weight: float | None, alpha: float
) -> None:
    batch = make_batch(4, time=17, vocabulary=101, dtype=torch.float64)
    ours = batch.logits.clone().requires_grad_()
    theirs = batch.logits.clone().requires_grad_()
    options: dict[str, Any] = {"loss_type": loss_type, "alpha": alpha}
    if loss_type not in ("hinge", "ipo"):  # TRL ignores label_smoothing there.
        options["label_smoothing"] = 0.1
    if sft_weight is not None:
        options["sft_weight"] = sft_weight
    out = simpo_ext.simpo_loss(ours, batch.labels, preset="trl", **options)

    if sft_weight is not None:
        options["cpo_alpha"] = options.pop("sft_weight")
    trainer = cpo_trainer(cpo_config(**options))
    inputs = {}
    for half, labels in zip(("chosen", "rejected"), batch.labels.chunk(2), strict=True):
        inputs[f"{half}_labels"] = labels
        inputs[f"{half}_input_ids"] = labels.clamp(min=0)
        inputs[f"{half}_attention_mask"] = torch.ones_like(labels)
    loss, metrics = trainer.get_batch_loss_metrics(
        lambda *_, **__: SimpleNamespace(logits=theirs), inputs
    )
    assert_equal(out.loss, loss)
    out.loss.backward()
    loss.backward()
    assert_equal(ours.grad, theirs.grad)
    if trainer.cpo_alpha != 0.0:  # Otherwise TRL computes no SFT loss.
        assert out.sft_loss.item() == pytest.approx(metrics["nll_loss"], rel=1e-12)
    own = out.metrics()
    names = own.keys() & metrics.keys()
    assert names >= {
        *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
        *("logps/chosen", "logps/rejected"),
    }
    for name in names:
        assert own[name] == pytest.approx(metrics[name], rel=1e-12), name


@pytest.mark.kernels
def test_trl_averages_an_empty_completion_to_nan_and_sums_it_to_zero() -> None:
    logits, labels = make_batch(2, time=9, vocabulary=31, dtype=torch.float64)
    labels[0] = -100
    averages = CPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
    sums = CPOTrainer.get_batch_logps(logits, labels, average_log_prob=False)
    assert averages[0].isnan() and sums[0] == 0.0
    own = [simpo_ext.sequence_logps(logits, labels, average_log_prob=a) for a in (True, False)]
    assert own[0][0].isnan() and own[1][0].isnan()
    assert_equal(own[0][1:], averages[1:])
    assert_equal(own[1][1:], sums[1:])


@pytest.mark.parametrize("loss_type", PRESETS["trl"])
def test_the_trl_preset_has_cpo_config_s_defaults(loss_type: str) -> None:
    config, semantics = cpo_config(loss_type=loss_type), with_preset("trl", loss_type=loss_type)
    assert semantics.beta == config.beta
    assert semantics.label_smoothing == config.label_smoothing
    assert semantics.sft_weight == config.cpo_alpha
    if config.loss_type == "simpo":
        assert semantics.gamma == config.simpo_gamma
    alpha = inspect.signature(simpo_ext.simpo_loss).parameters["alpha"]
    assert alpha.default == config.alpha


def test_the_trl_preset_has_cpo_config_s_loss_types() -> None:
    (field,) = (field for field in dataclasses.fields(CPOConfig) if field.name == "loss_type")
    assert {*PRESETS["trl"]} == {*field.metadata["choices"]}
    # The preset's default is SimPO. CPOConfig's is CPO.
    assert with_preset("trl") == with_preset("trl", loss_type="simpo")
    assert field.default == "sigmoid"


def linear_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels = make_batch(3, time=9, vocabulary=50).labels
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 9, 16, generator=generator)
    weight = torch.randn(50, 16, generator=generator)
    return hidden, weight, torch.randn(50, generator=generator), labels


@pytest.mark.kernels
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({}, {}),
        ({"sft_weight": 0.0}, {"compute_nll_loss": False}),
        (
            {"beta": 2.0, "gamma": 1.2, "label_smoothing": 0.1, "sft_weight": 0.3},
            {"beta": 2.0, "gamma": 1.2, "label_smoothing": 0.1, "alpha": 0.3},
        ),
    ],
)
def test_the_liger_preset_equals_the_installed_module(
    options: dict[str, Any], theirs: dict[str, Any], with_bias: bool
) -> None:
    hidden, weight, bias, labels = linear_batch()
    gradients = []

    def leaves() -> tuple[Tensor, ...]:
        tensors = (hidden, weight, bias) if with_bias else (hidden, weight)
        gradients.append([tensor.clone().requires_grad_() for tensor in tensors])
        return *gradients[-1], *([] if with_bias else [None])

    h, w, b = leaves()
    out = simpo_ext.linear_simpo_loss(h, w, labels, bias=b, preset="liger", **options)
    out.loss.backward()
    h, w, b = leaves()
    module = LigerFusedLinearSimPOLoss(compiled=False, **theirs)
    loss, (chosen_logps, rejected_logps, _, _, nll, *rewards) = module(w, h, labels, b)
    loss.backward()
    for ours, expected in zip(
        (out.loss, out.chosen_logps, out.rejected_logps, out.chosen_rewards, out.rejected_rewards),
        (loss, chosen_logps, rejected_logps, *rewards),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0.0)
    if theirs.get("compute_nll_loss", True):
        torch.testing.assert_close(out.sft_loss, nll, rtol=1e-5, atol=0.0)
    for ours, expected in zip(*gradients, strict=True):
        scale = expected.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.kernels
def test_an_empty_completion_makes_the_weight_gradient_nan_as_in_liger() -> None:
    hidden, weight, _, labels = linear_batch()
    labels[1] = -100
    ours, theirs = (weight.clone().requires_grad_() for _ in range(2))
    out = simpo_ext.linear_simpo_loss(hidden, ours, labels, preset="liger")
    out.loss.backward()
    loss, _ = LigerFusedLinearSimPOLoss(compiled=False)(theirs, hidden, labels)
    loss.backward()
    assert out.loss.isnan() and loss.isnan()
    assert ours.grad.isnan().all() and theirs.grad.isnan().all()


def test_the_liger_preset_has_the_installed_module_s_defaults() -> None:
    parameters = inspect.signature(LigerFusedLinearSimPOLoss).parameters
    semantics = with_preset("liger")
    assert semantics.beta == parameters["beta"].default
    assert semantics.gamma == parameters["gamma"].default
    assert semantics.label_smoothing == parameters["label_smoothing"].default
    assert parameters["compute_nll_loss"].default is True
    assert semantics.sft_weight == parameters["alpha"].default
    assert parameters["ignore_index"].default == -100
