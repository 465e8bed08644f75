"""Each preset equals its trainer's formula. Explicit arguments override a preset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import simpo_ext
from simpo_ext.presets import OWN, PRESETS, Semantics, with_preset
from support.batches import Batch, make_batch
from support.trainer_formulas import (
    TrainerLoss,
    liger_loss,
    llamafactory_loss,
    princeton_loss,
    trl_loss,
)

PAIRS = 4
ROWS = [(preset, loss_type) for preset, rows in PRESETS.items() for loss_type in rows]
FORMULAS: dict[str, Callable[..., TrainerLoss]] = {
    "princeton": princeton_loss,
    "trl": trl_loss,
    "liger": liger_loss,
    "llamafactory": llamafactory_loss,
}
# The trainer's names of simpo_ext's keywords, if they differ.
NAMES = {
    "princeton": {},
    "trl": {"sft_weight": "cpo_alpha", "gamma": "simpo_gamma"},
    "liger": {"sft_weight": "alpha"},
    "llamafactory": {"beta": "pref_beta", "gamma": "simpo_gamma", "sft_weight": "pref_ftx"},
}
# The defaults, and every keyword of the trainer with another value.
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("princeton", {}),
    ("princeton", {"label_smoothing": 0.1}),
    ("princeton", {"beta": 2.5, "gamma_beta_ratio": 0.55, "sft_weight": 0.25}),
    ("princeton", {"loss_type": "hinge"}),
    ("princeton", {"loss_type": "hinge", "beta": 0.2, "sft_weight": 0.25}),
    ("trl", {}),
    ("trl", {"loss_type": "simpo", "beta": 2.0, "gamma": 1.2, "label_smoothing": 0.1}),
    ("trl", {"sft_weight": 0.0}),
    ("trl", {"sft_weight": 0.3, "alpha": 0.25}),
    ("trl", {"loss_type": "alphapo", "alpha": -0.5}),
    ("trl", {"loss_type": "sigmoid"}),
    ("trl", {"loss_type": "sigmoid", "sft_weight": 0.0, "label_smoothing": 0.2, "alpha": 0.1}),
    ("trl", {"loss_type": "hinge"}),
    ("trl", {"loss_type": "hinge", "sft_weight": 0.0, "beta": 0.01, "alpha": 0.1}),
    ("trl", {"loss_type": "ipo"}),
    ("trl", {"loss_type": "ipo", "sft_weight": 0.0, "beta": 0.4, "alpha": 0.25}),
    ("liger", {}),
    ("liger", {"beta": 2.0, "gamma": 1.2, "label_smoothing": 0.1, "sft_weight": 0.3}),
    ("llamafactory", {}),
    ("llamafactory", {"loss_type": "simpo", "sft_weight": 0.3}),
    ("llamafactory", {"loss_type": "sigmoid", "beta": 2.0, "gamma": 1.2, "sft_weight": 1.0}),
]


def as_the_trainer_calls_it(preset: str, options: dict[str, Any]) -> dict[str, Any]:
    if preset in ("liger", "llamafactory"):  # Both have one loss type only.
        options = {name: value for name, value in options.items() if name != "loss_type"}
    return {NAMES[preset].get(name, name): value for name, value in options.items()}


def two_leaves(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch.logits.clone().requires_grad_(), batch.logits.clone().requires_grad_()


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14, equal_nan=True)


@pytest.mark.kernels
@pytest.mark.parametrize(("preset", "options"), OPTIONS)
def test_a_preset_equals_the_trainer_s_formula(preset: str, options: dict[str, Any]) -> None:
    batch = make_batch(PAIRS, time=17, vocabulary=101, dtype=torch.float64)
    ours, theirs = two_leaves(batch)
    out = simpo_ext.simpo_loss(ours, batch.labels, preset=preset, **options)
    expected = FORMULAS[preset](theirs, batch.labels, **as_the_trainer_calls_it(preset, options))
    assert_equal(out.loss, expected.loss)
    assert_equal(out.losses, expected.losses)
    assert_equal(out.chosen_rewards, expected.chosen_rewards)
    assert_equal(out.rejected_rewards, expected.rejected_rewards)
    out.loss.backward()
    expected.loss.backward()
    assert_equal(ours.grad, theirs.grad)


def test_every_loss_type_of_every_preset_is_compared_with_its_formula() -> None:
    compared = {(preset, options.get("loss_type")) for preset, options in OPTIONS}
    assert compared == {*ROWS, *((preset, None) for preset in PRESETS)} - {
        ("princeton", "sigmoid"),  # The defaults have it.
        ("liger", "sigmoid"),
    }


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("preset", "loss_type"), [row for row in ROWS if PRESETS[row[0]][row[1]].average_log_prob]
)
def test_empty_completions_are_nan_as_in_the_trainer(preset: str, loss_type: str) -> None:
    batch = make_batch(PAIRS, time=9, vocabulary=31, dtype=torch.float64)
    batch.labels[0] = -100  # chosen of pair 0
    batch.labels[PAIRS + 2] = -100  # rejected of pair 2
    ours, theirs = two_leaves(batch)
    options = {"loss_type": loss_type}
    out = simpo_ext.simpo_loss(ours, batch.labels, preset=preset, **options)
    expected = FORMULAS[preset](theirs, batch.labels, **as_the_trainer_calls_it(preset, options))
    assert expected.losses.isnan().tolist() == [True, False, True, False]
    assert out.loss.isnan() and expected.loss.isnan()
    assert_equal(out.losses, expected.losses)
    out.loss.backward()
    expected.loss.backward()
    others = [1, 3, PAIRS + 1, PAIRS + 3]
    assert expected.losses[[1, 3]].isfinite().all()
    assert_equal(ours.grad[others], theirs.grad[others])
    assert simpo_ext.simpo_loss(
        ours, batch.labels, preset=preset, loss_type=loss_type, empty="drop"
    ).loss.isfinite()


@pytest.mark.kernels
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_an_empty_completion_is_nan_but_0_in_trl_s_sums(
    loss_type: str,
) -> None:
    batch = make_batch(PAIRS, time=9, vocabulary=31, dtype=torch.float64)
    batch.labels[0] = -100
    out = simpo_ext.simpo_loss(*batch, preset="trl", loss_type=loss_type)
    theirs = trl_loss(*batch, loss_type=loss_type)
    assert theirs.chosen_rewards[0] == 0.0 and theirs.loss.isfinite()
    assert out.chosen_rewards[0].isnan() and out.loss.isnan()
    assert_equal(out.losses[1:], theirs.losses[1:])


def test_the_defaults_of_princeton_and_llamafactory() -> None:
    assert with_preset("princeton")[:6] == ("sigmoid", 2.0, 0.25, None, 0.0, 0.0)
    assert with_preset("llamafactory")[:6] == ("sigmoid", 0.1, None, 0.5, 0.0, 0.0)


def test_the_defaults_without_a_preset() -> None:
    own = Semantics("sigmoid", 2.0, 0.5, None, 0.0, 0.0, "sequence", True, "drop", True)
    assert with_preset(None) == own
    assert with_preset(None, loss_type="hinge") == own._replace(loss_type="hinge")
    assert with_preset(None, loss_type="ipo") == own._replace(loss_type="ipo", gamma_beta_ratio=0.0)


# Each value differs from every default, and is falsy if possible.
EXPLICIT = {
    "beta": 0.7,
    "label_smoothing": 0.05,
    "sft_weight": 0.6,
    "sft_reduction": "neither",  # with_preset does not check it.
    "average_log_prob": 0,
    "empty": "neither",
    "shift": 0,
}


@pytest.mark.parametrize(
    ("preset", "loss_type"), [*((None, loss_type) for loss_type in OWN), *ROWS]
)
def test_explicit_values_override_a_preset(preset: str | None, loss_type: str) -> None:
    default = with_preset(preset, loss_type=loss_type)
    for name, value in EXPLICIT.items():
        given = with_preset(preset, loss_type=loss_type, **{name: value})
        assert getattr(given, name) is value
        assert given == default._replace(**{name: value})
    for zero in (0.0, 0.8):
        ratio = with_preset(preset, loss_type=loss_type, gamma_beta_ratio=zero)
        assert ratio == default._replace(gamma_beta_ratio=zero, gamma=None)
        gamma = with_preset(preset, loss_type=loss_type, gamma=zero)
        assert gamma == default._replace(gamma_beta_ratio=None, gamma=zero)
    assert with_preset(preset, **default._asdict()) == default


@pytest.mark.kernels
def test_keywords_of_a_loss_override_its_preset() -> None:
    batch = make_batch(PAIRS, time=9, vocabulary=31, dtype=torch.float64)
    out = simpo_ext.simpo_loss(
        *batch, preset="trl", gamma_beta_ratio=0.3, sft_weight=0.2, sft_reduction="sequence"
    )
    expected = simpo_ext.simpo_loss(*batch, beta=0.1, gamma_beta_ratio=0.3, sft_weight=0.2)
    assert_equal(out.loss, expected.loss)
    # Another beta does not change a preset's gamma.
    out = simpo_ext.simpo_loss(*batch, preset="trl", beta=4.0, sft_weight=0.0)
    expected = simpo_ext.simpo_loss(*batch, beta=4.0, gamma=0.5)
    assert_equal(out.loss, expected.loss)
    with pytest.raises(ValueError, match=r"^gamma, gamma_beta_ratio: expected at most one"):
        simpo_ext.simpo_loss(*batch, preset="trl", gamma=0.1, gamma_beta_ratio=0.1)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (
            ValueError,
            "preset: expected one of 'princeton', 'trl', 'liger', 'llamafactory', got 'dpo'",
            {"preset": "dpo"},
        ),
        (
            TypeError,
            "preset: expected one of 'princeton', 'trl', 'liger', 'llamafactory', got int",
            {"preset": 3},
        ),
        (
            TypeError,
            "preset: expected one of 'princeton', 'trl', 'liger', 'llamafactory', got list",
            {"preset": ["trl"]},
        ),
        (
            ValueError,
            "loss_type: expected one of 'sigmoid' with preset='liger', got 'hinge'",
            {"preset": "liger", "loss_type": "hinge"},
        ),
        (
            ValueError,
            "loss_type: expected one of 'sigmoid', 'hinge' with preset='princeton', got 'simpo'",
            {"preset": "princeton", "loss_type": "simpo"},
        ),
        (
            TypeError,
            "loss_type: expected one of 'sigmoid', 'hinge', got bool",
            {"preset": "princeton", "loss_type": True},
        ),
        (
            ValueError,
            "loss_type: expected one of 'sigmoid', 'hinge', 'ipo', got 'simpo'",
            {"loss_type": "simpo"},
        ),
    ],
)
def test_errors_list_the_choices(
    error: type[Exception], message: str, options: dict[str, Any]
) -> None:
    batch = make_batch()
    for call in (
        lambda: simpo_ext.simpo_loss(*batch, **options),
        lambda: simpo_ext.SimPOLoss(**options),
        lambda: simpo_ext.LinearSimPOLoss(**options),
    ):
        with pytest.raises(error) as raised:
            call()
        assert str(raised.value) == message


@pytest.mark.kernels
def test_every_loss_takes_a_preset_and_modules_show_its_values() -> None:
    labels = make_batch(3, time=9, vocabulary=50).labels
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 9, 16, generator=generator)
    weight = torch.randn(50, 16, generator=generator)
    logits = hidden @ weight.T
    expected = simpo_ext.simpo_loss(logits, labels, preset="trl", loss_type="ipo").loss
    options = {"preset": "trl", "loss_type": "ipo"}
    modules = simpo_ext.SimPOLoss(**options), simpo_ext.LinearSimPOLoss(**options)
    logps = simpo_ext.token_logps(logits, labels)
    for loss in (
        simpo_ext.linear_simpo_loss(hidden, weight, labels, **options).loss,
        simpo_ext.simpo_loss_from_token_logps(logps, labels, **options).loss,
        modules[0](logits, labels).loss,
        modules[1](hidden, weight, labels).loss,
    ):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
    for module in modules:
        shown = repr(module)
        for name, value in with_preset(**options)._asdict().items():
            if name != "gamma":  # Shown as gamma_beta_ratio.
                assert f"{name}={value!r}" in shown


def test_a_module_divides_a_preset_s_gamma_by_its_beta() -> None:
    module = simpo_ext.SimPOLoss(preset="liger", beta=2.0)
    assert module.gamma_beta_ratio == 0.25
    assert "gamma_beta_ratio=0.25" in repr(module)


@pytest.mark.kernels
@pytest.mark.cpu_only
def test_a_preset_compiles_without_graph_break() -> None:
    batch = make_batch()

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return simpo_ext.simpo_loss(logits, labels, preset="trl", loss_type="hinge").loss

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*batch), loss(*batch))
