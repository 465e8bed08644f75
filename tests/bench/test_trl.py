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
    return load("common.cases").synthetic(4, 12, 300, "float32", 0.6, hidden=64)


def test_a_batch_is_as_trl_s_collator_makes_it(load, tiny) -> None:
    batch = load("trl").make_batch(tiny)
    prompt = 5  # 40 % of 12
    for half in ("chosen", "rejected"):
        ids, labels = batch[f"{half}_input_ids"], batch[f"{half}_labels"]
        assert ids.shape == labels.shape == batch[f"{half}_attention_mask"].shape == (2, 12)
        assert (labels[:, :prompt] == -100).all()
        assert torch.equal(labels[:, prompt:], ids[:, prompt:])
    opening = [batch[f"{half}_input_ids"][:, :prompt] for half in ("chosen", "rejected")]
    assert torch.equal(*opening)
    logits = load("trl").make_model(tiny)(batch["chosen_input_ids"]).logits
    assert 1.5 < logits.std() < 3.5


def test_a_subject_that_is_wrong_is_found_out(load, tiny) -> None:
    trl, measure = load("trl"), load("common.measure")
    problem = trl.TrainerProblem(tiny)
    stock = problem.candidate(trl.STOCK).forward(trl.find)
    assert {"loss", trl.EVALUATION, "nll_loss", "rewards/margins"} <= set(stock.metrics)
    for name, fused in trl.FUSED_LINEAR.items():
        candidate = problem.candidate(name)
        trainer = candidate.forward(lambda trainer, _: trainer)
        assert trainer.fused_linear is fused is ("hidden states" in name)
        row = measure.verify(problem, candidate)
        assert row["status"] == "right" and row["value_error"] < 1e-5
        found = candidate.forward(trl.find)
        trainer.beta *= 1.01
        row = measure.verify(problem, candidate)
        assert row["status"] == "wrong" and "value" in row["reason"]
        doubled = dataclasses.replace(found, gradients=[2.0 * g for g in found.gradients])
        assert trl.compare(doubled, stock)[1] == pytest.approx(1.0, abs=1e-3)
        del found.metrics["nll_loss"]
        assert not trl.compare(found, stock)[0] <= 1.0  # NaN


def test_each_lap_is_one_step(load, tiny) -> None:
    trl = load("trl")
    problem = trl.TrainerProblem(tiny)
    candidate, found = problem.candidate(trl.STOCK), []
    for phase in (trl.EVALUATION, trl.TRAINING, trl.TRAINING):
        problem.lap(candidate, phase, problem.prepare(candidate))
        gradients = [value.grad for value in problem._model.parameters()]
        found.append([None if each is None else each.norm().item() for each in gradients])
    evaluation, first, second = found
    assert set(evaluation) == {None}
    assert None not in first and first == pytest.approx(second)


def test_a_tiny_run_goes_all_the_way(
    load, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl, program, cases = load("trl"), load("common.program"), load("common.cases")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    program_of = dataclasses.replace(trl.PROGRAM, quick_cases=(cases.Case(tiny),))
    output = tmp_path / "out.json"
    assert program.run(program_of, ["--quick", "--output", str(output)]) == 0
    (case,) = json.loads(output.read_text())["cases"]
    assert case["name"] == "4x12x64x300 float32"
    assert [row["name"] for row in case["rows"]] == [trl.STOCK, *trl.FUSED_LINEAR]
    for row in case["rows"]:
        assert row["status"] == "right"
        for phase in ("evaluation", "training"):
            ratio = row[phase]["median_ms"] / case["rows"][0][phase]["median_ms"]
            assert row[phase]["x_baseline"] == pytest.approx(ratio)


@pytest.mark.exhaustive
def test_memory_of_a_step_is_measured_in_a_process_of_its_own(load, tiny) -> None:
    trl, memory, cases = load("trl"), load("common.memory"), load("common.cases")
    # So large that what a process does by itself is little beside it.
    case = cases.Case(dataclasses.replace(tiny, time=128, ends=(128,) * 4, vocabulary=40_000))
    logits = case.batch.logits_bytes / 2**20
    fused = list(trl.FUSED_LINEAR)[1]
    peaks = {
        name: memory.peaks("bench.trl", case, name, ("evaluation",))["evaluation_mib"]
        for name in (trl.STOCK, fused)
    }
    assert peaks[trl.STOCK] > logits
    assert peaks[fused] < 0.5 * logits
