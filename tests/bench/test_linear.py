"""The benchmark of the linear front end: what it verifies, counts and writes, not its times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.paths import ROOT

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_batch_is_peaked_and_survives_json(load) -> None:
    linear_batch = load("linear_batch")
    each = linear_batch.synthetic(2, 16, 32, 300, "float32", 0.5)
    assert linear_batch.LinearBatch.from_json(json.loads(json.dumps(each.to_json()))) == each
    assert each.name == "2x16x32x300 float32"
    assert (each.tokens, each.batch.valid_rows) == (32, 16)
    assert each.flops(each.batch.valid_rows) == 6 * 16 * 32 * 300
    tensors = linear_batch.make_tensors(each, CPU)
    assert torch.equal(tensors.hidden, tensors.states[tensors.state_of])
    logits = (tensors.hidden @ tensors.weight.t()).detach()
    following = logits[:, :-1].gather(2, tensors.labels[:, 1:].unsqueeze(2))
    assert following.mean() > logits.mean() + 3 * linear_batch.NOISE * 0.5


@pytest.mark.parametrize("work", ["SimPO", "cross entropy"])
def test_the_truth_is_that_of_the_formula_in_float64(load, work: str) -> None:
    linear_batch, linear_reference = load("linear_batch"), load("linear_reference")
    cases, reference = load("cases"), load("reference")
    each = linear_batch.synthetic(4, 12, 16, 90, "float32", 0.5)
    tensors = linear_batch.make_tensors(each, CPU)
    labels = cases.masked(tensors.labels, each.batch.prompts, each.batch.ends)
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
    truth = linear_reference.LinearReference(tensors)
    expected = truth.truth(labels, work)
    assert expected.loss == pytest.approx(loss.item(), rel=1e-12)
    errors = truth.errors(expected, loss, *gradients)
    assert max(errors.loss, errors.gradient, errors.norm) < 1e-12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_candidate_is_right_with_every_mask(load, dtype: str) -> None:
    linear_batch, linear_laps = load("linear_batch"), load("linear_laps")
    subjects = load("linear_subjects")
    widest = linear_batch.synthetic(4, 24, 32, 4500, dtype)
    laps = linear_laps.LinearLaps(widest, CPU)
    for fraction in (1.0, 0.4):
        laps.set_mask(linear_batch.with_fraction(widest, fraction))
        for candidate in subjects.linear_candidates():
            if candidate.name == subjects.LIGER_COMPILED:
                continue
            row = linear_laps.first_row(laps, candidate, CPU)
            if candidate.is_ours or candidate.name == subjects.EAGER:
                assert row["status"] == "right", row
            assert row["status"] in ("right", "unavailable"), row
            if row["status"] == "right":
                assert laps.run(candidate, "forward") > 0


@pytest.mark.parametrize(
    ("fault", "key"),
    [("loss", "value_error"), ("a row of hidden", "gradient_error"),
     ("a row of weight", "gradient_error"), ("scale", "norm_error"),
     ("masked rows", "gradient_error"), ("nan", "gradient_error")],
)  # fmt: skip
def test_a_wrong_candidate_is_refused_before_it_is_timed(load, fault: str, key: str) -> None:
    linear_batch, linear_laps = load("linear_batch"), load("linear_laps")
    subjects = load("linear_subjects")
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
        found = subjects._eager()(*Fault.apply(hidden, weight), labels, valid)
        return found * (1 + 1e-4) if fault == "loss" else found

    each = linear_batch.synthetic(2, 12, 16, 50, "float32", 0.5)
    candidate = subjects.LinearCandidate(fault, "SimPO", lambda: loss)
    row = linear_laps.first_row(linear_laps.LinearLaps(each, CPU), candidate, CPU)
    assert row["status"] == "wrong"
    assert not float(row[key]) <= row[key.replace("error", "tolerance")]
    json.dumps(row, allow_nan=False)


def test_a_candidate_that_raises_is_reported(load) -> None:
    linear_batch, linear_laps = load("linear_batch"), load("linear_laps")
    subjects = load("linear_subjects")

    def loss(*_):
        raise RuntimeError("out of luck")

    each = linear_batch.synthetic(2, 12, 16, 50, "float32")
    candidate = subjects.LinearCandidate("unlucky", "SimPO", lambda: loss)
    row = linear_laps.first_row(linear_laps.LinearLaps(each, CPU), candidate, CPU)
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: out of luck")


def test_the_floor_makes_the_products_in_every_variant(load) -> None:
    linear_floor = load("linear_floor")
    hidden, weight = torch.randn(5, 8), torch.randn(9000, 8)
    floor = linear_floor.Floor(hidden, weight, lambda: None)
    for block in linear_floor.BLOCKS:
        forward_ms, both_ms = floor.run(block)
        assert 0 < forward_ms < both_ms
        last = slice(block * (9000 // block), None) if block else slice(None)
        logits = hidden @ weight[last].t()
        assert torch.allclose(floor._of(slice(0, logits.shape[1])), logits, atol=1e-4)
        assert torch.allclose(floor._weight_gradient[last], logits.t() @ hidden, atol=1e-3)


def test_the_floor_is_the_fastest_variant_of_each_phase(load) -> None:
    found = load("linear_floor").describe({0: (3.0, 9.0), 4096: (2.0, 10.0)}, 9e9)
    assert (found["forward_ms"], found["forward_backward_ms"]) == (2.0, 9.0)
    assert found["gflops"] == pytest.approx(1000.0)
    names = [each["name"] for each in found["variants"]]
    assert names == ["one call each", "blocks of 4096"]


def results(load) -> dict:
    """Two cases whose figures can be checked by hand."""
    subjects, report = load("linear_subjects"), load("linear_report")

    def row(name: str, milliseconds: float, mib: float) -> dict:
        times = {"median_ms": milliseconds, "disturbed": False}
        kind = "ours" if name in subjects.BUDGETS else "peer"
        return {"name": name, "kind": kind, "status": "right", "value_error": 0.0,
                "norm_error": 0.0, "forward": dict(times), "forward_backward": dict(times),
                "memory": {"forward_mib": 1.0, "forward_backward_mib": mib}}  # fmt: skip

    def case(share: str, ours: float, peer: float) -> dict:
        floor = load("linear_floor").describe({0: (50.0, 100.0)}, 1e9)
        rows = [row(subjects.OURS, ours, 30.0), row(subjects.OURS_0, 140.0, 50.0),
                row(subjects.EAGER, peer, 40.0)]  # fmt: skip
        made = {"name": "n", "dtype": "float32", "share": share, "valid_rows": 7,
                "logits_bytes": 2**20, "gradient_bytes": 20 * 2**20, "compacted_bytes": 2**20,
                "default_budget": 2**30, "floor": floor,
                "rows": rows}  # fmt: skip
        report.add_derived(made)
        return made

    cases = [case("100%", 105.0, 120.0), case("40%", 115.0, 230.0)]
    cases[1]["rows"][2]["forward_backward"]["borrowed"] = True
    found = {
        "cases": cases,
        "canaries": {"kept": 1, "dropped": 0},
        "seconds": 60.0,
        "machine": {"name": "machine"},
        "software": {"threads": 2, "level": "avx512", "torch": "2.13", "liger-kernel": None,
                     "simpo_ext": "1.0", "commit": "abc"},
    }  # fmt: skip
    return found


def test_a_stored_run_is_shown(load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, found = load("linear_report"), results(load)
    stored = tmp_path / "results.json"
    stored.write_text(json.dumps(found))
    assert load("linear").main(["--readme", str(stored)]) == 0
    printed = capsys.readouterr().out
    assert "| **simpo_ext** | 105 (1.05x) | 115 (1.15x) |" in printed
    assert "| of these, the gradients | 20 | 20 |" in printed
    for case in found["cases"]:
        report.print_case(case)
    assert "(230)" in capsys.readouterr().out  # borrowed
    report.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_slow_subjects_alternate_after_each_sample(load) -> None:
    linear_laps, gate_module = load("linear_laps"), load("gate")
    gate = gate_module.Gate(lambda: {"clock": 1.0}, calibration_samples=1, sleep=lambda s: None)
    order: list[str] = []

    def turn(name: str, samples: int, samples_a_turn: int, is_warmed: bool):
        return linear_laps.LinearTurn(
            lambda: order.append(name.upper()), lambda: order.append(name), lambda: 1.0, samples,
            samples_a_turn, is_warmed,
        )  # fmt: skip

    turns = {"f": turn("f", 4, 2, True), "s": turn("s", 2, 1, False)}
    times = linear_laps.alternate(turns, gate)
    assert "".join(order) == "FffsFffs"
    assert (times["f"].rounds, times["s"].rounds) == (4, 2)


def test_the_plan_is_the_issues_and_takes_about_half_an_hour(load) -> None:
    plan_module = load("linear_plan")
    plan = plan_module.full_plan()
    names = [(case.each.name, case.each.batch.share) for case in plan.cases()]
    assert len(set(names)) == len(names) == 30
    for text in ("4x512", "8x512", "x1024x", "x2048x", "x32000 ", "x128256 ", "float32",
                 "bfloat16", "real"):  # fmt: skip
        assert any(text in name for name, _ in names), text
    assert {share for _, share in names} == {"100%", "40%", "20%"}
    assert all(plan_module.OURS in case.names for case in plan.cases())
    assert 1200 < plan_module.estimate_seconds(plan) < 2400
    assert plan.samples_for(500.0) == plan_module.SAMPLES
    assert plan.samples_for(30_000.0) == 1
    assert plan_module.takes_turns(plan_module.OURS, 5000.0)
    assert not plan_module.takes_turns(plan_module.EAGER, 5000.0)


def test_the_quick_run_goes_all_the_way(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    result = run(sys.executable, "-m", "bench", "linear", "--quick", "--output", output)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(output.read_text())
    assert found["kind"] == "quick"
    names = {row["name"] for case in found["cases"] for row in case["rows"]}
    assert names >= {"simpo_ext", "simpo_ext, budget 0", "simpo_ext, unlimited",
                     "F.linear + Princeton", "F.linear_cross_entropy", "Liger SimPO"}  # fmt: skip
    for case in found["cases"]:
        for row in case["rows"]:
            if row["status"] == "unavailable":
                assert row["kind"] == "peer" and row["reason"]
                continue
            assert row["status"] == "right", row
            times = row["forward_backward"]
            assert times["x_floor"] == pytest.approx(
                times["median_ms"] / case["floor"]["forward_backward_ms"]
            )
    borrowed = [row["forward_backward"].get("borrowed") for row in found["cases"][1]["rows"]]
    assert borrowed[:3] == [None] * 3 and all(borrowed[3:])
    assert "forward_backward_mib" in found["cases"][0]["rows"][0]["memory"]
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_the_gpus_program_goes_all_the_way_on_a_cpu(
    load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load("timing"), "WARMUP_ROUNDS", 0)
    output = tmp_path / "cases.jsonl"
    arguments = ["--device", "cpu", "--size", "96x64x600", "--sequences", "4", "--rounds", "1"]
    arguments += ["--candidates", "simpo_ext", "Liger SimPO", "Liger linear cross entropy"]
    assert load("gpu.linear").main([*arguments, "--record", str(output)]) == 0
    cases = [json.loads(line) for line in output.read_text().splitlines()]
    assert [case["share"] for case in cases] == ["100%", "40%"]
    for case in cases:
        *right, missing = case["rows"]
        assert [row["status"] for row in right] == ["right", "right"]
        assert "CUDA" in missing["reason"]
        assert "x bare" in "\n".join(load("gpu.report").linear_lines(case))


@pytest.mark.parametrize(
    "arguments",
    [("--size", "48x32"), ("--sequences", "5"), ("--rounds", "0"), ("--size", "0x1x1"),
     ("--candidates", "nobody")],
)  # fmt: skip
def test_the_gpus_program_refuses_what_makes_no_sense(load, arguments: tuple[str, str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        load("gpu.linear").main(["--device", "cpu", *arguments])
