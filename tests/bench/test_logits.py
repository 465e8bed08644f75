"""The benchmarks from logits: what they verify, count and write. Their times are not tested."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.paths import CSRC, EMULATION, ROOT

CPU = torch.device("cpu")
COMPILED = ("torch.compile", "torch.compile cross_entropy")
TRL = "TRL selective_log_softmax"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, cwd=ROOT
    )


# ---- on the CPU ------------------------------------------------------------------------------


@pytest.fixture
def three_rows_at_a_time(load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load("common.reference"), "ROW_ELEMENTS", 3 * 130)


@pytest.mark.usefixtures("three_rows_at_a_time")
@pytest.mark.parametrize("sequences", [1, 4])  # a mean over sequences; SimPO's loss of pairs
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_every_form_of_the_loss_is_right(load, sequences: int, dtype: str, fraction: float) -> None:
    cases, measure = load("common.cases"), load("common.measure")
    problem = load("logits").LogitsProblem(cases.synthetic(sequences, 24, 130, dtype, fraction))
    for candidate in problem.candidates:
        if candidate.is_compiled or not candidate.available(CPU)[0]:
            continue
        row = measure.verify(problem, candidate)
        assert row["status"] == "right", row
        if candidate.is_ours:
            assert row["value_tolerance"] <= 1e-6 and row["gradient_tolerance"] <= 2.0**-8
        for phase in problem.phases:
            problem.lap(candidate, phase, problem.prepare(candidate))


@pytest.mark.usefixtures("three_rows_at_a_time")
@pytest.mark.parametrize(
    ("fault", "key"),
    [("loss", "value_error"), ("gradient", "gradient_error"), ("masked rows", "gradient_error"),
     ("nan", "gradient_error")],
)  # fmt: skip
def test_a_wrong_loss_is_refused_before_it_is_timed(load, fault: str, key: str) -> None:
    cases, measure, peers = load("common.cases"), load("common.measure"), load("common.peers")

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return logits.clone()

        @staticmethod
        def backward(ctx, gradient):
            if fault == "gradient":
                return gradient * 1.001
            if fault == "masked rows":
                gradient[:, 0] += 1e-9
            if fault == "nan":
                gradient[0, -2, 3] = torch.nan
            return gradient

    def forward(logits, labels):
        loss = peers.pair_loss(peers.get_batch_logps(Gradient.apply(logits), labels))
        return loss * (1 + 1e-4) if fault == "loss" else loss

    problem = load("logits").LogitsProblem(cases.synthetic(2, 12, 50, "float32", 0.5))
    candidate = peers.Candidate(fault, "sequence_loss", lambda: forward)
    row = measure.verify(problem, candidate)
    assert row["status"] == "wrong"
    assert not float(row[key]) <= row[key.replace("error", "tolerance")]
    json.dumps(row, allow_nan=False)


def test_the_plan_has_every_share_and_both_kinds_of_pages(load) -> None:
    plan = load("logits").PROGRAM.cases
    keys = [(case.batch.name, case.batch.share, case.pages) for case in plan]
    assert len(set(keys)) == len(keys) == 32
    assert {case.batch.share for case in plan if case.pages == "huge"} == {"100%", "40%", "20%"}
    assert len([case for case in plan if case.is_featured]) == 2 * 4


def check_run(output: Path, kind: str) -> dict:
    """A run's file: of all rows that were available, all are right, timed and compared."""
    found = json.loads(output.read_text())
    assert found["kind"] == kind and found["machine"]["cores"] > 0 and found["date"]
    assert {"torch", "simpo_ext", "level", "threads"} <= set(found["software"])
    for case in found["cases"]:
        assert case["floor"]["forward_ms"] > 0
        baseline = case["rows"][0]
        for row in case["rows"]:
            if row["status"] == "unavailable":
                assert row["name"] == TRL or "needs a CUDA device" in row["reason"]
                continue
            assert row["status"] == "right", row
            assert row["value_error"] <= row["value_tolerance"]
            for phase in ("forward", "forward_backward"):
                times = row[phase]
                assert 0 < times["min_ms"] <= times["median_ms"] <= times["max_ms"]
                ratio = times["median_ms"] / baseline[phase]["median_ms"]
                assert times["x_baseline"] == pytest.approx(ratio)
    assert output.with_suffix(".png").stat().st_size > 10_000
    return found


