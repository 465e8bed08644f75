"""What all benchmarks share: turns, ratios, verification, processes, memory, tables, commands."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from support.paths import ROOT

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- turns -----------------------------------------------------------------------------------


def stepping_clock(load, milliseconds: dict[str, float]):
    """A clock on which a subject's phases take what its preparation names.

    The first lap after those of warming up takes half of that.
    """
    timing, count = load("common.timing"), Counter()

    class Stepping(timing.CpuClock):
        def laps(self, subject) -> list[float]:
            name = carry = subject.prepare()
            for phase in subject.phases.values():
                carry = phase(carry)
            count[id(subject)] += 1
            share = 0.5 if count[id(subject)] == timing.WARMUP_ROUNDS + 1 else 1.0
            return [share * milliseconds[name]] * len(subject.phases)

    return Stepping()


def test_only_the_phases_are_timed(load, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = load("common.timing")
    now = [0.0]

    def take(seconds: float) -> None:
        now[0] += seconds

    class Result:
        def __del__(self) -> None:
            take(100.0)

    phases = {"first": lambda _: take(0.002) or Result(), "second": lambda _: take(0.003)}
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    single = timing.Subject(lambda: take(10.0), {"first": phases["first"]})
    assert timing.CpuClock().laps(single) == pytest.approx([2.0])
    both = timing.Subject(lambda: take(10.0), {**phases, "first": phases["second"]})
    assert timing.CpuClock().laps(both) == pytest.approx([3.0, 3.0])


def test_phases_get_what_the_one_before_returned_and_subjects_take_turns(load) -> None:
    timing = load("common.timing")
    calls: list[str] = []

    def subject(name: str):
        def phase(what: str):
            def call(carry: str) -> str:
                calls.append(f"{carry}{what}")
                return calls[-1]

            return call

        return timing.Subject(lambda: name, {"first": phase("1"), "second": phase("2")})

    subjects = {name: subject(name) for name in "abc"}
    times = timing.interleaved(subjects, timing.CpuClock(), rounds=6)
    laps = [first[0] for first, second in zip(calls[::2], calls[1::2], strict=True)
            if second == f"{first}2"]  # fmt: skip
    rounds = ["".join(laps[at : at + 3]) for at in range(0, len(laps), 3)]
    assert len(rounds) == 6 + timing.WARMUP_ROUNDS
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 1  # no subject always follows the same other one
    assert all(times[name]["second"].rounds == 6 for name in "abc")


def test_a_slow_subject_takes_part_in_fewer_rounds_spread_over_the_run(load) -> None:
    timing = load("common.timing")
    order: list[str] = []

    def subject(name: str):
        return timing.Subject(lambda: name, {"lap": lambda _: order.append(name)})

    clock = stepping_clock(load, {"fast": 1.0, "slow": 30.0, "endless": 900.0})
    subjects = {name: subject(name) for name in ("fast", "slow", "endless")}
    times = timing.interleaved(subjects, clock, rounds=8, budget_ms=120.0)
    assert [times[name]["lap"].rounds for name in subjects] == [8, 4, 1]
    assert order.count("endless") == 2  # it was warmed up once
    timed = order[5:]  # after the rounds of warming up
    first, second = timed[: len(timed) // 2], timed[len(timed) // 2 :]
    assert first.count("slow") == second.count("slow") == 2


def test_a_median_far_above_the_fastest_sample_is_marked(load) -> None:
    times = load("common.timing").Times
    assert times.of([3.0, 1.0, 2.0]) == times(2.0, 1.0, 3.0, 3)
    assert times.of([3.0, 1.0, 2.0]).is_disturbed
    assert not times.of([1.0, 1.1, 9.0]).is_disturbed


# ---- verification, times and ratios ----------------------------------------------------------


def problem_of(load, functions: dict[str, object], milliseconds: dict[str, float]):
    """A problem whose truth is 1.0 and whose laps take what they are told, and its clock."""
    measure, peers, timing = load("common.measure"), load("common.peers"), load("common.timing")
    cases, floor = load("common.cases"), load("common.floor")

    class Half(floor.Floor):
        def subjects(self):
            return {"floor": timing.Subject(lambda: "floor", {"all": lambda _: None})}

        def describe(self, times):
            assert times["floor"]["all"].rounds == 3  # in the same rounds
            return {"forward_ms": 0.5, "forward_backward_ms": 2.0,
                    "forward_backward_in_place_ms": 1.0}  # fmt: skip

    class Told(measure.Problem):
        baseline = "simpo_ext"
        batch = cases.synthetic(2, 8, 16, "float32")

        def __init__(self) -> None:
            self.candidates = [
                peers.Candidate(name, "work", lambda each=each: each,
                                is_ours=name == "simpo_ext", is_inplace=name == "in place")
                for name, each in functions.items()
            ]  # fmt: skip

        def errors(self, candidate):
            return {"value": (abs(candidate.forward() - 1.0), 0.1)}

        def prepare(self, candidate):
            return candidate.name

        def lap(self, candidate, phase, prepared):
            timed.append(candidate.name)

        def make_floor(self):
            return Half()

    timed: list[str] = []
    return Told(), stepping_clock(load, {"floor": 1.0, **milliseconds}), timed


def test_ratios_follow_from_medians_of_one_run(load) -> None:
    functions = dict.fromkeys(("simpo_ext", "peer", "in place"), lambda: 1.0)
    times = {"simpo_ext": 2.0, "peer": 8.0, "in place": 4.0}
    problem, clock, _ = problem_of(load, functions, times)
    found = load("common.measure").measure(problem, problem.candidates, clock, 3)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["peer"]["forward"] == {
        "median_ms": 8.0, "min_ms": 4.0, "max_ms": 8.0, "rounds": 3, "disturbed": True,
        "x_baseline": 4.0, "x_floor": 16.0,
    }  # fmt: skip
    assert rows["peer"]["forward_backward"]["x_floor"] == 4.0
    assert rows["in place"]["forward_backward"]["x_floor"] == 4.0  # of 1.0 ms
    assert rows["simpo_ext"]["kind"] == "ours" and rows["peer"]["kind"] == "peer"
    assert found["floor"]["forward_ms"] == 0.5


def test_what_is_wrong_fails_or_is_missing_is_reported_and_not_timed(load) -> None:
    peers, measure = load("common.peers"), load("common.measure")

    def unlucky():
        raise RuntimeError("out of luck\nand more")

    def broken():
        raise AttributeError("no such thing")

    functions = {"simpo_ext": lambda: 1.0, "wrong": lambda: 1.2, "nan": lambda: torch.nan,
                 "fails": unlucky}  # fmt: skip
    problem, clock, timed = problem_of(load, functions, {"simpo_ext": 1.0})
    problem.candidates.append(peers.Candidate("broken", "work", broken))
    problem.candidates.append(peers.Candidate("gpu", "work", lambda: None, needs_cuda=True))
    rows = measure.measure(problem, problem.candidates, clock, 3)["rows"]
    assert set(timed) == {"simpo_ext"}
    assert [(row["name"], row["status"]) for row in rows] == [
        ("simpo_ext", "right"), ("wrong", "wrong"), ("nan", "wrong"), ("fails", "failed"),
        ("broken", "unavailable"), ("gpu", "unavailable"),
    ]  # fmt: skip
    reasons = {row["name"]: row["reason"] for row in rows}
    assert "value" in reasons["wrong"]
    assert reasons["fails"] == "RuntimeError: out of luck"
    assert reasons["broken"] == "AttributeError: no such thing"
    assert "CUDA" in reasons["gpu"]
    assert all("forward" not in row for row in rows[1:])
    json.dumps(rows, allow_nan=False)


# ---- batches and the floor -------------------------------------------------------------------


def test_the_real_batch_is_one(load) -> None:
    batch = load("common.cases").real()
    assert (batch.batch, batch.vocabulary, batch.time) == (16, 32000, max(batch.ends))
    assert batch.name == "real 16x1275x32000 bfloat16"
    assert batch.valid_fraction == pytest.approx(0.19, abs=0.01)
    assert batch.prompts[:8] == batch.prompts[8:]  # chosen and rejected answer the same prompt
    lengths = json.loads((ROOT / "bench" / "data" / "preference_lengths.json").read_text())
    ends = [end - prompt for prompt, end in zip(batch.prompts, batch.ends, strict=True)]
    drawn = [list(pair) for pair in zip(batch.prompts[:8], ends[:8], ends[8:], strict=True)]
    assert all(pair in lengths for pair in drawn)


def test_completions_are_contiguous_and_counted_with_the_shift(load) -> None:
    cases = load("common.cases")
    for batch in (
        cases.synthetic(3, 20, 11, "float32", 0.4),
        cases.synthetic(3, 20, 11, "float32"),
        cases.real(pairs=2, vocabulary=11, shrink=8),
    ):
        labels = cases.masked(cases.make_labels(batch), batch)
        scored = cases.following(labels) != cases.IGNORE_INDEX
        assert scored.sum() == batch.valid_rows
        assert ((scored[:, 1:] & ~scored[:, :-1]).sum(1) <= 1).all()  # begins once at most
    assert cases.synthetic(3, 20, 11, "float32", 0.4).valid_rows == 3 * 8
    assert cases.synthetic(3, 20, 11, "float32").valid_rows == 3 * 19  # nothing scores the first


def test_a_case_survives_json_and_counts_its_bytes(load) -> None:
    cases = load("common.cases")
    batch = cases.synthetic(2, 16, 300, "bfloat16", 0.5, hidden=32)
    case = cases.Case(batch, "huge", True, ("a",))
    assert cases.Case.from_json(json.loads(json.dumps(case.to_json()))) == case
    assert batch.name == "2x16x32x300 bfloat16"
    assert batch.logits_bytes == 2 * 16 * 300 * 2
    assert batch.gradient_bytes == (2 * 16 + 300) * 32 * 2
    assert batch.flops == 6 * 16 * 32 * 300


def test_the_floor_from_logits_by_hand(load) -> None:
    cases, floor = load("common.cases"), load("common.floor")
    rates = {"read": 5.0, "read_prefetch": 10.0, "copy": 20.0, "update": 40.0,
             "exp_float32": 4.0, "exp_bfloat16": 2.0}  # fmt: skip
    # 1000 rows of 1e6 logits: 4 GB of float32 to read, 8 to move, and 1e9 exponentials.
    made = floor.logits_floor(rates, cases.synthetic(1, 1001, 1_000_000, "float32"))
    assert made["forward_ms"] == pytest.approx(400.0)  # 4 GB at 10
    assert made["forward_backward_ms"] == pytest.approx(400.0 + 400.0)  # 8 GB at 20
    # 8 GB at 40 take less time than the exponentials
    assert made["forward_backward_in_place_ms"] == pytest.approx(400.0 + 250.0)
    # bfloat16: 2 GB at 10 take less than 1e9 exponentials at 2, in every phase.
    made = floor.logits_floor(rates, cases.synthetic(1, 1001, 1_000_000, "bfloat16"))
    assert made["forward_ms"] == pytest.approx(500.0)
    assert made["forward_backward_ms"] == pytest.approx(1000.0)


def test_logits_are_peaked_at_the_label_that_follows(load) -> None:
    cases = load("common.cases")
    batch = cases.synthetic(2, 16, 300, "float32")
    labels = cases.make_labels(batch)
    logits = cases.make_logits(batch, labels)
    of_label = logits[:, :-1].gather(2, labels[:, 1:].unsqueeze(2))
    assert of_label.mean() > logits.mean() + 2 * cases.NOISE


def test_the_probes_count_what_every_thread_moves(load, monkeypatch: pytest.MonkeyPatch) -> None:
    floor = load("common.floor")
    told = {"map_buffer": 1, "read_seconds": 0.5, "copy_seconds": 0.25, "update_seconds": 0.125,
            "exp_variants": 1, "exp_elements": 10, "exp_error": 0.0,
            "exp_seconds": 2.0}  # fmt: skip
    functions = {name: lambda *_, value=value: value for name, value in told.items()}
    library = SimpleNamespace(**functions, unmap_buffer=lambda *_: None)
    monkeypatch.setattr(floor, "_compiled", lambda: library)
    monkeypatch.setattr(floor, "_SIGNATURES", {})
    found, giga = floor.Probes(threads=2, buffer_bytes=2**22).sample(), 2**22 / 1e9
    assert found["read"] == found["read_prefetch"] == pytest.approx(2 * giga)
    assert found["copy"] == pytest.approx(2 * 4 * giga)  # bytes read and written
    assert found["update"] == pytest.approx(2 * 8 * giga)
    assert found["exp_float32"] == pytest.approx(2 * 10 * floor.EXP_REPEATS / 2.0 / 1e9)
    library.exp_error = lambda *_: 1e-3
    with pytest.raises(floor.FloorError, match="variant 0 is wrong"):
        floor.Probes(threads=2, buffer_bytes=2**22)


def test_the_probes_touch_all_of_their_buffers(load) -> None:
    probes = load("common.floor").Probes(threads=2, buffer_bytes=2**22)
    size = probes._bytes
    ctypes.memset(probes._from, 1, size)
    probes._library.copy_seconds(probes._to, probes._from, size, 2)
    assert ctypes.string_at(probes._to, size) == b"\1" * size


def test_the_probes_run_and_their_exponentials_are_right(load) -> None:
    probes = load("common.floor").Probes(threads=1, buffer_bytes=2**22)
    assert all(rate > 0 for rate in probes.sample().values())


def test_the_linear_floor_makes_the_products_and_is_the_fastest_way(load) -> None:
    floor, timing = load("common.floor"), load("common.timing")
    hidden, weight = torch.randn(5, 8), torch.randn(9000, 8)
    made = floor.LinearFloor(hidden, weight, 9e9)
    for block in floor.BLOCKS:
        made.forward(block)
        last = slice(block * (9000 // block), None) if block else slice(None)
        logits = hidden @ weight[last].t()
        assert torch.allclose(made._of(slice(0, logits.shape[1])), logits, atol=1e-4)
        made.backward(block)
        assert torch.allclose(made._weight_gradient[last], logits.t() @ hidden, atol=1e-3)

    def way(forward: float, backward: float):
        of = timing.Times.of
        return {"forward": of([forward]), "backward": of([backward])}

    ways = (way(3.0, 6.0), way(2.0, 8.0), way(4.0, 9.0))
    found = made.describe(dict(zip(made.subjects(), ways, strict=True)))
    assert (found["forward_ms"], found["forward_backward_ms"]) == (2.0, 9.0)
    assert found["gflops"] == pytest.approx(1000.0)


# ---- processes and memory --------------------------------------------------------------------


def test_a_process_of_its_own_answers_or_says_why_not(load, tmp_path: Path) -> None:
    processes = load("common.processes")
    huge = processes.apart("os:getenv", "huge", key="THP_MEM_ALLOC_ENABLE")
    assert (huge, processes.apart("os:getenv", key="THP_MEM_ALLOC_ENABLE")) == ("1", None)
    with pytest.raises(processes.ApartError, match="JSONDecodeError: Expecting"):
        processes.apart("json:loads", s="{")
    with pytest.raises(processes.ApartError, match="os:_exit ended with status 3: no output"):
        processes.apart("os:_exit", status=3)


def test_a_peak_counts_from_its_baseline(load) -> None:
    torch.ones(2**26)  # 256 MiB that are free again
    baseline = load("common.memory").Baseline()
    assert baseline.peak_extra_mib() < 64
    torch.ones(2**25)
    assert 100 < baseline.peak_extra_mib() < 192


def test_memory_is_measured_in_a_process_of_its_own(load) -> None:
    cases, memory, peers = load("common.cases"), load("common.memory"), load("common.peers")
    case = cases.Case(cases.synthetic(2, 128, 40_000, "float32"))
    logits = case.batch.logits_bytes / 2**20
    peaks = {
        name: memory.peaks("bench.logits", case, name, ("forward_backward",))
        for name in (peers.OURS_INPLACE, peers.PRINCETON)
    }
    assert peaks[peers.OURS_INPLACE]["forward_backward_mib"] < 0.5 * logits
    assert 2.0 * logits < peaks[peers.PRINCETON]["forward_backward_mib"] < 6.0 * logits
    missing = memory.peaks("bench.logits", case, "nobody", ("forward",))
    assert set(missing) == {"reason"} and "StopIteration" in missing["reason"]


# ---- tables and commands ---------------------------------------------------------------------


def results() -> dict:
    """A run of one featured case and another one, whose tables can be checked by hand."""

    def row(name: str, milliseconds: float, disturbed: bool) -> dict:
        times = {"median_ms": milliseconds, "disturbed": disturbed,
                 "x_baseline": milliseconds / 2.0, "x_floor": milliseconds}  # fmt: skip
        return {"name": name, "kind": "ours" if name == "simpo_ext" else "peer", "status": "right",
                "reason": "", "value_error": 2e-7, "forward": times,
                "memory": {"forward_mib": 1.0}}  # fmt: skip

    wrong = {"name": "bad", "kind": "peer", "status": "wrong", "reason": "differs",
             "value_error": "nan"}  # fmt: skip
    case = {"name": "n float32", "share": "100%", "pages": "default", "featured": True,
            "valid_rows": 7, "logits_bytes": 2**22, "gradient_bytes": 2**21,
            "floor": {"forward_ms": 1.0},
            "rows": [row("simpo_ext", 2.0, False), row("peer", 30.0, True), wrong]}  # fmt: skip
    return {
        "machine": {"name": "m", "cores": 2},
        "software": {"torch": "2"},
        "commit": "abc",
        "date": "2026-01-01",
        "phases": {"forward": "forward"},
        "baseline": "simpo_ext",
        "ratio": "x_baseline",
        "floor": "bare work",
        "cases": [case, {**case, "name": "other", "featured": False}],
    }


def test_a_recorded_run_is_read_back_and_shown(
    load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables, found = load("common.tables"), results()
    path, picture = tmp_path / "results.json", tmp_path / "plot.png"
    tables.write(found, path)
    assert json.loads(path.read_text()) == found
    assert load("common.show").main([str(path), "--plot", str(picture)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("| **simpo_ext** | 2.00 (1.00x) |",
                 "| peer | 30.0* (15.0x) |", "| floor: bare work | 1.00 |",
                 "| peer | 1; 2e-07 |", "n float32, 100% scored"):  # fmt: skip
        assert text in printed
    assert "other" not in printed and "bad" not in printed
    assert picture.stat().st_size > 10_000
    lines = [*tables.case_lines(found["phases"], "simpo_ext", found["cases"][0])]
    assert [line.split() for line in lines[3:5]] == [
        ["simpo_ext", "2.00", "1.00", "2.00", "1", "2e-07"],
        ["peer", "30.0*", "15.0", "30.0", "1", "2e-07"],
    ]
    assert "bad: wrong: differs {'value_error': 'nan'}" in lines


@pytest.fixture
def run(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a program of two cases whose measurements are told, and returns what it did."""
    cases, program, linear = load("common.cases"), load("common.program"), load("linear")
    shapes = [cases.synthetic(2, 8, 16, dtype, hidden=4) for dtype in ("float32", "bfloat16")]
    plan = (cases.Case(shapes[0], is_featured=True), cases.Case(shapes[1], "huge", True))
    told = dataclasses.replace(linear.PROGRAM, cases=plan, phases={"forward": "forward"})
    done = SimpleNamespace(status=0, measured=[], memory=[], plots=[], kept=tmp_path / "kept")

    def run(*arguments: str, status: str = "right", is_lost: bool = False):
        def apart(function: str, pages: str, program: str, case: dict, rounds: int) -> dict:
            done.measured.append((case["batch"]["dtype"], pages))
            if is_lost and len(done.measured) == 1:
                raise load("common.processes").ApartError("killed")
            found = json.loads(json.dumps(results()["cases"][0]))
            found["rows"][0]["status"] = status
            return found

        monkeypatch.setattr(program, "apart", apart)
        monkeypatch.setattr(program, "RESULTS", done.kept)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        peaks = lambda _, case, name, phases: done.memory.append(name) or {}  # noqa: E731
        monkeypatch.setattr(program.memory, "peaks", peaks)
        monkeypatch.setattr(program.tables, "plot", lambda _, path: done.plots.append(path))
        done.status = program.run(told, [*arguments])
        return done

    return run


