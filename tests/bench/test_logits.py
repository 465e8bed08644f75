"""The benchmarks from logits: what they verify, count and write. Their times are not tested."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from support.paths import ROOT

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
                assert row["name"] == TRL and row["reason"]
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


def test_the_byte_formula_by_hand(load) -> None:
    workload = load("common.workload")
    # 3 of 8 rows of 10 logits of 2 bytes: 60 bytes read; read again, and 8 * 20 bytes written.
    moved = workload.fewest_bytes(workload.Size(8, 10), valid_rows=3, element_size=2)
    assert (moved.forward, moved.backward) == (60, 220)


def test_a_workload_has_the_share_of_scored_rows_it_says(load) -> None:
    workload = load("common.workload")
    batch = workload.make_workload(workload.Size(80, 33), 0.4, CPU)
    scored = batch.labels != load("common.cases").IGNORE_INDEX
    assert batch.valid_rows == scored.sum() == 32
    assert scored.sum(1).unique().tolist() == [4]


@pytest.mark.parametrize("text", ["8", "8x", "x8", "9x10", "0x10", "8x0", "-8x10"])
def test_a_size_that_is_none_is_refused(load, text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        load("common.workload").Size.parse(text)


def test_the_program_verifies_times_and_writes(tmp_path: Path) -> None:
    output = tmp_path / "cases.jsonl"
    names = ("simpo_ext", "simpo_ext in place", "eager float32", "F.cross_entropy",
             "simpo_ext loss", "simpo_ext loss in place", "quack cross_entropy")  # fmt: skip
    arguments = ("--device", "cpu", "--sizes", "16x257", "--rounds", "2", "--record", output)
    program = (sys.executable, "-m", "bench.gpu.logits")
    result = run(*program, *arguments, "--capped", "16x257", "--candidates", *names)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no measurement of a GPU" in result.stdout
    *batches, capped = map(json.loads, output.read_text().splitlines())
    assert [batch["valid_rows"] for batch in batches] == [16, 8]
    assert capped["softcap"] > 0
    assert [each["status"] for each in capped["candidates"]] == ["right", "right"]
    for batch in batches:
        assert (batch["kind"], batch["device"]) == ("logits", "cpu")
        assert batch["copy"]["gb_per_s"] > 0
        *right, absent = batch["candidates"]
        assert tuple(candidate["name"] for candidate in batch["candidates"]) == names
        assert absent["status"] == "unavailable"
        assert "CUDA" in absent["reason"]
        for candidate in right:
            assert candidate["status"] == "right"
            assert 0 <= candidate["value_error"] <= candidate["value_tolerance"] < 0.01
            assert 0 < candidate["gradient_error"] <= candidate["gradient_tolerance"] < 0.02
            for phase in ("forward", "backward"):
                times = candidate[phase]
                assert 0 < times["min_ms"] <= times["median_ms"] <= times["max_ms"]
                moved = batch[f"{phase}_bytes"] / times["median_ms"] / 1e6
                assert times["gb_per_s"] == pytest.approx(moved)
                percent = 100 * moved / batch["copy"]["gb_per_s"]
                assert times["percent_of_copy"] == pytest.approx(percent)


def test_the_program_refuses_a_candidate_it_does_not_know() -> None:
    program = (sys.executable, "-m", "bench.gpu.logits")
    result = run(*program, "--device", "cpu", "--candidates", "nobody")
    assert result.returncode == 2
    assert "nobody" in result.stderr


def planted(peers: ModuleType, fault: str) -> object:
    """The eager formula with something wrong."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logps):
            return logps.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.02

    def forward(logits, labels):
        if fault == "raises":
            raise RuntimeError("out of luck")
        logps = peers.eager_token_logps(logits, labels)
        if fault == "gradient":
            return Wrong.apply(logps)
        if fault == "gradient of masked rows":
            masked = labels == peers.IGNORE_INDEX
            return (
                logps
                + (logits.float().sum(-1) * 1e-6 * masked) * 0.0
                + torch.where(masked, logits[..., 0].float() - logits[..., 0].detach().float(), 0.0)
            )
        if fault == "nan":
            return logps * torch.nan
        return logps * 1.0001

    return peers.Candidate(fault, "token_logps", lambda: forward)


def test_a_softcap_that_a_candidate_ignores_is_found(load) -> None:
    bench, timing = load("gpu.logits"), load("common.timing")
    size = load("common.workload").Size(16, 100)
    ignoring = load("common.peers").our_token_logps(softcap=None)
    batch = bench.measure(size, 1.0, ignoring, timing.CpuClock(), CPU, 1, softcap=5.0)
    assert [each["status"] for each in batch["candidates"]] == ["wrong", "wrong"]


@pytest.mark.parametrize(
    ("fault", "status", "at_least"),
    [
        ("values", "wrong", ("value_error", 9e-5)),
        ("gradient", "wrong", ("gradient_error", 0.01)),
        ("gradient of masked rows", "wrong", ("gradient_error", torch.inf)),
        ("nan", "wrong", ("value_error", torch.nan)),
        ("raises", "failed", None),
    ],
)
def test_a_planted_fault_is_reported_and_not_timed(load, fault: str, status: str, at_least) -> None:
    peers, bench, timing = load("common.peers"), load("gpu.logits"), load("common.timing")
    size = load("common.workload").Size(16, 100)
    right = peers.Candidate("eager", "token_logps", lambda: peers.eager_token_logps)
    batch = bench.measure(size, 0.5, [planted(peers, fault), right], timing.CpuClock(), CPU, 1)
    found, beside = batch["candidates"]
    assert found["status"] == status
    assert "forward" not in found
    assert "backward" not in found
    assert beside["status"] == "right"
    assert "forward" in beside
    if at_least is None:
        assert found["reason"] == "RuntimeError: out of luck"
    else:
        key, bound = at_least
        if bound < torch.inf:
            assert found[key] >= bound
        else:
            assert found[key] == str(bound)
    json.dumps(batch, allow_nan=False)
    assert f"  {fault}: {status}" in "\n".join(load("gpu.report").logits_lines(batch))
