"""The benchmark of the linear front end: what it verifies, counts and writes, not its times."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def problem_of(load, *sizes, **fields):
    batch = load("common.cases").synthetic(*sizes, **fields)
    return load("linear").LinearProblem(batch, CPU)


@pytest.fixture(autouse=True)
def weight_in_chunks(load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load("common.reference"), "WEIGHT_ELEMENTS", 16 * 20)


def test_a_batch_is_peaked(load) -> None:
    cases = load("common.cases")
    tensors = cases.make_tensors(cases.synthetic(2, 16, 300, "float32", 0.5, hidden=32), CPU)
    assert torch.equal(tensors.hidden, tensors.states[tensors.state_of])
    logits = (tensors.hidden @ tensors.weight.t()).detach()
    following = logits[:, :-1].gather(2, tensors.labels[:, 1:].unsqueeze(2))
    assert following.mean() > logits.mean() + 3 * cases.NOISE * 0.5


@pytest.mark.parametrize("work", ["SimPO", "cross entropy"])
def test_the_truth_is_that_of_the_formula_in_float64(load, work: str) -> None:
    cases, reference = load("common.cases"), load("common.reference")
    each = cases.synthetic(4, 12, 90, "float32", 0.5, hidden=16)
    tensors = cases.make_tensors(each, CPU)
    labels = cases.masked(tensors.labels, each)
    hidden = tensors.hidden.detach().double().requires_grad_()
    weight = tensors.weight.detach().double().requires_grad_()
    following = labels.roll(-1, 1)
    following[:, -1] = cases.IGNORE_INDEX
    logps = (hidden @ weight.t()).log_softmax(-1)
    logps = logps.gather(2, following.clamp(min=0).unsqueeze(2)).squeeze(2)
    scored = following != cases.IGNORE_INDEX
    if work == "SimPO":
        loss = reference.simpo_loss(logps * scored, following)
    else:
        loss = -logps[scored].mean()
    gradients = torch.autograd.grad(loss, (hidden, weight))
    truth = reference.LinearTruth(tensors, labels)
    assert truth.of(work).loss == pytest.approx(loss.item(), rel=1e-12)
    assert max(truth.errors(work, loss, *gradients)) < 1e-12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_every_candidate_is_right_with_every_mask(load, dtype: str, fraction: float) -> None:
    linear, measure = load("linear"), load("common.measure")
    problem = problem_of(load, 4, 24, 4500, dtype, fraction, hidden=32)
    assert len(problem.make_floor()._hidden) == problem.batch.valid_rows
    for candidate in problem.candidates:
        if candidate.name == linear.LIGER_COMPILED:
            continue
        row = measure.verify(problem, candidate)
        if candidate.is_ours or candidate.name == linear.EAGER:
            assert row["status"] == "right", row
        assert row["status"] in ("right", "unavailable"), row
        if row["status"] == "right":
            loss, gradients = problem.lap(candidate, "forward")
            assert not (loss.requires_grad or gradients)


def test_each_budget_is_asked_for(load, monkeypatch: pytest.MonkeyPatch) -> None:
    linear, asked = load("linear"), []

    def loss(*_, logits_budget_bytes, **__):
        asked.append(logits_budget_bytes)
        return SimpleNamespace(loss=None)

    monkeypatch.setattr(linear.simpo_ext, "linear_simpo_loss", loss)
    for candidate in linear.linear_candidates()[:3]:
        candidate.forward(None, None, None, None)
    assert asked == [None, 0, linear.UNLIMITED]


@pytest.mark.parametrize(
    ("fault", "key"),
    [("loss", "value_error"), ("a row of hidden", "gradient_error"),
     ("a row of weight", "gradient_error"), ("scale", "norm_error"),
     ("masked rows", "gradient_error"), ("nan", "gradient_error")],
)  # fmt: skip
def test_a_wrong_candidate_is_refused_before_it_is_timed(load, fault: str, key: str) -> None:
    measure, peers = load("common.measure"), load("common.peers")
    rows = {"a row of hidden": (0, (1, -3)), "a row of weight": (1, 7), "masked rows": (0, (0, 0))}

    class Fault(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight):
            return hidden.clone(), weight.clone()

        @staticmethod
        def backward(ctx, *gradients):
            gradients = [gradient.clone() for gradient in gradients]
            if fault in rows:
                index, row = rows[fault]
                gradients[index][row] += gradients[index][row] * 0.02 + 1e-9
            if fault == "scale":
                gradients[1] *= 1 + 1e-4
            if fault == "nan":
                gradients[1][3, 3] = torch.nan
            return tuple(gradients)

    def loss(hidden, weight, labels, valid):
        found = load("linear")._eager()(*Fault.apply(hidden, weight), labels, valid)
        return found * (1 + 1e-4) if fault == "loss" else found

    problem = problem_of(load, 2, 12, 50, "float32", 0.5, hidden=16)
    row = measure.verify(problem, peers.Candidate(fault, "SimPO", lambda: loss))
    assert row["status"] == "wrong"
    assert not float(row[key]) <= row[key.replace("error", "tolerance")]
    json.dumps(row, allow_nan=False)


def test_a_tiny_run_goes_all_the_way(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear, program = load("linear"), load("common.program")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked: list[tuple[str, ...]] = []

    def peaks(module: str, case, name: str, phases: tuple[str, ...]) -> dict:
        asked.append((module, name, *phases))
        return {f"{phase}_mib": 1.0 for phase in phases}

    monkeypatch.setattr(program.memory, "peaks", peaks)
    case = dataclasses.replace(linear.PROGRAM.quick_cases[0], is_featured=True)
    tiny = dataclasses.replace(linear.PROGRAM, quick_cases=(case,))
    output = tmp_path / "out.json"
    assert program.run(tiny, ["--quick", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    (case,) = found["cases"]
    names = {row["name"] for row in case["rows"]}
    assert names >= {"simpo_ext", "simpo_ext, budget 0", "simpo_ext, unlimited",
                     "F.linear + Princeton", "F.linear_cross_entropy", "Liger SimPO"}  # fmt: skip
    right = [row for row in case["rows"] if row["status"] == "right"]
    assert {row["name"] for row in right} >= {*linear.BUDGETS, linear.EAGER}
    for row in right:
        for phase in ("forward", "forward_backward"):
            times = row[phase]
            ratio = times["median_ms"] / case["floor"][f"{phase}_ms"]
            assert times["x_floor"] == pytest.approx(ratio)
        assert row["memory"] == {"forward_mib": 1.0, "forward_backward_mib": 1.0}
        assert ("bench.linear", row["name"], "forward", "forward_backward") in asked
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_the_gpus_program_goes_all_the_way_on_a_cpu(
    load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "cases.jsonl"
    arguments = ["linear", "--device", "cpu", "--quick", "--rounds", "1", "--candidates"]
    arguments += ["simpo_ext", "Liger SimPO", "Liger linear cross entropy"]
    assert load("gpu.measure").main([*arguments, "--record", str(output)]) == 0
    cases = [json.loads(line) for line in output.read_text().splitlines()]
    assert [case["share"] for case in cases] == ["100%", "40%"]
    for case in cases:
        *right, missing = case["rows"]
        assert [row["status"] for row in right] == ["right", "right"]
        assert "CUDA" in missing["reason"]
    assert "gflops" in capsys.readouterr().out
