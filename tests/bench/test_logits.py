"""The measuring programs: what they verify, count and write. Their times are not tested."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from support.paths import ROOT

BENCH = ROOT / "bench"
CPU = torch.device("cpu")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_the_byte_formula_by_hand(load) -> None:
    workload = load("workload")
    # 3 of 8 rows of 10 logits of 2 bytes: 60 bytes read; read again, and 8 * 20 bytes written.
    moved = workload.fewest_bytes(workload.Size(8, 10), valid_rows=3, element_size=2)
    assert (moved.forward, moved.backward) == (60, 220)


def test_a_workload_has_the_share_of_scored_rows_it_says(load) -> None:
    workload = load("workload")
    batch = workload.make_workload(workload.Size(80, 33), 0.4, CPU)
    scored = batch.labels != workload.IGNORE_INDEX
    assert batch.valid_rows == scored.sum() == 32
    assert scored.sum(1).unique().tolist() == [4]


@pytest.mark.parametrize("text", ["8", "8x", "x8", "9x10", "0x10", "8x0", "-8x10"])
def test_a_size_that_is_none_is_refused(load, text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        load("workload").Size.parse(text)


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
    bench, timing = load("gpu.logits"), load("timing")
    size = load("workload").Size(16, 100)
    ignoring = load("peers").our_token_logps(softcap=None)
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
    peers, bench, timing = load("peers"), load("gpu.logits"), load("timing")
    size = load("workload").Size(16, 100)
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


def test_a_package_that_is_broken_makes_its_candidate_unavailable(load) -> None:
    peers = load("peers")

    def broken():
        raise AttributeError("no such thing")

    candidate = peers.Candidate("broken", "token_logps", broken)
    assert candidate.available(CPU) == (False, "AttributeError: no such thing")


def test_phases_get_what_the_one_before_returned_and_subjects_take_turns(load) -> None:
    timing = load("timing")
    calls: list[str] = []

    def subject(name: str):
        def phase(what: str):
            def call(carry: str) -> str:
                calls.append(f"{carry}{what}")
                return calls[-1]

            return call

        return timing.Subject(lambda: name, {"first": phase("1"), "second": phase("2")})

    times = timing.interleaved({"a": subject("a"), "b": subject("b")}, timing.CpuClock(), rounds=3)
    assert calls == ["a1", "a12", "b1", "b12"] * (3 + timing.WARMUP_ROUNDS)
    assert times["b"]["second"].rounds == 3


# ---- the loss from logits, beside its floor --------------------------------------------------


def test_the_floor_by_hand(load) -> None:
    floor = load("floor")
    rates = floor.Rates(read=10.0, copy=20.0, update=40.0, exp_float32=4.0, exp_bfloat16=2.0)
    # 1000 rows of 1e6 logits: 4 GB of float32 to read, 8 to move, and 1e9 exponentials.
    made = floor.make_floor(rates, 1000, 1_000_000, 4)
    assert made.forward_ms == pytest.approx(400.0)  # 4 GB at 10
    assert made.forward_backward_ms == pytest.approx(400.0 + 400.0)  # 8 GB at 20
    assert made.forward_backward_inplace_ms == pytest.approx(
        400.0 + 250.0
    )  # exp: 8 GB at 40 is less
    # bfloat16: 2 GB at 10 are less than 1e9 exponentials at 2, in every phase.
    made = floor.make_floor(rates, 1000, 1_000_000, 2)
    assert made.forward_ms == pytest.approx(500.0)
    assert made.forward_backward_ms == made.forward_backward_inplace_ms == pytest.approx(1000.0)


def test_the_probes_run_and_their_exponentials_are_right(load) -> None:
    probes = load("floor").Probes(threads=1, buffer_bytes=2**22)
    try:
        assert all(rate > 0 for rate in probes.sample().values())
        assert set(probes.canaries()) == {"clock", "bandwidth"}
    finally:
        probes.close()


def gated(load, readings: list[float], laps: list[float], rounds: int = 1, patience: float = 9.0):
    """Times of one subject beside canaries that read as told; the first reading calibrates."""
    gate_module = load("gate")
    canaries, times = iter(readings), iter(laps)
    gate = gate_module.Gate(
        lambda: {"clock": next(canaries)},
        calibration_samples=1,
        sleep=lambda seconds: None,
        clock=lambda: 0.0,
    )
    gate.allow(patience)
    turn = gate_module.Turn(lambda: None, lambda: None, lambda: next(times), rounds)
    found = gate_module.take_turns({"it": turn}, gate)["it"]
    return gate, found


def test_a_disturbed_sample_is_dropped_and_taken_again(load) -> None:
    # Quiet before, slow after: dropped. Then one with quiet canaries on both sides.
    gate, found = gated(load, [1.0, 1.0, 0.8, 0.99, 0.9], [50.0, 10.0])
    assert (found.median_ms, found.rounds, found.dropped) == (10.0, 1, 1)
    assert not found.disturbed
    assert (gate.kept, gate.dropped) == (1, 1)


def test_a_sample_waits_until_the_machine_is_quiet(load) -> None:
    gate, found = gated(load, [1.0, 0.5, 0.5, 0.5, 1.0, 1.0], [10.0])
    assert (found.median_ms, found.dropped, gate.kept) == (10.0, 0, 1)


def test_where_no_sample_is_clean_all_of_them_count_and_it_is_said(load) -> None:
    _, found = gated(load, [1.0] + [0.5] * 6, [30.0, 10.0, 20.0], rounds=3, patience=0.0)
    assert (found.median_ms, found.rounds, found.dropped) == (20.0, 3, 3)
    assert found.disturbed


def test_slow_subjects_skip_rounds_evenly_and_every_turn_begins_warm(load) -> None:
    gate_module = load("gate")
    gate = gate_module.Gate(lambda: {"clock": 1.0}, calibration_samples=1, sleep=lambda s: None)
    order: list[str] = []

    def turn(name: str, samples: int):
        return gate_module.Turn(
            lambda: order.append(name.upper()), lambda: order.append(name), lambda: 1.0, samples
        )

    times = gate_module.take_turns({"f": turn("f", 7), "s": turn("s", 4)}, gate)
    assert "".join(order) == "FffFffSssFffFfSss"
    assert (times["f"].rounds, times["s"].rounds) == (7, 4)


def test_the_real_batch_is_one(load) -> None:
    cases = load("cases")
    batch = cases.real()
    assert (batch.batch, batch.vocabulary, batch.time) == (16, 32000, max(batch.ends))
    assert batch.valid_fraction == pytest.approx(0.19, abs=0.01)
    assert batch.prompts[:8] == batch.prompts[8:]  # chosen and rejected answer the same prompt
    lengths = json.loads((BENCH / "data" / "preference_lengths.json").read_text())
    ends = [end - prompt for prompt, end in zip(batch.prompts, batch.ends, strict=True)]
    drawn = [list(pair) for pair in zip(batch.prompts[:8], ends[:8], ends[8:], strict=True)]
    assert all(pair in lengths for pair in drawn)


def test_completions_are_contiguous_and_counted_with_the_shift(load) -> None:
    cases = load("cases")
    for batch in (
        cases.synthetic(3, 20, 11, "float32", 0.4),
        cases.synthetic(3, 20, 11, "float32"),
        cases.real(pairs=2, vocabulary=11, shrink=8),
    ):
        labels = cases.masked(cases.make_labels(batch), batch.prompts, batch.ends)
        scored = labels != cases.IGNORE_INDEX
        assert scored[:, 1:].sum() == batch.valid_rows
        assert ((scored[:, 1:] & ~scored[:, :-1]).sum(1) <= 1).all()  # begins once at most
    assert cases.synthetic(3, 20, 11, "float32", 0.4).valid_rows == 3 * 8
    assert cases.synthetic(3, 20, 11, "float32").valid_rows == 3 * 19  # nothing scores the first


@pytest.mark.parametrize("sequences", [1, 4])  # a mean over sequences; SimPO's loss of pairs
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_form_of_the_loss_is_right(load, sequences: int, dtype: str) -> None:
    cases, trainers = load("cases"), load("trainers")
    batch = cases.synthetic(sequences, 24, 130, dtype)
    laps = load("laps").Laps(batch)
    for fraction in (1.0, 0.4):
        laps.set_mask(cases.with_fraction(batch, fraction))
        for candidate in trainers.loss_candidates():
            if candidate.kind == "compile" or not candidate.available(CPU)[0]:
                continue
            result = laps.check(candidate)
            assert result["status"] == "right", (candidate.name, result)
            laps.prepare(candidate)
            assert laps.run(candidate, "forward_backward") > 0


@pytest.mark.parametrize(
    ("fault", "key"),
    [("loss", "value_error"), ("gradient", "gradient_error"), ("masked rows", "gradient_error"),
     ("nan", "gradient_error")],
)  # fmt: skip
def test_a_wrong_loss_is_refused_before_it_is_timed(load, fault: str, key: str) -> None:
    cases, trainers = load("cases"), load("trainers")

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
        logps = trainers.get_batch_logps(Gradient.apply(logits), labels)
        loss = trainers._loss(lambda *_: logps)(logits, labels)
        return loss * (1 + 1e-4) if fault == "loss" else loss

    batch = cases.synthetic(2, 12, 50, "float32", 0.5)
    candidate = trainers.LossCandidate(fault, trainers.WORK, lambda: forward)
    result = load("laps").Laps(batch).check(candidate)
    assert result["status"] == "wrong"
    assert not float(result[key]) <= result[key.replace("error", "tolerance")]
    json.dumps(result, allow_nan=False)


def test_ratios_and_shares_of_the_floor_follow_from_medians(load) -> None:
    def row(kind: str, name: str, milliseconds: float) -> dict:
        times = {"median_ms": milliseconds, "disturbed": False}
        return {"name": name, "kind": kind, "is_best": True, "level": "", "status": "right",
                "forward": dict(times), "forward_backward": dict(times)}  # fmt: skip

    def case(share: str, ours: float, compiled: float) -> dict:
        rows = [row("ours", "simpo_ext", ours), row("compile", "torch.compile", compiled)]
        rows[0]["memory"] = {"forward_mib": 0.5, "forward_backward_mib": 90.0}
        return {"name": "n", "share": share, "pages": "default", "dtype": "float32", "batch": 2,
                "vocabulary": 1000, "valid_rows": 1000, "element_size": 4, "logits_bytes": 2**22,
                "rows": rows}  # fmt: skip

    cases = [case("100%", 2.0, 8.0), case("40%", 1.0, 2.5)]
    rates = load("floor").Rates(4.0, 8.0, 8.0, 100.0, 100.0)  # 4 MB: 1 ms forward
    for each in cases:
        load("logits_report").add_derived(each, rates)
    assert cases[0]["rows"][0]["forward"]["percent_of_floor"] == pytest.approx(50.0)
    assert cases[0]["rows"][1]["forward"]["x_ours"] == pytest.approx(4.0)


def test_a_worker_that_dies_says_why(load) -> None:
    workers = load("workers")
    worker = workers.Worker({})
    with pytest.raises(workers.WorkerError, match=r"status 1: AttributeError.*nonsense"):
        worker.ask("nonsense")
    assert not worker.is_running
    worker.close()


@pytest.mark.exhaustive
def test_the_quick_run_goes_all_the_way(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    program = (sys.executable, "-m", "bench", "logits")
    result = run(*program, "--quick", "--output", output)
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads(output.read_text())
    assert results["kind"] == "quick"
    assert {case["pages"] for case in results["cases"]} == {"default", "huge"}
    names = {row["name"] for case in results["cases"] for row in case["rows"]}
    assert names >= {"simpo_ext", "simpo_ext in place", "Princeton", "Princeton float32",
                     "F.cross_entropy", "torch.compile", "TRL selective_log_softmax"}  # fmt: skip
    for case in results["cases"]:
        for row in case["rows"]:
            if row["status"] == "unavailable":
                assert row["name"].startswith("TRL")
                assert row["reason"]
                continue
            assert row["status"] == "right"
            assert row["value_error"] <= row["value_tolerance"]
            for phase in ("forward", "forward_backward"):
                assert 0 < row[phase]["min_ms"] <= row[phase]["median_ms"]
                assert row[phase]["x_ours"] > 0
    assert any("memory" in row for case in results["cases"] for row in case["rows"])
    assert results["overhead"]["ratio"] > 0
    assert output.with_suffix(".png").stat().st_size > 10_000

    readme = run(*program, "--readme", output)
    assert readme.returncode == 0, readme.stderr
    assert "| **simpo_ext** |" in readme.stdout


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), ([], 0), (["nonsense"], 2)])
def test_the_program_lists_its_commands(
    load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments, status
) -> None:
    main = load("__main__")
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    assert main.main() == status
    printed = "".join(capsys.readouterr())
    assert all(f"  {name} " in printed for name in main.COMMANDS)


def test_every_command_is_a_module(load) -> None:
    for module, _ in load("__main__").COMMANDS.values():
        assert importlib.util.find_spec(module) is not None
