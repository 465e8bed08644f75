"""simpo_ext.integrations.llamafactory matches the code of LLaMA-Factory that it replaces."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import simpo_ext
from simpo_ext.integrations import llamafactory
from simpo_ext.integrations.llamafactory import SimPOMixin, get_batch_logps, simpo_trainer
from support import callers_llamafactory as callers
from support.batches import make_batch
from support.callers_llamafactory import DPOTrainerCaller, TupleCaller, preference_batch
from support.tiny_causal_lm import TinyCausalLM
from support.trainer_formulas import llamafactory_loss

EXACT = {"rtol": 1e-11, "atol": 1e-12}

# From hidden states and lm_head, or from logits.
tiers = pytest.mark.parametrize("fused_linear", [True, False])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def trained(trainer: Any, model: nn.Module, batch: dict[str, Tensor], **kwargs: Any) -> Any:
    """The loss, metrics and gradients of a training step."""
    model = copy.deepcopy(model)
    loss, metrics = trainer.get_batch_loss_metrics(model, batch, **kwargs)
    loss.backward()
    return loss.detach(), metrics, gradients(model)


def assert_same_step(ours: Any, theirs: Any, **tolerance: float) -> None:
    torch.testing.assert_close(ours[0], theirs[0], **tolerance)
    torch.testing.assert_close(ours[2], theirs[2], **tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, value in theirs[1].items():
        assert ours[1][name] == pytest.approx(value, rel=1e-5, nan_ok=True), name


# ---- get_batch_logps -----------------------------------------------------------------------------


@pytest.mark.kernels
@pytest.mark.parametrize("ld_alpha", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_lengths_and_gradients_match_get_batch_logps(
    dtype: torch.dtype, ld_alpha: float | None
) -> None:
    batch = make_batch(3, time=17, vocabulary=101, dtype=dtype)
    batch.labels[1, 9] = -100  # The common length counts this position.
    leaves = [batch.logits.clone().requires_grad_() for _ in range(2)]
    weights = torch.linspace(-1, 1, 6, dtype=dtype)
    results = [
        function(leaf, batch.labels, ld_alpha=ld_alpha)
        for function, leaf in zip((get_batch_logps, callers.get_batch_logps), leaves, strict=True)
    ]
    (ours, our_lengths), (theirs, their_lengths) = results
    assert ours.dtype == theirs.dtype and our_lengths.dtype == their_lengths.dtype
    torch.testing.assert_close(our_lengths, their_lengths)
    tolerance = EXACT if dtype == torch.float64 else {}
    torch.testing.assert_close(ours, theirs, **tolerance)
    for logps in (ours, theirs):
        (logps * weights).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, **tolerance)


def test_ld_alpha_weights_tokens_beyond_the_shorter_completion() -> None:
    logits = torch.zeros(2, 6, 4, dtype=torch.float64)
    labels = torch.tensor([[-100, 1, 1, 1, 1, 1], [-100, 1, 1, -100, -100, -100]])
    logps, lengths = get_batch_logps(logits, labels, ld_alpha=0.5)
    expected = torch.tensor([2 + 0.5 * 3, 2.0], dtype=torch.float64) * math.log(0.25)
    torch.testing.assert_close(logps, expected)
    assert lengths.tolist() == [5, 2]


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_as_exact_as_a_float32_copy(dtype: torch.dtype) -> None:
    batch = make_batch(4, time=33, vocabulary=257, dtype=dtype)
    truth, _ = callers.get_batch_logps(batch.logits.double(), batch.labels)
    copied, _ = callers.get_batch_logps(batch.logits.float(), batch.labels)
    ours, _ = get_batch_logps(*batch)
    assert ours.dtype == torch.float32
    floor = 8 * torch.finfo(torch.float32).eps * truth.abs().max()
    assert (ours - truth).abs().max() <= 2 * (copied - truth).abs().max() + floor


@pytest.mark.kernels
def test_an_empty_completion_has_sum_and_length_0() -> None:
    batch = make_batch(2, dtype=torch.float64)
    batch.labels[2] = -100
    for function in (get_batch_logps, callers.get_batch_logps):
        logps, lengths = function(*batch)
        assert logps[2] == 0.0 and lengths[2] == 0
        # The common length is 0, so all tokens of the other completion are weighted.
        halved, _ = function(*batch, ld_alpha=0.5)
        torch.testing.assert_close(halved[[0, 2]], 0.5 * logps[[0, 2]], **EXACT)


@pytest.mark.kernels
def test_a_padding_token_can_be_the_ignored_label() -> None:
    batch = make_batch(2, dtype=torch.float64)
    labels = torch.where(batch.labels == -100, 7, batch.labels)
    ours = get_batch_logps(batch.logits, labels, 7)
    for mine, theirs in zip(ours, callers.get_batch_logps(batch.logits, labels, 7), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ld_alpha": 1.5}, ValueError, "ld_alpha: expected .* got 1.5"),
        ({"ld_alpha": "1"}, TypeError, "ld_alpha: expected a number, got str"),
        ({"label_pad_token_id": None}, TypeError, "ignore_index: expected an int"),
        ({"labels": torch.zeros(4, 3, dtype=torch.int64)}, ValueError, "labels: expected shape"),
    ],
)
def test_errors_name_the_argument(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {**make_batch(2)._asdict(), **change}
    with pytest.raises(error, match=message):
        get_batch_logps(**arguments)


def test_ld_alpha_needs_as_many_rejected_rows_as_chosen() -> None:
    logits, labels = (tensor[:3] for tensor in make_batch(2))
    get_batch_logps(logits, labels)
    with pytest.raises(ValueError, match=r"logits: expected chosen rows and as many .* got 3 rows"):
        get_batch_logps(logits, labels, ld_alpha=0.5)


# ---- the trainer ---------------------------------------------------------------------------------


@pytest.mark.kernels
@tiers
@pytest.mark.parametrize("train_eval", ["train", "eval"])
@pytest.mark.parametrize("caller", [DPOTrainerCaller, TupleCaller])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pref_beta": 2.0, "simpo_gamma": 1.0},
        {"pref_beta": 2.0, "pref_ftx": 0.25},
        {"pref_beta": 2.0, "ld_alpha": 0.4},
        {"pref_loss": "orpo"},
        {"pref_loss": "sigmoid", "ld_alpha": 0.4},
        {"pref_loss": "ipo", "pref_ftx": 0.25},
    ],
)
def test_a_step_matches_custom_dpo_trainer(
    options: dict[str, Any], caller: type[DPOTrainerCaller], train_eval: str, fused_linear: bool
) -> None:
    model, batch = TinyCausalLM().double(), preference_batch()
    trainer = simpo_trainer(caller, fused_linear=fused_linear)(**options)
    ours = trained(trainer, model, batch, train_eval=train_eval)
    theirs = trained(caller(**options), model, batch, train_eval=train_eval)
    assert_same_step(ours, theirs, **EXACT)


@pytest.mark.kernels
def test_the_loss_matches_the_preset_and_the_formula() -> None:
    model, batch = TinyCausalLM().double(), preference_batch()
    options = {"pref_beta": 2.5, "simpo_gamma": 1.4, "pref_ftx": 0.3}
    loss, metrics = simpo_trainer(DPOTrainerCaller)(**options).get_batch_loss_metrics(model, batch)
    logits = model(batch["input_ids"], return_dict=True, use_cache=False).logits.detach()
    torch.testing.assert_close(
        loss.detach(), llamafactory_loss(logits, batch["labels"], **options).loss, **EXACT
    )
    out = simpo_ext.simpo_loss(
        logits, batch["labels"], preset="llamafactory", beta=2.5, gamma=1.4, sft_weight=0.3
    )
    torch.testing.assert_close(loss.detach(), out.loss, **EXACT)
    own = out.metrics()
    for name in own.keys() & metrics.keys():
        assert own[name] == pytest.approx(metrics[name], rel=1e-7), name
    assert own.keys() >= metrics.keys() - {"logits/chosen", "logits/rejected"}


@pytest.mark.kernels
@tiers
def test_a_step_of_a_bfloat16_model_matches_float32_logits(fused_linear: bool) -> None:
    model, batch = TinyCausalLM().bfloat16(), preference_batch()
    options = {"pref_beta": 2.0, "pref_ftx": 0.1}
    trainer = simpo_trainer(DPOTrainerCaller, fused_linear=fused_linear)(**options)
    ours = trained(trainer, model, batch)
    theirs = trained(DPOTrainerCaller(**options), model, batch)
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], theirs[0])
    for name, value in theirs[1].items():
        # Without logits, their mean is computed before rounding.
        tolerance = 1e-3 if name.startswith("logits") and fused_linear else 0.0
        assert ours[1][name] == pytest.approx(value, rel=1e-5, abs=tolerance), name
    for name, expected in theirs[2].items():  # Both use bfloat16 layers.
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours[2][name], expected, rtol=2e-2, atol=1e-2 * scale)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an op returns, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                elements = max(self.elements[tensor.dtype], tensor.numel())
                self.elements[tensor.dtype] = elements
        return result


def test_no_float32_copy_of_the_logits_is_made() -> None:
    model = TinyCausalLM(vocabulary=9001).bfloat16()  # more than one chunk
    batch = preference_batch(vocabulary=9001)
    logits = batch["input_ids"].numel() * 9001
    largest = []
    for trainer in (
        DPOTrainerCaller(),
        simpo_trainer(DPOTrainerCaller, fused_linear=False)(),
        simpo_trainer(DPOTrainerCaller, fused_linear=True, logits_budget_bytes=0)(),
    ):
        with Largest() as mode:
            trained(trainer, model, batch)
        largest.append(mode.elements)
    theirs, from_logits, fused = largest
    assert theirs[torch.float32] == logits  # The mode sees the logits.
    assert from_logits[torch.bfloat16] == logits
    assert from_logits[torch.float32] <= logits / 6  # A copy of one sequence, for its mean.
    assert max(fused.values()) < logits / 2


@pytest.mark.kernels
def test_logits_can_be_overwritten_with_their_gradient() -> None:
    model, batch = TinyCausalLM().double(), preference_batch()
    theirs = trained(DPOTrainerCaller(pref_ftx=0.25), model, batch)
    trainer_class = simpo_trainer(DPOTrainerCaller, fused_linear=False, inplace_backward=True)
    trainer = trainer_class(pref_ftx=0.25)
    assert_same_step(trained(trainer, model, batch), theirs, **EXACT)

    kept: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda _module, _args, output: kept.append(output))
    loss, _ = trainer.get_batch_loss_metrics(model, batch)
    before = kept[0].detach().clone()
    loss.backward()
    assert not torch.equal(kept[0].detach(), before)


def test_the_batch_is_not_changed_and_the_model_gets_no_labels() -> None:
    model, batch = TinyCausalLM(), preference_batch()
    trainer = simpo_trainer(DPOTrainerCaller)()
    for _ in range(2):
        trainer.get_batch_loss_metrics(model, batch)
    assert {*batch} == {"input_ids", "attention_mask", "labels"}
    assert model.calls == 3 * [{"attention_mask", "return_dict", "use_cache"}]  # One is a probe.


def test_custom_dpo_trainer_scores_the_reference_model() -> None:
    trainer = simpo_trainer(DPOTrainerCaller)("sigmoid", ld_alpha=0.0)
    model, batch = TinyCausalLM(), preference_batch()
    output = trainer.concatenated_forward(model, batch, is_ref_model=True)
    assert type(output) is dict
    plain = DPOTrainerCaller("sigmoid").concatenated_forward(model, batch)
    torch.testing.assert_close(output["chosen_logps"], plain["chosen_logps"])


def test_the_output_of_the_forward_is_a_tuple_with_keys() -> None:
    model, batch = TinyCausalLM(), preference_batch()
    output = simpo_trainer(DPOTrainerCaller)().concatenated_forward(model, batch)
    first, second, *rest = output
    assert output["chosen_logps"] is first and output["rejected_logps"] is second is output[1]
    assert len(rest) == 3 and output["chosen_logps_avg"] is first
    for name in ("chosen_logits", "rejected_logits"):
        assert output[name].dim() == 0 and not output[name].requires_grad


def test_an_odd_number_of_rows_is_refused() -> None:
    batch = {name: tensor[:5] for name, tensor in preference_batch().items()}
    with pytest.raises(ValueError, match=r"batch: expected chosen rows and as many .* got 5 rows"):
        simpo_trainer(DPOTrainerCaller)().get_batch_loss_metrics(TinyCausalLM(), batch)


# ---- with logits or without ----------------------------------------------------------------------


def test_a_batch_with_images_uses_logits(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = TinyCausalLM().double(), preference_batch()
    theirs = trained(DPOTrainerCaller(), model, batch)
    batch["pixel_values"] = torch.zeros(6, 3)
    trainer = simpo_trainer(DPOTrainerCaller)()
    for _ in range(2):
        assert_same_step(trained(trainer, model, batch), theirs, **EXACT)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "more than text: pixel_values" in record.message
    with pytest.raises(ValueError, match=r"fused_linear: .* got True: .* pixel_values"):
        trained(simpo_trainer(DPOTrainerCaller, fused_linear=True)(), model, batch)


def wrapped_for_replicas(model: nn.Module, trainer: Any) -> nn.Module:
    return nn.DataParallel(model)


def compiled(model: nn.Module, trainer: Any) -> nn.Module:
    trainer.args.torch_compile = True
    return model


def without_output_embeddings(model: nn.Module, trainer: Any) -> nn.Module:
    model.get_output_embeddings = lambda: None
    return model


@pytest.mark.parametrize("change", [wrapped_for_replicas, compiled, without_output_embeddings])
def test_models_that_need_logits_use_logits(change: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = TinyCausalLM().double(), preference_batch()
    theirs = trained(DPOTrainerCaller(), model, batch)
    trainer = simpo_trainer(DPOTrainerCaller)()
    changed = change(copy.deepcopy(model), trainer)
    loss, _ = trainer.get_batch_loss_metrics(changed, batch)
    torch.testing.assert_close(loss.detach(), theirs[0], **EXACT)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    trainer = simpo_trainer(DPOTrainerCaller, fused_linear=True)()
    with pytest.raises(ValueError, match="fused_linear: expected None or False for this model"):
        trainer.get_batch_loss_metrics(change(copy.deepcopy(model), trainer), batch)


def test_another_model_is_probed_again() -> None:
    batch = preference_batch()
    trainer = simpo_trainer(DPOTrainerCaller, fused_linear=True)()
    for seed in range(2):
        model = TinyCausalLM(seed=seed).double()
        loss, _ = trainer.get_batch_loss_metrics(model, batch)
        theirs, _ = DPOTrainerCaller().get_batch_loss_metrics(model, batch)
        torch.testing.assert_close(loss.detach(), theirs.detach(), **EXACT)


# ---- empty completions ---------------------------------------------------------------------------


@pytest.mark.kernels
@tiers
@pytest.mark.parametrize("row", [1, 4])
@pytest.mark.parametrize("pref_ftx", [0.0, 0.25])
def test_a_pair_with_an_empty_completion_is_dropped(
    row: int, pref_ftx: float, fused_linear: bool
) -> None:
    model, batch = TinyCausalLM().double(), preference_batch()
    batch["labels"][row] = -100
    without = {name: tensor[[0, 2, 3, 5]] for name, tensor in batch.items()}
    trainer = simpo_trainer(DPOTrainerCaller, fused_linear=fused_linear)(pref_ftx=pref_ftx)
    ours = trained(trainer, model, batch)
    theirs = trained(DPOTrainerCaller(pref_ftx=pref_ftx), model, without)
    for name in ("logits/chosen", "logits/rejected"):  # These are means over all rows.
        ours[1][name] = theirs[1][name]
    assert_same_step(ours, theirs, **EXACT)


@tiers
@pytest.mark.parametrize("rows", [3, 6])  # all chosen rows, or all rows
def test_without_valid_pairs_the_loss_is_nan_and_the_gradient_0(
    rows: int, fused_linear: bool
) -> None:
    model, batch = TinyCausalLM(), preference_batch()
    batch["labels"][:rows] = -100
    trainer = simpo_trainer(DPOTrainerCaller, fused_linear=fused_linear)(pref_ftx=0.1)
    loss, metrics, grads = trained(trainer, model, batch)
    assert loss.isnan() and metrics["rewards/margins"] != metrics["rewards/margins"]
    assert all(grad is None or not grad.any() for grad in grads.values())


def test_empty_nan_matches_llama_factory() -> None:
    model, batch = TinyCausalLM(), preference_batch()
    batch["labels"][1] = -100
    for trainer in (DPOTrainerCaller(), simpo_trainer(DPOTrainerCaller, empty="nan")()):
        loss, metrics = trainer.get_batch_loss_metrics(model, batch)
        assert loss.isnan() and metrics["logps/chosen"] != metrics["logps/chosen"]
        assert metrics["logps/rejected"] == metrics["logps/rejected"]


# ---- installing the trainer ----------------------------------------------------------------------


def test_simpo_loss_can_be_installed_alone() -> None:
    class Trainer(DPOTrainerCaller):
        simpo_loss = llamafactory.simpo_loss

    model, batch = TinyCausalLM().double(), preference_batch()
    options = {"pref_beta": 2.0, "simpo_gamma": 1.0, "pref_ftx": 0.2}
    ours = trained(Trainer(**options), model, batch)
    assert_same_step(ours, trained(DPOTrainerCaller(**options), model, batch), **EXACT)


@pytest.mark.parametrize("is_imported_by_workflow", [True, False])
def test_patch_makes_the_workflow_create_the_new_class(
    monkeypatch: pytest.MonkeyPatch, is_imported_by_workflow: bool
) -> None:
    trainer, workflow = callers.install_package(
        monkeypatch, DPOTrainerCaller, is_imported_by_workflow=is_imported_by_workflow
    )
    first = llamafactory.patch()
    assert trainer.CustomDPOTrainer is first
    assert getattr(workflow, "CustomDPOTrainer", None) is (
        first if is_imported_by_workflow else None
    )
    assert first.__mro__[1:3] == (SimPOMixin, DPOTrainerCaller)
    assert first.__name__ == "DPOTrainerCaller" and first.empty == "drop"

    options = {
        "fused_linear": False,
        "empty": "nan",
        "logits_budget_bytes": 1,
        "inplace_backward": True,
    }
    second = llamafactory.patch(**options)
    assert trainer.CustomDPOTrainer is second
    assert second.__mro__[1:3] == (SimPOMixin, DPOTrainerCaller)
    assert {name: getattr(second, name) for name in options} == options
    assert first.fused_linear is None and first.inplace_backward is False


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"trainer_class": nn.Module}, TypeError, "trainer_class: expected LLaMA-Factory's"),
        ({"trainer_class": "CustomDPOTrainer"}, TypeError, "trainer_class: .* 'CustomDPOTrainer'"),
        ({"empty": "zero"}, ValueError, "empty: expected one of 'drop', 'nan', got 'zero'"),
        ({"inplace_backward": 1}, TypeError, "inplace_backward: expected a bool, got int"),
        ({"fused_linear": 1}, TypeError, "fused_linear: expected a bool, got int"),
        ({"logits_budget_bytes": -1}, ValueError, "logits_budget_bytes: expected .* got -1"),
    ],
)
def test_errors_name_the_option(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"trainer_class": DPOTrainerCaller, **change}
    with pytest.raises(error, match=message):
        simpo_trainer(**arguments)


def test_without_llama_factory_patch_raises_an_error() -> None:
    with pytest.raises(ImportError, match=re.escape("llamafactory")):
        llamafactory.patch()