def test_a_tiny_run_goes_all_the_way(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, program = load("logits"), load("common.program")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    huge = load("common.cases").Case(logits.SMALL_REAL, "huge", leaves_out=(*COMPILED, TRL))
    tiny = dataclasses.replace(logits.PROGRAM, quick_cases=(huge,))
    output = tmp_path / "out.json"
    assert program.run(tiny, ["--quick", "--output", str(output)]) == 0
    (case,) = check_run(output, "quick")["cases"]
    assert case["pages"] == "huge"
    names = {row["name"] for row in case["rows"]}
    assert names >= {"simpo_ext", "simpo_ext in place", "Princeton", "Princeton float32",
                     "F.cross_entropy"}  # fmt: skip
    assert names.isdisjoint({*COMPILED, TRL})


@pytest.mark.exhaustive
def test_the_quick_run_goes_all_the_way(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    result = run(sys.executable, "-m", "bench", "logits", "--quick", "--output", output)
    assert result.returncode == 0, result.stdout + result.stderr
    found = check_run(output, "quick")
    names = {row["name"] for case in found["cases"] for row in case["rows"]}
    assert names >= {*COMPILED, TRL}
    assert "memory" in found["cases"][0]["rows"][0]


# ---- on a GPU --------------------------------------------------------------------------------


def test_the_floor_of_a_gpu_by_hand(load) -> None:
    cases, floor, timing = load("common.cases"), load("common.floor"), load("common.timing")
    batch = cases.synthetic(2, 4, 1000, "bfloat16", 0.5)
    logits = torch.empty(2, 4, 1000, dtype=torch.bfloat16)
    made = floor.CopyFloor(batch, torch.empty_like(logits), logits)
    # 32000 bytes in 2 ms. 4 of 8 rows are scored: 8000 bytes to read; 8000 again, 16000 to write.
    found = made.describe({"copy": {"all": timing.Times.of([2.0])}})
    assert (found["forward_ms"], found["forward_backward_ms"]) == (0.5, 2.0)
    assert found["copy"] == pytest.approx(0.016)


def test_a_softcap_is_part_of_the_truth(load) -> None:
    logits, measure = load("logits"), load("common.measure")
    batch = load("common.cases").synthetic(2, 12, 50, "float32", 0.5)
    problem, plain = logits.LogitsProblem(batch, softcap=5.0), logits.LogitsProblem(batch)
    for candidate in problem.candidates:
        assert measure.verify(problem, candidate)["status"] == "right"
        assert "value, gradient" in measure.verify(plain, candidate)["reason"]


def measure_on_cpu(load, output: Path, *arguments: str | Path) -> list[dict]:
    """Runs bench.gpu.measure on tiny cases, and returns its records."""
    options = ("--device", "cpu", "--quick", "--rounds", "2", "--record", output)
    assert load("gpu.measure").main([str(each) for each in (*arguments, *options)]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_the_gpus_program_measures_and_records(load, tmp_path: Path, capsys) -> None:
    names = ["simpo_ext", "F.cross_entropy", "Liger cross entropy"]
    *plain, capped = measure_on_cpu(load, tmp_path / "out", "logits", "--candidates", *names)
    assert [case["share"] for case in plain] == ["100%", "40%"]
    assert capped["name"].endswith("softcap 30")
    assert [row["name"] for row in capped["rows"]] == ["simpo_ext"]
    printed = capsys.readouterr().out
    assert "no measurement of a GPU" in printed and "Liger cross entropy: unavailable" in printed
    for case in (*plain, capped):
        assert (case["kind"], case["device"]) == ("logits", "cpu")
        for row in case["rows"]:
            assert row["status"] == ("unavailable" if "Liger" in row["name"] else "right")
            for phase in ("forward", "forward_backward") if row["status"] == "right" else ():
                ratio = row[phase]["median_ms"] / case["floor"][f"{phase}_ms"]
                assert row[phase]["x_floor"] == pytest.approx(ratio)
    one = ("--cases", "40%", "--candidates", "simpo_ext")
    (case,) = measure_on_cpu(load, tmp_path / "one", "logits", *one)
    assert case["share"] == "40%"


def test_the_gpus_program_fails_where_ours_is_wrong(load, monkeypatch: pytest.MonkeyPatch) -> None:
    peers, program = load("common.peers"), load("gpu.measure")
    monkeypatch.setattr(peers, "pair_loss", lambda averages: averages.sum() * torch.nan)
    arguments = ["logits", "--device", "cpu", "--quick", "--cases", "40%", "--candidates"]
    assert program.main([*arguments, "Princeton"]) == 0
    monkeypatch.setattr(peers.simpo_ext, "simpo_loss", lambda *_, **__: 1 / 0)
    assert program.main([*arguments, "simpo_ext"]) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--candidates", "nobody"), "nobody"), (("--cases", "none"), "none"),
     (("--rounds", "0"), "2")],
)  # fmt: skip
def test_the_gpus_program_refuses_what_makes_no_sense(load, arguments, said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        load("gpu.measure").main(["logits", "--device", "cpu", "--quick", *arguments])


@pytest.mark.emulation
def test_the_variants_of_the_kernels_are_right(load, tmp_path: Path) -> None:
    library = tmp_path / "sweep.so"
    flags = ("-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-I", EMULATION, "-I", CSRC)
    sources = (ROOT / "bench" / "cuda" / "sweep.cu", EMULATION / "emulator.cpp")
    compiled = run("c++", *flags, "-x", "c++", *sources, "-o", library)
    assert compiled.returncode == 0, compiled.stderr
    (case,) = measure_on_cpu(load, tmp_path / "out", "sweep", "--library", library)
    assert case["rows"][0]["name"] == "simpo_ext"
    assert len(case["rows"]) == 1 + 4 * 3
    assert {row["status"] for row in case["rows"]} == {"right"}
