"""The GPU run of bench/gpu.sh: results are kept, however its steps end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.paths import ROOT

SCRIPT = ROOT / "bench" / "gpu.sh"


@pytest.fixture
def run(load, tmp_path: Path):
    """A run that is limited to a minute, in a folder of its own."""
    for name in ("output", "work"):
        (tmp_path / name).mkdir()
    deadline = time.monotonic() + 60.0
    return load("gpu.runner").Run(
        tmp_path / "output", tmp_path / "work", is_dry=True, deadline=deadline
    )


@pytest.fixture
def perform(load, run):
    """Runs a function as a step, and returns its record."""
    runner, records = load("gpu.runner"), load("records")

    def perform(function, budget: float = 30.0) -> dict[str, Any]:
        runner.perform(runner.Step("a step", budget, function), run)
        return records.read(run.output / runner.STEPS)[-1]

    return perform


def python(run, text: str) -> str:
    return run.program(sys.executable, "-c", text)


def test_a_step_that_works_is_recorded(perform) -> None:
    record = perform(lambda run: python(run, "print(1)"))
    assert (record["status"], record["reason"]) == ("ok", "")


def test_a_failure_is_recorded_with_the_end_of_the_output(perform, run) -> None:
    record = perform(lambda run: python(run, "print('before'); raise ValueError('of mine')"))
    assert record["status"] == "failed"
    assert "exit status 1" in record["reason"] and "ValueError: of mine" in record["reason"]
    assert "before" in (run.output / "log.txt").read_text()


def test_a_bug_in_a_step_is_recorded_as_its_failure(perform) -> None:
    record = perform(lambda run: [][0])
    assert (record["status"], record["reason"]) == ("failed", "IndexError: list index out of range")


def test_a_program_that_is_not_there_is_recorded(perform) -> None:
    assert "no-such-program" in perform(lambda run: run.program("no-such-program"))["reason"]
    record = perform(lambda run: run.find_tool("no-such-program"))
    assert (record["status"], record["reason"]) == ("skipped", "there is no no-such-program")


def test_out_of_time_the_program_and_its_children_are_killed(perform, tmp_path: Path) -> None:
    file = tmp_path / "child"
    text = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(file)!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    record = perform(lambda run: python(run, text), budget=2.0)
    assert (record["status"], record["reason"]) == ("failed", "out of time")
    assert record["seconds"] < 10.0
    child = int(file.read_text())
    for _ in range(100):  # until the child's new parent has reaped it
        status = Path(f"/proc/{child}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child still runs")


def test_without_time_left_a_step_does_not_start(perform, run) -> None:
    run.deadline = time.monotonic()
    assert perform(lambda run: python(run, "print(1)"))["reason"] == "no time left"


def test_a_run_that_is_ended_keeps_what_it_has(load, tmp_path: Path) -> None:
    program = f"""
import sys, time
from bench import records
from bench.gpu import __main__ as program, runner, steps
def first(run):
    run.program(sys.executable, "-c", "print('done')")
def second(run):
    records.append(run.cases, {{"kind": "memcheck", "name": "a case", "status": "right"}})
    print("sleeping", flush=True)
    run.program(sys.executable, "-c", "import time; time.sleep(60)")
