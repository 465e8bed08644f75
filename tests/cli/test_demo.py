"""The demo: its data, its errors, and short runs from options to exit code."""

import argparse
import importlib
import json
import math
import re
import subprocess
import sys

import pytest
import torch

from simpo_ext.cli import demo
from simpo_ext.cli.demo import batches, compare, documentation, jsonl, options, train
from simpo_ext.cli.demo.messages import DemoError
from simpo_ext.cli.demo.model import ByteTransformer

BASIC = {"prompt": "The sky is", "chosen": " blue today.", "rejected": " today blue."}


def parse(*arguments):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def write_lines(path, *lines):
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(encoded))
    return path


def user_pairs(count):
    return [
        {
            "prompt": f"Question {i}:",
            "chosen": f" the answer is {i}.",
            "rejected": f" {i} the is answer.",
        }
        for i in range(count)
    ]


@pytest.fixture
def no_comparison(monkeypatch):
    """Skips the final measurement, which takes seconds and has its own test."""
    small = compare.Comparison(
        (2, 4, 8),
        256,
        1,
        1,
        dict.fromkeys(compare.VARIANTS, 0.1),
        {"eager": 10, "simpo_ext": 0, "inplace": None},
    )
    monkeypatch.setattr(compare, "compare", lambda: small)


# --- pairs from the documentation


def test_documentation_pairs_hold_the_same_words_in_another_order():
    split = documentation.pairs(0)
    assert len(split.train) > 500
    assert len(split.held_out) > 100
    for pair in split.train + split.held_out:
        assert pair.chosen != pair.rejected
        assert sorted(pair.chosen.split()) == sorted(pair.rejected.split())
        assert len((pair.prompt + pair.chosen).encode()) <= documentation.PASSAGE_BYTES


@pytest.mark.parametrize("seed", [0, 1])
def test_training_text_contains_no_held_out_text(seed):
    split = documentation.pairs(seed)
    size = documentation.SHINGLE

    def runs(pairs):
        texts = [pair.prompt + pair.chosen for pair in pairs]
        return {text[i : i + size] for text in texts for i in range(len(text) - size + 1)}

    assert runs(split.train).isdisjoint(runs(split.held_out))


def test_documentation_pairs_are_determined_by_the_seed():
    assert documentation.pairs(3) == documentation.pairs(3)
    assert documentation.pairs(3) != documentation.pairs(4)


# --- encoding


def test_labels_mask_prompt_and_padding():
    pairs = [batches.Pair("ab", "cde", "f"), batches.Pair("", "gh", "é")]
    ids, labels = batches.collate(batches.encode(pairs, 64))
    bos, eos, pad, no = batches.BOS, batches.EOS, batches.PAD, batches.IGNORE_INDEX
    assert ids.tolist() == [
        [bos, *b"abcde", eos],
        [bos, *b"gh", eos, pad, pad, pad],
        [bos, *b"abf", eos, pad, pad],
        [bos, *"é".encode(), eos, pad, pad, pad],
    ]
    assert labels.tolist() == [
        [no, no, no, *b"cde", eos],
        [no, *b"gh", eos, no, no, no],
        [no, no, no, *b"f", eos, no, no],
        [no, *"é".encode(), eos, no, no, no],
    ]


def test_truncation_cuts_prompts_left_and_completions_right():
    example = batches.encode_pair(batches.Pair("p" * 99 + "END", "c" * 100, "r" * 3), 41)
    assert example.truncated
    assert example.prompt == [batches.BOS, *b"ppppppp" + b"END"]  # a quarter of the room
    assert example.chosen == [*b"c" * 30]
    assert example.rejected == [*b"rrr", batches.EOS]

    fitting = batches.encode_pair(batches.Pair("p" * 30, "c" * 9, "r" * 3), 41)
    assert not fitting.truncated
    assert len(fitting.prompt) + len(fitting.chosen) == 41


def test_pairs_that_truncation_makes_equal_are_left_out(capsys):
    pairs = [batches.Pair("", "a" * 50 + end, "a" * 50 + "z") for end in "xy"]
    assert batches.encode([*pairs, batches.Pair("", "b", "c")], 16)[0].chosen[0] == ord("b")
    assert "2 pairs left out" in capsys.readouterr().out


