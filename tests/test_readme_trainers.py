"""README's examples in trainers: TRL's runs as printed and logs what is printed below it.

The model is a small Llama with random weights, tokens and pairs are of the LICENSE: what the
example finds as "my-model" and "pairs.jsonl".
"""

from __future__ import annotations

import ast
import functools
import json
import random
import re
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
SECTION = re.compile(r"^## In your trainer\n(.*?)(?=^## )", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What a machine with a GPU and a connection has no need of.
HERE = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}

pytestmark = pytest.mark.cpu_only


def blocks() -> list[tuple[str, str]]:
    """Language and text of the section's blocks."""
    (section,) = SECTION.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    return BLOCK.findall(section)


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
    """Of 128 places in a text, what comes next, and the same with its words shuffled."""
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
    """The dicts that a trainer prints, whose values are strings."""
    found = re.findall(r"\{.*?\}", logged, re.DOTALL)
    return [{k: float(v) for k, v in ast.literal_eval(each).items()} for each in found]


def test_the_example_of_trl_logs_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = (text for language, text in blocks() if language == "python" and "trl." in text)
    assert len([line for line in code.splitlines() if line.strip()]) == 10
    (shown,) = (text for language, text in blocks() if language == "text" and "loss" in text)
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
        exec(compile(code, "README.md", "exec"), {})
    logs = as_numbers(capsys.readouterr().out)
    steps = [each for each in logs if "loss" in each]
    for ours, printed in zip((steps[0], steps[-1]), as_numbers(shown), strict=True):
        assert list(ours) == list(printed)
        # Of other processors, other roundings, on which some steps of Adam have been taken.
        assert ours == pytest.approx(printed, rel=0.02, abs=0.02)
