"""What the benchmarks share as programs: options, cases one after another, the results file."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.common import memory, tables
from bench.common.cases import Case
from bench.common.machine import commit, describe_cpu, describe_software, slug
from bench.common.processes import ROOT, ApartError, apart
from bench.common.timing import DISTURBED

RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Program:
    """A benchmark on the CPU."""

    name: str
    module: str  # with make_problem(case) and small(case)
    description: str
    cases: tuple[Case, ...]
    quick_cases: tuple[Case, ...]
    phases: dict[str, str]  # and what the tables call them
    baseline: str
    floor: str = ""  # what it is, if there is one
    ratio: str = "x_baseline"  # what the tables show: multiples of the baseline's time, or x_floor
    rounds: int = 7


def default_output(name: str, kind: str, machine: dict[str, Any]) -> Path:
    """bench/results/NAME-MACHINE.json; a temporary file for a quick or a partial run."""
    if kind != "full":
        with tempfile.NamedTemporaryFile(prefix=f"{name}-", suffix=".json", delete=False) as file:
            return Path(file.name)
    words = [machine["name"], "family", machine["family"], "model", machine["model"]]
    known = [str(word) for word in words if word]
    return RESULTS / f"{name}-{slug(' '.join([*known, str(machine['cores']), 'cores']))}.json"


def _parse(program: Program, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m bench {program.name}", description=program.description
    )
    parser.add_argument("--quick", action="store_true", help="tiny cases, to try the program")
    parser.add_argument("--rounds", type=int, metavar="N", help="laps of each subject at most")
    parser.add_argument(
        "--cases", nargs="+", metavar="TEXT", help="only cases whose names contain one of these"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the plot goes beside it")
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    options.kind = "quick" if options.quick else "partial" if options.cases else "full"
    options.rounds = options.rounds or (1 if options.quick else program.rounds)
    known = program.quick_cases if options.quick else program.cases
    options.chosen = [
        case
        for case in known
        if options.cases is None or any(text in case.batch.name for text in options.cases)
    ]
    if not options.chosen:
        names = list(dict.fromkeys(case.batch.name for case in known))
        parser.error(f"--cases: expected parts of {names}, got {options.cases}")
    return options


def _measure(program: Program, case: Case, rounds: int) -> dict[str, Any]:
    request = {"program": program.module, "case": case.to_json(), "rounds": rounds}
    found = apart("bench.common.measure:measure_case", case.pages, **request)
    for row in found["rows"]:
        if case.is_featured and case.pages == "default" and row["status"] == "right":
            row["memory"] = memory.peaks(program.module, case, row["name"], (*program.phases,))
    return {**found, "pages": case.pages, "featured": case.is_featured}


def run(program: Program, arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes what the command line asks for, each case as soon as it is done.

    Returns:
        0 if all of this project's candidates were right and timed, else 1.
    """
    options = _parse(program, arguments)
    began = time.monotonic()
    machine = describe_cpu()
    output = options.output or default_output(program.name, options.kind, machine)
    output.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "benchmark": program.name,
        "kind": options.kind,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
        "machine": machine,
        "software": describe_software(),
        "phases": program.phases,
        "baseline": program.baseline,
        "ratio": program.ratio,
        "floor": program.floor,
        "disturbed": f"the median is over {DISTURBED} times the fastest sample",
        "cases": [],
    }
    all_right = True
    for index, case in enumerate(options.chosen, 1):
        title = f"[{index}/{len(options.chosen)}] {case.batch.name}, {case.batch.share} scored"
        print(f"\n{title}, {case.pages} pages", flush=True)
        try:
            found = _measure(program, case, options.rounds)
        except ApartError as error:
            print(f"not measured: {error}", file=sys.stderr)
            all_right = False
            continue
        ours = [row for row in found["rows"] if row["kind"] == "ours"]
        all_right &= all(row["status"] == "right" for row in ours)
        results["cases"].append(found)
        results["seconds"] = round(time.monotonic() - began)
        tables.write(results, output)
        lines = tables.case_lines(program.phases, program.baseline, found)
        print("\n".join(lines), flush=True)
    if results["cases"]:
        is_kept = options.output is None and options.kind == "full"
        picture = RESULTS / f"{program.name}.png" if is_kept else output.with_suffix(".png")
        tables.plot(results, picture)
        print(f"\nresults: {output}\nplot: {picture}")
    return 0 if all_right else 1