def test_split_keeps_pairs_with_one_prompt_together():
    pairs = [batches.Pair(f" prompt  {i % 7}", f"c{i}", "r") for i in range(40)]
    pairs += [batches.Pair("prompt 3 ", "other space, same prompt", "r")]
    examples = batches.encode(pairs, 64)
    for seed in range(5):
        training, held_out = batches.split(examples, seed)
        assert len(training) + len(held_out) == len(examples)
        assert training
        assert held_out
        prompts = [{" ".join(e.text.split()) for e in side} for side in (training, held_out)]
        assert prompts[0].isdisjoint(prompts[1])


def test_split_needs_two_prompts():
    pairs = [batches.Pair("one", f"c{i}", "r") for i in range(9)]
    with pytest.raises(DemoError, match="too few pairs: 9 usable, with 1 distinct prompt;"):
        batches.split(batches.encode(pairs, 64), 0)


# --- JSONL


def test_jsonl_reads_bom_blank_lines_crlf_and_any_utf8(tmp_path):
    line = json.dumps({**BASIC, "prompt": "空は\u2028"}, ensure_ascii=False).encode()
    path = write_lines(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + line + b"\r", b"", b" \t", BASIC)
    assert [pair.prompt for pair in jsonl.read(path, skip_bad=False)] == [
        "空は\u2028",
        BASIC["prompt"],
    ]


def test_chat_messages_become_lines():
    question = {"role": "user", "content": "Why?"}
    record = {
        "prompt": [{"role": "system", "content": "Be brief."}, question],
        "chosen": [{"role": "assistant", "content": "Light."}],
        "rejected": "Who knows",
    }
    assert jsonl.parse(json.dumps(record).encode()) == batches.Pair(
        "system: Be brief.\nuser: Why?\n", "assistant: Light.\n", "Who knows"
    )


@pytest.mark.parametrize("prompt", ["Why?", [{"role": "user", "content": "Why?"}]])
def test_completions_that_repeat_the_conversation_lose_the_prompt(prompt):
    question = {"role": "user", "content": "Why?"}
    record = {
        "prompt": prompt,
        "chosen": [question, {"role": "assistant", "content": "Light."}],
        "rejected": [question, {"role": "assistant", "content": "No."}],
    }
    pair = jsonl.parse(json.dumps(record).encode())
    assert (pair.chosen, pair.rejected) == ("assistant: Light.\n", "assistant: No.\n")


