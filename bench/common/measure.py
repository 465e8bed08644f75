"""One case from its tensors to its rows: verified against the truth first, then timed in turns."""

from __future__ import annotations

import gc
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar

import torch

from bench import records
from bench.common.cases import Batch, Case
from bench.common.floor import Floor
from bench.common.peers import Candidate
from bench.common.processes import first_line
from bench.common.timing import Clock, CpuClock, Subject, interleaved

FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"

# On a CPU, a subject whose laps take longer altogether is timed in fewer rounds.
BUDGET_MS = 4000.0

Row = dict[str, Any]


class Problem(ABC):
    """A batch with everything needed to verify a candidate and to run its laps."""

    phases: ClassVar[tuple[str, ...]] = (FORWARD, FORWARD_BACKWARD)
    baseline: ClassVar[str]  # the candidate whose times the others are compared with
    candidates: list[Candidate]
    batch: Batch
    device = torch.device("cpu")

    @property
    def gradient_bytes(self) -> int:
        """Of what a lap with a backward leaves in any case."""
        return self.batch.gradient_bytes

    def candidate(self, name: str) -> Candidate:
        """By name."""
        return next(each for each in self.candidates if each.name == name)

    @abstractmethod
    def errors(self, candidate: Candidate) -> dict[str, tuple[float, float]]:
        """Runs a candidate: how far it is from the truth, and how far it may be, by name."""

    def prepare(self, candidate: Candidate) -> Any:
        """What a lap needs and does not time."""
        return None

    @abstractmethod
    def lap(self, candidate: Candidate, phase: str, prepared: Any) -> Any:
        """One lap, and what has to stay in memory until the clock has stopped."""

    def make_floor(self) -> Floor | None:
        """What no implementation can go below, if it is known."""
        return None


def verify(problem: Problem, candidate: Candidate) -> Row:
    """What a candidate is, and whether it is right. Only those with status "right" are timed."""
    row = {"name": candidate.name, "kind": "ours" if candidate.is_ours else "peer"}
    can_run, reason = candidate.available(problem.device)
    if not can_run:
        return {**row, "status": "unavailable", "reason": reason}
    try:
        errors = problem.errors(candidate)
    except Exception as error:  # of a foreign package, whatever it is
        return {**row, "status": "failed", "reason": first_line(error)}
    for name, (error, tolerance) in errors.items():
        row[f"{name}_error"] = records.number(error)
        row[f"{name}_tolerance"] = tolerance
    wrong = [name for name, (error, tolerance) in errors.items() if not error <= tolerance]
    if wrong:
        return {**row, "status": "wrong", "reason": f"differs from the truth: {', '.join(wrong)}"}
    return {**row, "status": "right", "reason": ""}


def release_memory(device: torch.device) -> None:
    """Returns to the GPU what torch keeps for later tensors."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _add_ratios(
    problem: Problem, measured: Sequence[tuple[Candidate, Row]], floor: dict[str, float]
) -> None:
    """Adds multiples of the baseline's time and of the floor to each time."""
    baseline = next((row for each, row in measured if each.name == problem.baseline), {})
    for candidate, row in measured:
        for phase in problem.phases:
            if phase not in row:
                continue
            median = row[phase]["median_ms"]
            if phase in baseline:
                row[phase]["x_baseline"] = median / baseline[phase]["median_ms"]
            in_place = "_in_place" if candidate.is_inplace else ""
            limit = floor.get(f"{phase}{in_place}_ms", floor.get(f"{phase}_ms"))
            if limit:
                row[phase]["x_floor"] = median / limit


def measure(
    problem: Problem,
    candidates: Sequence[Candidate],
    clock: Clock,
    rounds: int,
    budget_ms: float = math.inf,
) -> dict[str, Any]:
    """Verifies the candidates, and times those that are right, and the floor, in turns."""
    rows = []
    subjects: dict[str, Subject] = {}
    for candidate in candidates:
        row = verify(problem, candidate)
        rows.append(row)
        release_memory(problem.device)
        if row["status"] != "right":
            continue
        for phase in problem.phases:
            lap = partial(problem.lap, candidate, phase)
            subject = Subject(partial(problem.prepare, candidate), {phase: lap})
            subjects[f"{candidate.name}/{phase}"] = subject
            peak = clock.peak_extra_mib(subject)[0]
            if peak is not None:
                row.setdefault("memory", {})[f"{phase}_mib"] = peak
            release_memory(problem.device)
    limit = problem.make_floor()
    if limit is not None:
        subjects.update(limit.subjects())
    times = interleaved(subjects, clock, rounds, budget_ms)
    floor = limit.describe(times) if limit else {}
    for row in rows:
        for phase in problem.phases:
            if f"{row['name']}/{phase}" in times:
                found = times[f"{row['name']}/{phase}"][phase]
                row[phase] = {**asdict(found), "disturbed": found.is_disturbed}
    _add_ratios(problem, [*zip(candidates, rows, strict=True)], floor)
    batch = problem.batch
    return {
        "name": batch.name,
        "share": batch.share,
        "valid_rows": batch.valid_rows,
        "logits_bytes": batch.logits_bytes,
        "gradient_bytes": problem.gradient_bytes,
        "floor": floor,
        "rows": rows,
    }


def measure_case(program: str, case: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Measures a case on the CPU; ``program`` is a module with ``make_problem``."""
    chosen = Case.from_json(case)
    problem = importlib.import_module(program).make_problem(chosen)
    candidates = [each for each in problem.candidates if each.name not in chosen.leaves_out]
    return measure(problem, candidates, CpuClock(), rounds, BUDGET_MS)
