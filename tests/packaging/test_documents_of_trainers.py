"""The examples of trainers run as printed. The logs of TRL's match the printed ones.

For TRL, "my-model" is a small Llama with random weights, and "pairs.jsonl" is made of the LICENSE.
For LLaMA-Factory and axolotl, tests/support has code that calls the integrations as they do.
"""

from __future__ import annotations

import ast
import functools
import json
import random
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from support import callers_axolotl, callers_llamafactory
from support.documents import code
from support.paths import ROOT

DOCUMENT = "simpo_ext/integrations/README.md"
# Settings for a machine without a GPU and without a network.
HERE = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}

pytestmark = pytest.mark.cpu_only


def write_model(folder: Path, texts: list[str]) -> None:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_pairs(file: Path, words: list[str]) -> None:
    """128 pairs: a chosen completion continues the text, a rejected one has its words shuffled."""
    generator = random.Random(0)
    with file.open("w") as lines:
        for _ in range(128):
            start = generator.randrange(len(words) - 16)
            prompt, chosen = words[start : start + 4], words[start + 4 : start + 16]
            rejected = generator.sample(chosen, len(chosen))
            pair = {"prompt": prompt, "chosen": ["", *chosen], "rejected": ["", *rejected]}
            joined = {side: " ".join(parts) for side, parts in pair.items()}
            lines.write(json.dumps(joined) + "\n")


def as_numbers(logged: str) -> list[dict[str, float]]:
    """The dicts that a trainer prints, with numbers instead of strings."""
    found = re.findall(r"\{.*?\}", logged, re.DOTALL)
    return [{k: float(v) for k, v in ast.literal_eval(each).items()} for each in found]


def test_the_example_of_trl_logs_the_printed_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (source,) = (text for text in code(DOCUMENT) if "trl." in text)
    assert len([line for line in source.splitlines() if line.strip()]) == 10
    (shown,) = code(DOCUMENT, "text")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
        from trl.experimental import cpo

        monkeypatch.setattr(cpo, "CPOConfig", functools.partial(cpo.CPOConfig, **HERE))
        monkeypatch.chdir(tmp_path)
        text = (ROOT / "LICENSE").read_text(encoding="utf-8")
        write_model(Path("my-model"), [text])
        write_pairs(Path("pairs.jsonl"), text.split())
        capsys.readouterr()
        exec(compile(source, DOCUMENT, "exec"), {})
    logs = as_numbers(capsys.readouterr().out)
    steps = [each for each in logs if "loss" in each]
    for ours, printed in zip((steps[0], steps[-1]), as_numbers(shown), strict=True):
        assert list(ours) == list(printed)
        # Other processors round differently, and Adam's steps amplify the differences.
        assert ours == pytest.approx(printed, rel=0.02, abs=0.02)


def test_the_example_of_llama_factory_trains_with_the_mixin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from simpo_ext.integrations.llamafactory import SimPOMixin

    (source,) = (text for text in code(DOCUMENT) if "patch()" in text)
    trainer, _ = callers_llamafactory.install_package(
        monkeypatch, callers_llamafactory.DPOTrainerCaller, is_imported_by_workflow=False
    )
    tuner, made = ModuleType("llamafactory.train.tuner"), []
    tuner.run_exp = lambda: made.append(trainer.CustomDPOTrainer)
    monkeypatch.setitem(sys.modules, tuner.__name__, tuner)
    exec(compile(source, DOCUMENT, "exec"), {})
    (made_class,) = made
    assert issubclass(made_class, SimPOMixin)
    assert issubclass(made_class, callers_llamafactory.DPOTrainerCaller)


def test_the_example_of_axolotl_uses_the_plugin_s_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = code(DOCUMENT, "yaml")

    class Trainer:
        def __init__(self, model: object, **_: object) -> None:
            self.model = model

    callers_axolotl.install_package(monkeypatch, Trainer)
    from simpo_ext.integrations import axolotl

    axolotl._simpo_plugin.cache_clear()
    try:
        run = callers_axolotl.Run(yaml.safe_load(text))
        options = run.plugins[0].get_trainer_cls(run.cfg).options
    finally:
        axolotl._simpo_plugin.cache_clear()
    assert options == {"fused_linear": True}
    assert run.training_arguments() == {
        "loss_type": "simpo",
        "beta": 2.0,
        "simpo_gamma": 1.0,
        "cpo_alpha": 0.0,
    }