BAD_LINES = {
    "syntax": (b'{"prompt": "a",', "not JSON: .* at column"),
    "not an object": ([1], "expected an object, got a list"),
    "missing": ({"prompt": "a", "chosen": "b"}, "missing rejected"),
    "missing two": ({"prompt": "a"}, "missing chosen, rejected"),
    "number": ({**BASIC, "chosen": 3}, "chosen: expected a string or a list .*, got a number"),
    "null": ({**BASIC, "prompt": None}, "prompt: expected a string or a list .*, got null"),
    "message": ({**BASIC, "chosen": ["hi"]}, "chosen, message 1: expected an object"),
    "no role": ({**BASIC, "chosen": [{"content": "x"}]}, "chosen, message 1: missing role"),
    "content": (
        {**BASIC, "chosen": [{"role": "user", "content": []}]},
        "message 1: content: expected a string, got a list",
    ),
    "empty": ({**BASIC, "rejected": " "}, "rejected is empty"),
    "empty list": ({**BASIC, "chosen": []}, "chosen is empty"),
    "empty message": (
        {**BASIC, "chosen": [{"role": "assistant", "content": ""}]},
        "chosen is empty",
    ),
    "equal": ({**BASIC, "rejected": BASIC["chosen"]}, "chosen and rejected are the same"),
    "bytes": (b'{"prompt": "\xff"}', "not UTF-8 at byte 13 of the line"),
    "surrogate": (b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', "surrogate"),
    "deep": (b"[" * 200_000, "not usable JSON"),
    "huge number": (b'{"prompt": ' + b"9" * 5000 + b"}", "."),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_errors_name_the_number_of_a_bad_line(name, tmp_path, capsys):
    line, message = BAD_LINES[name]
    path = write_lines(tmp_path / "a.jsonl", BASIC, b"", line, BASIC)
    with pytest.raises(DemoError, match="1 bad line and 2 good"):
        jsonl.read(path, skip_bad=False)
    (reported,) = capsys.readouterr().err.splitlines()
    head, _, reason = reported.partition(f"{path}:3: ")
    assert head == ""
    assert re.search(message, reason)

    assert len(jsonl.read(path, skip_bad=True)) == 2
    assert "1 bad line skipped, 2 pairs read" in capsys.readouterr().err


def test_bad_lines_are_listed_up_to_a_cap(tmp_path, capsys):
    path = write_lines(tmp_path / "a.jsonl", *[{}] * (jsonl.MOST_SHOWN + 5))
    with pytest.raises(DemoError, match="has no usable pairs"):
        jsonl.read(path, skip_bad=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == jsonl.MOST_SHOWN + 2
    assert lines[-2].endswith("and 5 more bad lines")


# --- bad usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: expected 1 to"),
        (["--steps", "x"], "--steps: expected a whole number, got 'x'"),
        (["--lr", "0"], "--lr: expected a finite number above 0"),
        (["--beta", "nan"], "--beta: expected a finite number"),
        (["--label-smoothing", "0.6"], "at least 0 and at most 0.5"),
        (["--gamma", "1", "--gamma-beta-ratio", "1"], "not allowed with"),
        (["--loss-type", "square"], "invalid choice"),
        (["--plot", "curve.txt"], r"--plot: expected a name ending in .png"),
        (["--seed", "-1"], "--seed: expected 0 to"),
    ],
)
def test_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def error_of(capsys, *arguments):
    code = demo.run(parse(*arguments))
    return code, capsys.readouterr().err


def test_options_that_exclude_each_other(capsys):
    code, error = error_of(capsys, "--loss-type", "hinge", "--label-smoothing", "0.1")
    assert (code, error[:7]) == (2, "error: ")
    assert error_of(capsys, "--skip-bad") == (2, "error: --skip-bad: expected --data, too\n")


def test_unusable_files_are_reported_before_training(tmp_path, capsys):
    code, error = error_of(capsys, "--data", tmp_path / "none.jsonl")
    assert code == 1
    assert "No such file" in error
    code, error = error_of(capsys, "--plot", tmp_path / "none" / "a.png")
    assert code == 1
    assert "cannot write the plot" in error
    (tmp_path / "folder.png").mkdir()
    assert error_of(capsys, "--plot", tmp_path / "folder.png")[0] == 1
    bad = write_lines(tmp_path / "bad.jsonl", {})
    plotted = tmp_path / "a.png"
    assert error_of(capsys, "--plot", plotted, "--data", bad)[0] == 1
    assert not plotted.exists()


@pytest.mark.parametrize("module", ["tqdm", "rich", "matplotlib"])
def test_missing_packages_are_named_with_a_remedy(module, monkeypatch, capsys, tmp_path):
    real = importlib.import_module

    def import_module(name, package=None):
        if name.partition(".")[0] == module:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    code, error = error_of(capsys, "--plot", tmp_path / "a.png")
    assert code == 1
    assert f"needs {module}" in error
    assert 'pip install "simpo_ext[demo]"' in error


# --- runs


def short_run(tmp_path, *arguments):
    data = write_lines(tmp_path / "data.jsonl", *user_pairs(20))
    return demo.run(
        parse("--data", data, "--steps", 4, "--batch-pairs", 4, "--threads", 1, *arguments)
    )


@pytest.mark.usefixtures("no_comparison")
@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--loss-type", "hinge", "--gamma", "0.4", "--sft-weight", "0"),
        ("--label-smoothing", "0.1", "--beta", "5", "--context", "16", "--batch-pairs", "99"),
    ],
)
def test_run_prints_both_tables(arguments, tmp_path, capsys):
    assert short_run(tmp_path, *arguments) == 0
    out, err = capsys.readouterr()
    assert "18 training pairs, 2 held out" in out
    assert "reward accuracy" in out
    assert "simpo_ext, in place" in out
    assert "n/a" in out
    assert "step 4: held-out accuracy" in err
    assert ("20 of 20 pairs truncated to 16 bytes" in out) == ("--context" in arguments)


