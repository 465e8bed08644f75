"""The measuring programs: what they verify, count and write. Their times are not tested."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
CPU = torch.device("cpu")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of bench/, which is a folder of programs and no package."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCH)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        if str(BENCH) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


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
    output = tmp_path / "out.json"
    names = ("simpo_ext", "simpo_ext in place", "eager float32", "F.cross_entropy",
             "simpo_ext loss", "simpo_ext loss in place", "quack cross_entropy")  # fmt: skip
    arguments = ("--device", "cpu", "--sizes", "16x257", "--rounds", "2", "--json", output)
    result = run(sys.executable, BENCH / "bench_token_logps.py", *arguments, "--candidates", *names)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no measurement of a GPU" in result.stdout
    measurements = json.loads(output.read_text())
    assert measurements["device"] == "cpu"
    assert [batch["valid_rows"] for batch in measurements["runs"]] == [16, 8]
    for batch in measurements["runs"]:
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
    program = BENCH / "bench_token_logps.py"
    result = run(sys.executable, program, "--device", "cpu", "--candidates", "nobody")
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
def test_a_planted_fault_is_reported_and_not_timed(
    load, capsys: pytest.CaptureFixture[str], fault: str, status: str, at_least
) -> None:
    peers, bench, timing = load("peers"), load("bench_token_logps"), load("timing")
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
    load("report").print_run(batch, "cpu")
    assert f"{fault}: {status}" in capsys.readouterr().out


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


def test_the_sanitizers_program_passes_on_the_cpu(load, capsys: pytest.CaptureFixture) -> None:
    assert load("sanitize").main(["--device", "cpu"]) == 0
    assert "24 of 24" in capsys.readouterr().out


def test_what_ncu_prints_is_read(load) -> None:
    dram = load("dram_throughput")
    header = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    forward, backward = (f"void simpo_ext::cuda::{kernel}<T, 512>(Args)" for kernel in dram.KERNELS)
    output = f"==PROF== Connected\n{header}" + "".join(
        f'"{i}","7","{kernel}","{metric}","{unit}","{value}"\n'
        for i, kernel, metric, unit, value in [
            (0, forward, dram.PERCENT, "%", "91.25"),
            (0, forward, dram.DURATION, "ns", "1,020,000"),
            (1, backward, dram.PERCENT, "%", "90.5"),
            (1, backward, dram.DURATION, "us", "2000"),
            (2, "void fill(T*)", dram.PERCENT, "%", "1"),
        ]
    )
    assert dram.parse_ncu(output) == [
        {"kernel": "token_logps_kernel", "dram_percent": 91.25, "milliseconds": 1.02},
        {"kernel": "token_logps_backward_kernel", "dram_percent": 90.5, "milliseconds": 2.0},
    ]
    assert dram.parse_ncu("==ERROR== no counters\n") == []


def test_the_report_merges_what_there_is(load, tmp_path: Path, capsys) -> None:
    report = load("report")
    step = {
        "name": "tests",
        "status": "failed",
        "reason": "exit status 1",
        "seconds": 3,
        "budget": 9,
    }
    (tmp_path / "steps.jsonl").write_text(json.dumps(step) + "\n")
    (tmp_path / "machine.json").write_text('{"gpu": "NVIDIA H200"}')
    (tmp_path / "sweep.jsonl").write_text(
        '{"kernel": "copy", "ms": 2, "gb_per_s": 4200}\n'
        '{"kernel": "forward", "threads": 512, "unroll": 4, "ms": 1, "percent_of_copy": 91.5}\n'
        '{"kernel": "forward", "threads": 1024, "unroll": 8, "error": "wrong"}\n'
        '{"kernel": "forw'
    )
    output = tmp_path / "results" / "out.json"
    assert report.main([str(tmp_path), "--output", str(output), "--dry-run"]) == 0
    results = json.loads(output.read_text())
    assert (results["dry_run"], results["ok"]) == (True, False)
    assert results["steps"] == [step]
    assert len(results["sweep"]) == 3
    assert results["measurements"] is results["dram"] is None
    printed = capsys.readouterr().out
    for expected in ("exit status 1", "512 x 4", "91.5", "wrong", "4200", "NVIDIA H200"):
        assert expected in printed


@pytest.mark.parametrize(
    ("dry_run", "measurements", "gpu", "is_kept"),
    [
        (False, {"runs": []}, "NVIDIA H200", True),
        (True, {"runs": []}, "NVIDIA H200", False),
        (False, None, "NVIDIA H200", False),
        (False, {"runs": []}, None, False),
    ],
)
def test_only_measurements_of_a_gpu_go_among_the_results(
    load, dry_run: bool, measurements, gpu, is_kept: bool
) -> None:
    report = load("report")
    path = report.default_output(
        {"dry_run": dry_run, "measurements": measurements, "machine": {"gpu": gpu}}
    )
    assert (path == BENCH / "results" / "gpu-nvidia-h200.json") == is_kept
    if not is_kept:
        assert BENCH not in path.parents
        path.unlink()


def test_the_script_is_bash_and_says_how_it_is_used() -> None:
    bash = shutil.which("bash")
    assert bash is not None
    script = BENCH / "gpu.sh"
    assert run(bash, "-n", script).returncode == 0
    assert "--dry-run" in run(bash, script, "--help").stdout
    assert run(bash, script, "--nonsense").returncode == 2
