"""The benchmark of the TRL trainer: what it verifies, measures and writes, not its times."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(load):
    return load("trl_subjects").Geometry(
        pairs=2, time=12, hidden=64, vocabulary=300, dtype="float32"
    )


def test_a_geometry_counts_its_logits(load) -> None:
    geometry = load("trl_subjects").Geometry(2, 512, 1024, 128256, "bfloat16")
    assert geometry.name == "4x512x1024x128256 bfloat16"
    assert geometry.logits_bytes == 4 * 512 * 128256 * 2
    assert type(geometry)(**json.loads(json.dumps(geometry.to_json()))) == geometry


def test_a_batch_is_as_trl_s_collator_makes_it(load, tiny) -> None:
    batch = load("trl_subjects").make_batch(tiny)
    prompt = 5  # 40 % of 12
    for half in ("chosen", "rejected"):
        ids, labels = batch[f"{half}_input_ids"], batch[f"{half}_labels"]
        assert ids.shape == labels.shape == batch[f"{half}_attention_mask"].shape == (2, 12)
        assert (labels[:, :prompt] == -100).all()
        assert torch.equal(labels[:, prompt:], ids[:, prompt:])
    opening = [batch[f"{half}_input_ids"][:, :prompt] for half in ("chosen", "rejected")]
    assert torch.equal(*opening)
    logits = load("trl_subjects").make_model(tiny)(batch["chosen_input_ids"]).logits
    assert 1.5 < logits.std() < 3.5


def test_a_subject_that_is_wrong_is_found_out(load, tiny) -> None:
    subjects = load("trl_subjects")
    model, batch = subjects.make_model(tiny), subjects.make_batch(tiny)
    stock = subjects.find(subjects.make_trainer(subjects.STOCK, model), batch)
    for name in subjects.OURS:
        trainer = subjects.make_trainer(name, model)
        assert trainer.fused_linear is subjects.FUSED_LINEAR[name]
        found = subjects.find(trainer, batch)
        right = subjects.compare(found, stock, "float32")
        assert right["status"] == "right" and right["value_error"] < 1e-5
        trainer.beta *= 1.01
        wrong = subjects.compare(subjects.find(trainer, batch), stock, "float32")
        assert wrong["status"] == "wrong" and ": " in wrong["reason"]
        doubled = dataclasses.replace(found, gradients=[2.0 * g for g in found.gradients])
        wrong = subjects.compare(doubled, stock, "float32")
        assert wrong["status"] == "wrong" and "gradients" in wrong["reason"]
        del found.metrics["nll_loss"]
        assert subjects.compare(found, stock, "float32")["status"] == "wrong"


def test_the_program_verifies_times_and_writes(
    load, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, subjects = load("trl"), load("trl_subjects")
    other = dataclasses.replace(tiny, dtype="bfloat16", time=13)
    monkeypatch.setattr(program, "QUICK_CASES", (tiny, other))
    monkeypatch.setattr(load("timing"), "WARMUP_ROUNDS", 0)
    peaks = {"evaluation_mib": 1.0, "training_mib": 2.0, "method": "none"}
    monkeypatch.setattr(load("trl_memory"), "peak_extra_mib", lambda *_: peaks)
    output = tmp_path / "out.json"
    assert program.main(["--quick", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["kind"] == "quick" and found["samples"] == 1
    assert [case["name"] for case in found["cases"]] == [tiny.name, other.name]
    for case in found["cases"]:
        assert [row["name"] for row in case["rows"]] == list(subjects.SUBJECTS)
        for row in case["rows"]:
            assert row["status"] == "right" and row["memory"] == peaks
            for phase in ("evaluation", "training"):
                stock = case["rows"][0][phase]["median_ms"]
                ratio = pytest.approx(row[phase]["median_ms"] / stock)
                assert row[phase]["x_stock"] == ratio
    printed = capsys.readouterr().out
    assert program.main(["--readme", str(output)]) == 0
    table = capsys.readouterr().out.strip()
    assert table in printed
    assert len([line for line in table.splitlines() if "simpo_ext, from" in line]) == 4


def test_memory_is_measured_in_a_process_of_its_own(load, tiny) -> None:
    memory, subjects = load("memory"), load("trl_subjects")
    # So large that what a process does by itself is little beside it.
    each = dataclasses.replace(tiny, time=128, vocabulary=40_000)
    peaks = {}
    for name in (subjects.STOCK, subjects.FUSED):
        request = {"fields": each.to_json(), "name": name, "phase": "evaluation"}
        answer = memory.measured_apart("bench.trl_memory", request)
        assert "evaluation_mib" in answer, answer
        peaks[name] = answer["evaluation_mib"]
    logits = each.logits_bytes / 2**20
    assert peaks[subjects.STOCK] > logits
    assert peaks[subjects.FUSED] < 0.5 * logits