@pytest.mark.usefixtures("no_comparison")
@pytest.mark.parametrize("suffix", options.PLOT_SUFFIXES)
def test_plot_is_drawn(suffix, tmp_path):
    path = tmp_path / f"curves{suffix}"
    assert short_run(tmp_path, "--plot", path) == 0
    assert path.stat().st_size > 10_000


@pytest.mark.usefixtures("no_comparison")
def test_skip_bad_trains_on_the_rest(tmp_path, capsys):
    data = write_lines(tmp_path / "data.jsonl", b"?", *user_pairs(12))
    assert demo.run(parse("--data", data, "--steps", 1)) == 1
    assert demo.run(parse("--data", data, "--steps", 1, "--skip-bad")) == 0
    assert "1 bad line skipped, 12 pairs read" in capsys.readouterr().err


@pytest.mark.usefixtures("no_comparison")
def test_diverging_training_is_an_error(tmp_path, capsys):
    assert short_run(tmp_path, "--lr", "1e30") == 1
    assert "try a lower --lr" in capsys.readouterr().err


def test_interrupted_training_still_reports(tmp_path, capsys, monkeypatch):
    calls = 0
    real = train.collate

    def collate(examples):
        nonlocal calls
        calls += 1
        if calls == 4:  # after one evaluation and two steps
            raise KeyboardInterrupt
        return real(examples)

    monkeypatch.setattr(train, "collate", collate)
    monkeypatch.setattr(train, "EVALUATIONS", 1)
    assert short_run(tmp_path) == 130
    assert "after 2 steps of 4, stopped early" in capsys.readouterr().out


def settings(**changes):
    values = {
        "steps": 3,
        "batch_pairs": 8,
        "lr": 3e-3,
        "beta": 2.0,
        "gamma_beta_ratio": 0.5,
        "loss_type": "sigmoid",
        "label_smoothing": 0.0,
        "sft_weight": 1.0,
        "seed": 0,
    }
    return train.Settings(**{**values, **changes})


def trained(training, held_out, chosen_settings):
    torch.manual_seed(chosen_settings.seed)
    model = ByteTransformer(context=128, width=32, layers=1, heads=2)
    return train.train(model, training, held_out, chosen_settings)


def test_a_run_is_determined_by_its_seed():
    examples = batches.encode(documentation.pairs(0).train[:40], 128)
    first, again = (trained(examples[8:], examples[:8], settings()) for _ in range(2))
    other = trained(examples[8:], examples[:8], settings(seed=1))
    assert first.margins == again.margins
    assert first.scores == again.scores
    assert first.margins != other.margins


def test_held_out_accuracy_rises():
    def encode(pairs):
        # A model learns within seconds to tell reversed text.
        return batches.encode(
            [batches.Pair(p.prompt, p.chosen, p.chosen[::-1]) for p in pairs], 128
        )

    split = documentation.pairs(0)
    result = trained(encode(split.train), encode(split.held_out[:64]), settings(steps=40, lr=1e-2))
    assert result.scores[-1].accuracy > 0.85
    assert result.scores[-1].margin > result.scores[0].margin + 0.05
    assert result.scores[-1].loss < result.scores[0].loss


# --- comparison


def test_comparison_measures_every_variant():
    # 16 MiB, far more than the memory that the allocator keeps.
    comparison = compare.compare((4, 64, 16384))
    assert comparison.logits_bytes == 2**24
    assert all(math.isfinite(seconds) for seconds in comparison.seconds.values())
    if sys.platform == "linux":
        eager, plain, inplace = (comparison.peak_bytes[v] for v in compare.VARIANTS)
        assert eager > 1.5 * plain
        assert plain > 2**23 > inplace
    else:
        assert set(comparison.peak_bytes.values()) == {None}


def test_comparison_refuses_a_wrong_result(monkeypatch):
    monkeypatch.setitem(compare.VARIANTS, "simpo_ext", lambda *a: compare.eager(*a) * 1.01)
    with pytest.raises(DemoError, match="simpo_ext and the eager formula differ"):
        compare.compare((2, 8, 64))


def test_importing_the_demo_imports_no_optional_packages():
    # tqdm is not listed, because torch imports it.
    code = "import sys, simpo_ext.cli.demo; print({'rich', 'matplotlib'} & set(sys.modules))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert child.stdout.strip() == "set()"