def test_a_commit_with_changes_says_so(load, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = load("common.machine")
    told = {"status": "", "rev-parse": "abc"}
    monkeypatch.setattr(machine, "_output", lambda *command: told[command[3]])
    assert machine.commit() == "abc"
    told["status"] = " M file"
    assert machine.commit() == "abc with changes"
    told["rev-parse"] = None
    assert machine.commit() is None


def test_a_full_run_is_kept(run) -> None:
    done = run()
    assert done.status == 0
    assert done.measured == [("float32", "default"), ("bfloat16", "huge")]
    assert done.memory == ["simpo_ext", "peer"]  # not of what is wrong, nor with huge pages
    assert [path.name.partition("-")[0] for path in done.kept.iterdir()] == ["linear"]
    assert done.plots == [done.kept / "linear.png"]


def test_a_partial_run_overwrites_nothing(run) -> None:
    done = run("--cases", "bfloat16")
    assert done.measured == [("bfloat16", "huge")]
    assert not done.kept.exists()
    assert done.plots and done.kept not in done.plots[0].parents


def test_a_run_fails_where_ours_is_wrong(run) -> None:
    assert run(status="wrong").status == 1


def test_a_case_that_is_lost_fails_a_run_and_does_not_end_it(run) -> None:
    done = run(is_lost=True)
    assert (done.status, len(done.measured)) == (1, 2)


@pytest.mark.parametrize("arguments", [("--rounds", "0"), ("--cases", "nothing")])
def test_options_that_make_no_sense_are_refused(load, arguments: tuple[str, str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        load("linear").main(["--quick", *arguments])


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), ([], 0), (["nonsense"], 2)])
def test_the_program_lists_its_commands(
    load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments, status
) -> None:
    main = load("__main__")
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    assert main.main() == status
    printed = "".join(capsys.readouterr())
    assert all(f"  {name} " in printed for name in main.COMMANDS)


def test_every_command_is_a_module_that_runs_in_place(
    load, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = load("__main__")
    for module, _ in main.COMMANDS.values():
        assert importlib.util.find_spec(module) is not None
    started: list[list[str]] = []
    fake = ModuleType("fake")
    fake.main = lambda: started.append(sys.argv) or 5
    monkeypatch.setitem(sys.modules, "fake", fake)
    monkeypatch.setitem(main.COMMANDS, "fake", ("fake", ""))
    monkeypatch.setattr(sys, "argv", ["bench", "fake", "--option"])
    assert main.main() == 5
    assert started == [["python -m bench fake", "--option"]]
