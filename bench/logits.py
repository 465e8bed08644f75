"""Measures the loss from logits on this machine's CPU, beside its peers and beside the floor.

    python -m bench logits [--quick] [--samples N] [--cases TEXT ...] [--output FILE.json]
    python -m bench logits --readme FILE.json

One piece of work for all: mean log-probabilities of the completions, SimPO's loss of the pairs, and
the gradient of the logits (trainers.py). A candidate is verified against float64 before it is
timed; one that is wrong, or not installed, is reported and not timed.

Batches (cases.py) are measured with the allocator as it comes, and again with huge pages for
everyone, without the smallest share. Lower instruction sets of this project are measured on the
first three shapes, with all positions valid and the allocator as it comes. Peak memory is measured
with the allocator as it comes: of this project everywhere, of peers on the featured shapes with all
positions valid, since their copies do not depend on the share, and on the real batch. In float32
the upcast form of the formula is the formula, and is left out.

Subjects take turns, and the machine's own rates are taken in every round (floor.py, gate.py). A
full run takes about half an hour on two cores. The tables come to the screen, everything to
bench/results/logits-MACHINE.json, and a plot to bench/results/logits.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import compress
from typing import Any

import torch
from tqdm import tqdm

import simpo_ext
from bench import logits_report, memory, overhead, program
from bench.cases import Batch
from bench.floor import FloorError, Probes, Rates
from bench.gate import Gate, Turn, take_turns
from bench.laps import PHASES
from bench.logits_plan import QUICK_SAMPLES, SAMPLES, Plan, full_plan, quick_plan
from bench.machine import describe_cpu, version
from bench.report import RESULTS
from bench.trainers import LossCandidate, loss_candidates
from bench.workers import HUGE_PAGES, LEVEL_VARIABLE, Worker, WorkerError

MIN_SAMPLES = 4
SUBJECT_BUDGET_MS = 3000.0  # a slow subject gets fewer samples, no fewer than MIN_SAMPLES

# ---- measuring -------------------------------------------------------------------------------


@dataclass
class _Seat:
    """A worker process and what it is for."""

    worker: Worker
    pages: str
    level: str
    is_best: bool
    unavailable: dict[str, str] = field(default_factory=dict)


def samples_for(lap_ms: float, samples: int) -> int:
    """Fewer for slow subjects."""
    affordable = int(SUBJECT_BUDGET_MS / max(lap_ms, 1e-3))
    return min(samples, max(MIN_SAMPLES, affordable))


class _Run:
    """The workers, the gate and what has been gathered."""

    def __init__(self, plan: Plan, progress: tqdm[None]) -> None:
        self._plan = plan
        self._progress = progress
        self.probes = Probes(torch.get_num_threads(), plan.probe_bytes)
        self.gate = Gate(
            self.probes.canaries,
            tolerance=plan.tolerance,
            calibration_samples=plan.calibration_samples,
        )
        self.rate_samples: list[dict[str, float]] = [self.probes.sample()]
        self.cases: list[dict[str, Any]] = []
        self._candidates: list[LossCandidate] = loss_candidates()
        *lower, best = simpo_ext._C.cpu_capabilities()
        lower = lower[:1] if plan.is_quick else lower
        self.level = best
        self._seats = [
            _Seat(Worker({}), "default", best, True),
            *(_Seat(Worker({LEVEL_VARIABLE: level}), "default", level, False) for level in lower),
            _Seat(Worker(HUGE_PAGES), "huge", best, True),
        ]

    def close(self) -> None:
        """Ends the workers."""
        for seat in self._seats:
            seat.worker.close()
        self.probes.close()

    def rates(self) -> dict[str, dict[str, float]]:
        """Median, least and most of every rate so far."""
        summary = {}
        for name in self.rate_samples[0]:
            values = [sample[name] for sample in self.rate_samples]
            summary[name] = {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
                "samples": len(values),
            }
        return summary

    def median_rates(self) -> Rates:
        """What the floor is computed from."""
        return Rates.of({name: rate["median"] for name, rate in self.rates().items()})

    def measure_shape(self, shape: Batch) -> None:
        """All shares of a shape, with the pages as they come and then with huge ones."""
        for pages in ("default", "huge"):
            batches = list(self._plan.batches(shape, pages))
            seats = [
                seat
                for seat in self._seats
                if seat.pages == pages and (seat.is_best or shape.name in self._plan.lower_levels)
            ]
            for batch in batches:
                self._progress.set_postfix_str(f"{batch.name} {batch.share} {pages}")
                is_first = batch is batches[0]
                self._measure_case(batch, batches[0], seats if is_first else seats[:1], is_first)
                if is_first:
                    for seat in seats[1:]:
                        self._release(seat)
                self._progress.update()
            self._release(seats[0])

    def _release(self, seat: _Seat) -> None:
        with suppress(WorkerError):
            seat.worker.ask("release")

    def _names(self, shape: Batch, seat: _Seat) -> list[LossCandidate]:
        return [
            each
            for each in self._candidates
            if (each.is_ours or seat.is_best) and self._plan.includes(each, shape, seat.pages)
        ]

    def _open(self, seat: _Seat, widest: Batch, batch: Batch) -> None:
        level = seat.worker.ask("describe")["level"]
        if level != seat.level:
            raise WorkerError(f"expected instruction set {seat.level}, got {level}")
        names = [each.name for each in self._names(widest, seat)]
        answer = seat.worker.ask("open", batch=widest.to_json(), candidates=names)
        seat.unavailable = answer["unavailable"]
        seat.worker.ask("mask", batch=batch.to_json())

    def _measure_case(
        self, batch: Batch, widest: Batch, seats: Sequence[_Seat], is_first: bool
    ) -> None:
        rows: list[dict[str, Any]] = []
        turns: dict[tuple[int, str], Turn] = {}
        for seat in seats:
            failure = ""
            try:
                if is_first:
                    self._open(seat, widest, batch)
                else:
                    seat.worker.ask("mask", batch=batch.to_json())
            except WorkerError as error:
                failure = str(error)
            for candidate in self._names(widest, seat):
                row = {
                    "name": candidate.name,
                    "kind": candidate.kind,
                    "level": seat.level if candidate.is_ours else "",
                    "is_best": seat.is_best,
                }
                if failure:
                    row.update(status="failed", reason=failure)
                else:
                    row.update(self._checked(seat, candidate, widest, batch))
                if row["status"] == "right":
                    for phase in PHASES:
                        turns[len(rows), phase] = self._turn(seat, candidate, phase, row["lap_ms"])
                rows.append(row)
        self.gate.allow(self._plan.patience_seconds)
        try:
            times = take_turns(turns, self.gate, between_rounds=self._sample_rates)
        except WorkerError as error:
            times = {}
            for index in {index for index, _ in turns}:
                rows[index].update(status="failed", reason=str(error))
        for (index, phase), measured in times.items():
            rows[index][phase] = asdict(measured)
        case = {
            "name": batch.name,
            "batch": batch.batch,
            "time": batch.time,
            "vocabulary": batch.vocabulary,
            "dtype": batch.dtype,
            "element_size": batch.element_size,
            "share": batch.share,
            "valid_rows": batch.valid_rows,
            "valid_fraction": batch.valid_fraction,
            "logits_bytes": batch.logits_bytes,
            "pages": seats[0].pages,
            "rows": rows,
        }
        self.cases.append(case)
        if seats[0].pages == "default":
            self._measure_memory(batch, case)
        logits_report.add_derived(case, self.median_rates())
        with tqdm.external_write_mode():
            logits_report.print_case(case)

    def _checked(
        self, seat: _Seat, candidate: LossCandidate, widest: Batch, batch: Batch
    ) -> dict[str, Any]:
        if candidate.name in seat.unavailable:
            return {"status": "unavailable", "reason": seat.unavailable[candidate.name]}
        try:
            return seat.worker.ask("check", candidate=candidate.name)
        except WorkerError as error:
            if not seat.worker.is_running:
                with suppress(WorkerError):
                    self._open(seat, widest, batch)
            return {"status": "failed", "reason": str(error)}

    def _turn(self, seat: _Seat, candidate: LossCandidate, phase: str, lap_ms: float) -> Turn:
        def prepare() -> None:
            seat.worker.ask("prepare", candidate=candidate.name)

        def run() -> float:
            return seat.worker.ask("run", candidate=candidate.name, phase=phase)["ms"]

        def warm() -> None:
            prepare()
            run()

        return Turn(warm, prepare, run, samples_for(lap_ms, self._plan.samples))

    def _sample_rates(self) -> None:
        sample: dict[str, float] = {}
        for _ in range(2):  # the second where the first was disturbed
            sample = self.probes.sample()
            if self.gate.is_quiet():
                break
        self.rate_samples.append(sample)

    def _measure_memory(self, batch: Batch, case: dict[str, Any]) -> None:
        for row in case["rows"]:
            is_timed = row["is_best"] and row["status"] == "right"
            if is_timed and self._plan.measures_memory(row["kind"], batch):
                row["memory"] = memory.peak_extra_mib(batch.to_json(), row["name"])


# ---- the run ---------------------------------------------------------------------------------


def measure(plan: Plan, kind: str) -> dict[str, Any]:
    """Everything, as JSON will hold it."""
    steps = sum(
        len(list(plan.batches(shape, pages)))
        for shape in plan.shapes
        for pages in ("default", "huge")
    )
    with tqdm(total=steps, unit="case", dynamic_ncols=True) as progress:
        run = _Run(plan, progress)
        try:
            for shape in plan.shapes:
                run.measure_shape(shape)
        finally:
            run.close()
    for case in run.cases:
        logits_report.add_derived(case, run.median_rates())
    results: dict[str, Any] = {
        "kind": kind,
        "machine": describe_cpu(),
        "software": {
            "torch": torch.__version__,
            "trl": version("trl"),
            "simpo_ext": str(simpo_ext.build_info()["version"]),
            "level": run.level,
            "levels": simpo_ext._C.cpu_capabilities(),
            "compiler": str(simpo_ext.build_info()["compiler"]),
            "threads": torch.get_num_threads(),
            "commit": program.commit(),
        },
        "samples": plan.samples,
        "floor": run.probes.describe(),
        "rates": run.rates(),
        "canaries": {
            "expected": run.gate.expected,
            "tolerance": run.gate.tolerance,
            "kept": run.gate.kept,
            "dropped": run.gate.dropped,
        },
        "overhead": overhead.measure(plan.overhead_samples),
        "cases": run.cases,
    }
    return results


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = program.make_parser("bench logits", "Times the loss from logits beside its peers.")
    options = program.parse(parser, arguments)
    if options.quick:
        plan = quick_plan(options.samples or QUICK_SAMPLES)
    else:
        plan = full_plan(options.samples or SAMPLES)
    names = [shape.name for shape in plan.shapes]
    chosen = program.check_cases(parser, options, names)
    options.plan = replace(plan, shapes=tuple(compress(plan.shapes, chosen)))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes what the command line asks for.

    Returns:
        0 if all of this project's candidates were right and timed, else 1.
    """
    options = _parse(arguments)
    if options.readme is not None:
        print(logits_report.markdown(json.loads(options.readme.read_text(encoding="utf-8"))))
        return 0
    try:
        results = measure(options.plan, options.kind)
    except FloorError as error:
        print(f"the floor cannot be measured: {error}", file=sys.stderr)
        return 1
    logits_report.print_summary(results)
    output = options.output or program.default_output("logits", options.kind, results["machine"])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    is_kept = options.output is None and options.kind == "full"
    picture = RESULTS / "logits.png" if is_kept else output.with_suffix(".png")
    logits_report.plot(results, picture)
    print(f"\nresults: {output}\nplot: {picture}")
    ours = [row for case in results["cases"] for row in case["rows"] if row["kind"][:4] == "ours"]
    return 0 if all(row["status"] == "right" for row in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