steps.all_steps = lambda carried: [
    runner.Step("first", 30, first), runner.Step("second", 30, second),
]
sys.exit(program.main(["--output", {str(tmp_path / "output")!r}]))
"""
    command = [sys.executable, "-c", program]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, cwd=ROOT, **pipes) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "sleeping\n":
                break
        process.send_signal(signal.SIGTERM)
    assert process.returncode != 0
    text = load("gpu.report").write(tmp_path / "output")
    steps = load("records").read(tmp_path / "output" / "steps.jsonl")
    assert [(step["step"], step["status"]) for step in steps] == [
        ("first", "ok"),
        ("second", "failed"),
    ]
    assert steps[1]["reason"] == "interrupted"
    assert "memcheck: 1 right" in text


def test_a_report_that_cannot_be_made_does_not_end_the_run(
    load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, runner, records = load("gpu.__main__"), load("gpu.runner"), load("records")
    strange = {"kind": "logits"}
    steps = [
        runner.Step("first", 30, lambda run: records.append(run.cases, strange)),
        runner.Step("second", 30, lambda run: None),
    ]
    monkeypatch.setattr(load("gpu.steps"), "all_steps", lambda carried: steps)
    assert program.main(["--output", str(tmp_path)]) == 0
    assert "KeyError" in capsys.readouterr().out
    assert [step["step"] for step in records.read(tmp_path / "steps.jsonl")] == ["first", "second"]


# ---- records and the report ------------------------------------------------------------------


def test_what_is_not_json_is_left_out(load, tmp_path: Path) -> None:
    records = load("records")
    file = tmp_path / "cases.jsonl"
    records.append(file, {"kind": "test", "name": "a"})
    with file.open("a") as half:
        half.write('nonsense\n{"kind": "te')
    assert records.read(file) == [{"kind": "test", "name": "a"}]
    assert records.read(tmp_path / "missing.jsonl") == []


def test_the_report_of_an_empty_folder_is_one(load, tmp_path: Path) -> None:
    assert "step" in load("gpu.report").write(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == {"steps": [], "cases": []}


def test_the_report_says_what_failed(load, tmp_path: Path) -> None:
    cases = [
        {"kind": "first light", "name": "a", "dtype": "float32", "status": "right", "checks": {}},
        {"kind": "first light", "name": "b", "dtype": "float16", "status": "wrong",
         "checks": {"logps": [1e-9, 1e-6], "dlogits": [0.5, 1e-3], "dweight": ["nan", 1e-3]}},
        {"kind": "gpu tests", "name": "t.py::t", "status": "failed", "reason": "x\nE   assert 0"},
        {"kind": "ncu", "kernel": "token_logps_kernel<float>", "metrics": {"DRAM %": 91.25}},
    ]  # fmt: skip
    steps = [{"step": "a step", "status": "failed", "reason": "out of time", "seconds": 1.0,
              "budget": 2}]  # fmt: skip
    for name, found in (("cases.jsonl", cases), ("steps.jsonl", steps)):
        (tmp_path / name).write_text("".join(json.dumps(each) + "\n" for each in found))
    text = load("gpu.report").write(tmp_path)
    assert "first light: 1 right, 1 wrong" in text
    assert "  b float16: wrong dlogits 0.5 > 0.001 dweight nan > 0.001" in text
    assert "  t.py::t: failed E   assert 0" in text
    assert "91.2" in text
    assert "  a step: out of time" in text
    assert json.loads((tmp_path / "report.json").read_text()) == {"steps": steps, "cases": cases}


def test_each_test_is_recorded_when_it_has_ended(load, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("""
import os, pytest
def test_right(): pass
def test_wrong(): assert 1 == 2
@pytest.fixture
def broken(): raise ValueError("in a fixture")
def test_of_a_broken_fixture(broken): pass
@pytest.mark.skip
def test_skipped(): pass
def test_that_ends_the_process(): os._exit(3)
""")
    (tmp_path / "test_import.py").write_text("import no_such_module")
    file = tmp_path / "cases.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.pytest_record"]
    command += ["--record", file, "--record-kind", "tests", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "-c", os.devnull, tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=False, env=environment, cwd=tmp_path, capture_output=True)
    found = load("records").read(file)
    outcomes = {each["name"].rpartition("/")[2]: each["status"] for each in found}
    assert outcomes == {
        "test_import.py": "failed",
        "test_it.py::test_right": "passed",
        "test_it.py::test_wrong": "failed",
        "test_it.py::test_of_a_broken_fixture": "failed",
        "test_it.py::test_skipped": "skipped",
    }
    assert "no_such_module" in found[0]["reason"]


def test_what_ncu_prints_is_read(load) -> None:
    ncu = load("gpu.ncu")
    time_name, dram, issue, special = ncu.METRICS
    header = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    kernel = "void simpo_ext::cuda::{}<simpo_ext::BFloat16, (int)512, (bool)0>(simpo_ext::Args)"
    forward, backward = kernel.format("token_logps_kernel"), kernel.format("backward_kernel")
    output = f"==PROF== Connected\n{header}" + "".join(
        f'"{i}","7","{name}","{metric}","{unit}","{value}"\n'
        for i, name, metric, unit, value in [
            (0, forward, dram, "%", "91.25"),
            (0, forward, time_name, "ns", "1,020,000"),
            (0, forward, special, "%", "n/a"),
            (1, backward, dram, "%", "90.5"),
            (1, backward, issue, "%", "31"),
            (1, backward, time_name, "us", "2000"),
        ]
    )
    assert ncu.parse(output) == [
        {"kernel": "token_logps_kernel<BFloat16, (int)512, (bool)0>",
         "metrics": {"DRAM %": 91.25, "ms": 1.02}},
        {"kernel": "backward_kernel<BFloat16, (int)512, (bool)0>",
         "metrics": {"DRAM %": 90.5, "issue slots %": 31.0, "ms": 2.0}},
    ]  # fmt: skip
    assert ncu.parse("==ERROR== no counters\n") == []


# ---- the steps and the script ----------------------------------------------------------------


def test_the_budgets_are_those_of_two_short_turns(load) -> None:
    steps = load("gpu.steps").all_steps(Path("nowhere"))
    assert sum(step.budget for step in steps[:5]) == 200
    assert sum(step.budget for step in steps) == 480


def test_the_files_of_marked_tests_are_found(load) -> None:
    steps = load("gpu.steps")
    assert ROOT / "tests" / "cuda" / "test_tensors.py" in steps._test_files("gpu")
    assert ROOT / "tests" / "loss" / "test_token_logps.py" in steps._test_files("kernels")
    assert not any(path.name == "test_trl.py" for path in steps._test_files("kernels"))


def test_without_a_wheel_for_this_python_the_install_says_so(load, perform, tmp_path: Path) -> None:
    (tmp_path / "simpo_ext-0.1.0-cp27-cp27-linux_x86_64.whl").touch()
    record = perform(lambda run: load("gpu.steps").install(run, tmp_path))
    assert record["status"] == "failed"
    assert "expected a wheel" in record["reason"] and "cp27" in record["reason"]


def test_the_script_is_bash_and_says_how_it_is_used(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None

    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [bash, SCRIPT, *arguments]
        environment = {**os.environ, "PYTHON": sys.executable}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    assert "--dry-run" in call("--help").stdout
    assert call("--nonsense").returncode == 2
    assert "--output" in call().stderr
    assert call("--output", tmp_path, "--steps", "nothing").returncode == 2
    assert call("--report", tmp_path).returncode == 0
