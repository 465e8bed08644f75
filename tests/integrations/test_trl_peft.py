"""SimPOTrainer trains adapters of PEFT like stock TRL. Adapters of lm_head are not fused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from support import trl_training as trl
from support.trl_training import STOCK, TIERS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT uses a deprecated attribute of transformers.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

LAYERS = ["q_proj", "v_proj", "down_proj"]


def lora(**options: Any) -> peft.LoraConfig:
    """A config whose second factor is not zero, so that both factors have gradients."""
    given = {"r": 4, "target_modules": LAYERS, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**given, **options})


def step_of(
    tier: str, folder: Path, config: Any, model: Any = None, batch: Any = None, **options: Any
) -> tuple[Any, trl.Step, Any]:
    trainer = trl.make_trainer(tier, folder, model, peft_config=config, **options)
    batch = trl.first_batch(trainer) if batch is None else batch
    return trainer, trl.step(trainer, batch), batch


FUSED = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "lora and a trained norm": lora(modules_to_save=["norm"]),
    "lora and biases": lora(bias="all"),
    "ia3": peft.IA3Config(
        target_modules=LAYERS, feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "lora of the embedding": lora(target_modules=["embed_tokens", "q_proj"]),
}


@pytest.mark.parametrize("tier", ["auto", *TIERS])
@pytest.mark.parametrize("name", FUSED)
def test_adapters_of_the_layers(tmp_path: Path, name: str, tier: str) -> None:
    _, stock, batch = step_of(STOCK, tmp_path, FUSED[name])
    assert all(
        any(part in gradient for part in ("lora", "ia3", "modules_to_save"))
        for gradient in stock["gradients"]
    )
    trainer, ours, _ = step_of(tier, tmp_path, FUSED[name], batch=batch)
    assert trainer.fused_linear is (tier != "logits")
    trl.assert_same_step(ours, stock)


@pytest.mark.parametrize("tier", TIERS)
def test_a_run_with_lora(tmp_path: Path, tier: str) -> None:
    options = {"max_steps": 4, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    ours, stock = (
        trl.train(trl.make_trainer(name, tmp_path, peft_config=lora(), **options))
        for name in (tier, STOCK)
    )
    trl.assert_same_training(ours, stock)
    base = trl.make_model().lm_head.weight
    assert torch.equal(ours.trainer.model.get_output_embeddings().weight, base)


@pytest.mark.parametrize("tier", TIERS)
def test_a_model_that_is_already_a_peft_model(tmp_path: Path, tier: str) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(trl.make_model(), lora())
    _, stock, batch = step_of(STOCK, tmp_path, None, model)
    trl.assert_same_step(step_of(tier, tmp_path, None, model, batch)[1], stock)


NOT_FUSED = {
    "lora of lm_head": (lora(target_modules=["q_proj", "lm_head"]), False),
    "lora of all linear layers and lm_head": (
        lora(target_modules=[*LAYERS, "k_proj", "o_proj", "lm_head"]),
        False,
    ),
    "a trained lm_head": (lora(modules_to_save=["lm_head"]), False),
    "a trained embedding that lm_head is tied to": (
        lora(modules_to_save=["embed_tokens", "lm_head"]),
        True,
    ),
    "lora of lm_head, tied": (lora(target_modules=["q_proj", "lm_head"]), True),
}
TIED = "ignore:.*tie_word_embeddings:UserWarning"


@pytest.mark.parametrize("name", NOT_FUSED)
@pytest.mark.filterwarnings(TIED)
def test_an_adapter_of_lm_head_is_trained_from_the_logits_or_refused(
    tmp_path: Path, name: str
) -> None:
    config, is_tied = NOT_FUSED[name]
    model = trl.make_model(tie_word_embeddings=is_tied)
    _, stock, batch = step_of(STOCK, tmp_path, config, model)
    assert any("lm_head" in gradient for gradient in stock["gradients"])
    trainer, ours, _ = step_of("auto", tmp_path, config, model, batch)
    assert trainer.fused_linear is False
    trl.assert_same_step(ours, stock)
    trl.assert_same_step(step_of("logits", tmp_path, config, model, batch)[1], stock)
    with pytest.raises(ValueError, match="fused_linear"):
        step_of("fused", tmp_path, config, model, batch)


@pytest.mark.parametrize(
    "config",
    [lora(target_modules=["embed_tokens", "q_proj"]), lora(modules_to_save=["embed_tokens"])],
    ids=["lora", "trained"],
)
@pytest.mark.filterwarnings(TIED)
def test_an_adapter_of_an_embedding_that_lm_head_is_tied_to(tmp_path: Path, config: Any) -> None:
    """PEFT may untie lm_head from the embedding."""
    model = trl.make_model(tie_word_embeddings=True)
    _, stock, batch = step_of(STOCK, tmp_path, config, model)
    trl.assert_same_step(step_of("auto", tmp_path, config, model, batch)[1], stock)


@pytest.mark.parametrize("tier", ["auto", "fused"])
def test_an_adapter_that_is_switched_off_and_on_again(tmp_path: Path, tier: str) -> None:
    stock, first, batch = step_of(STOCK, tmp_path, lora())
    trainer, ours, _ = step_of(tier, tmp_path, lora(), batch=batch)
    trl.assert_same_step(ours, first)
    losses = []
    for each in (stock, trainer):
        with each.model.disable_adapter(), torch.no_grad():
            losses.append(each.get_batch_loss_metrics(each.model, batch)[0].item())
    assert losses[1] == pytest.approx(losses[0], rel=trl.TOLERANCE)
    assert losses[0] != pytest.approx(first["loss"], rel=1e-3)
    trl.assert_same_step(trl.step(trainer, batch), first)


PROMPTS = {
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p tuning": peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_learned_prompts_are_refused_or_trained_as_in_stock_trl(tmp_path: Path, name: str) -> None:
    """Virtual tokens make logits longer than labels. Stock TRL may refuse them too."""
    with pytest.raises(ValueError, match=r"fused_linear: .*prompt"):
        step_of("fused", tmp_path, PROMPTS[name])
    stock_trainer = trl.make_trainer(STOCK, tmp_path, peft_config=PROMPTS[name])
    batch = trl.first_batch(stock_trainer)
    try:
        stock = trl.step(stock_trainer, batch)
    except Exception as error:
        for tier in ("auto", "logits"):
            with pytest.raises(type(error)):
                step_of(tier, tmp_path, PROMPTS[name], batch=batch)
    else:
        trainer, ours, _ = step_of("auto", tmp_path, PROMPTS[name], batch=batch)
        assert trainer.fused_linear is False
        trl.assert_same_step(ours, stock)
