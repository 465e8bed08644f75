"""Writes the report of a run: one JSON file, and short tables of the results in its folder.

bench/gpu.sh --report FOLDER

The report can be written again at any time, even for an unfinished run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import records
from bench.common import tables
from bench.gpu.runner import CASES, STEPS

JSON, TEXT = "report.json", "report.txt"
MAX_FAILURES = 10  # shown for each kind of record
# What the tables of batches call their columns.
PHASES, BASELINE = {"forward": "fwd", "forward_backward": "fwd + bwd"}, "simpo_ext"

Record = dict[str, Any]


# ---- batches ---------------------------------------------------------------------------------


def batch_lines(case: Record) -> Iterator[str]:
    """The table of one case of bench.gpu.measure."""
    warning = "" if case["device"] == "cuda" else f"  [{case['device']}: no measurement of a GPU]"
    yield ""
    yield f"{case['kind']} {tables.heading(case)}{warning}"
    yield from tables.case_lines(PHASES, BASELINE, case)


# ---- other records ---------------------------------------------------------------------------


def _outcome_lines(kind: str, found: Sequence[Record]) -> list[str]:
    """How many cases or tests passed, and which did not."""
    counts = Counter(record["status"] for record in found)
    lines = [f"{kind}: " + ", ".join(f"{number} {status}" for status, number in counts.items())]
    others = [r for r in found if r["status"] not in ("right", "passed", "skipped", "collected")]
    for record in others[:MAX_FAILURES]:
        said = record.get("reason", "").strip().splitlines()[-1:]
        checks = record.get("checks", {}).items()
        bad = [f"{n} {e} > {b:g}" for n, (e, b) in checks if isinstance(e, str) or not e <= b]
        name = f"{record['name']} {record.get('dtype', '')}".strip()
        lines.append(f"  {name}: {record['status']} {' '.join([*said, *bad])}"[:300])
    if len(others) > MAX_FAILURES:
        lines.append(f"  and {len(others) - MAX_FAILURES} more")
    return lines


def _ncu_lines(found: Sequence[Record]) -> list[str]:
    names = list(dict.fromkeys(name for record in found for name in record["metrics"]))
    rows = [["Nsight Compute, kernels alone", *names]]
    for record in found:
        cells = [tables.digits(record["metrics"].get(name)) for name in names]
        rows.append([record["kernel"], *cells])
    return tables.aligned(rows)


BATCHES = ("logits", "linear", "sweep")


def _lines(steps: Sequence[Record], cases: Sequence[Record]) -> Iterator[str]:
    kinds: dict[str, list[Record]] = {}
    for record in cases:
        kinds.setdefault(record["kind"], []).append(record)
    for machine in kinds.pop("machine", [])[-1:]:
        yield (
            f"{machine['gpu'] or 'no GPU'}, driver {machine['driver']}, torch {machine['torch']}, "
            f"Python {machine['python']}, simpo_ext {machine['simpo_ext']}"
        )
    for kind, found in kinds.items():
        if kind in BATCHES:
            for record in found:
                yield from batch_lines(record)
        else:
            yield ""
            yield from _ncu_lines(found) if kind == "ncu" else _outcome_lines(kind, found)
    yield ""
    rows = [["step", "seconds", "budget", "status"]]
    rows += [[s["step"], f"{s['seconds']:.0f}", f"{s['budget']:.0f}", s["status"]] for s in steps]
    yield from tables.aligned(rows)
    for step in steps:
        if step["reason"]:
            yield f"  {step['step']}: {step['reason'].splitlines()[0][:200]}"


def write(folder: Path) -> str:
    """Writes report.json and report.txt; returns the text."""
    steps, cases = records.read(folder / STEPS), records.read(folder / CASES)
    everything = {"steps": steps, "cases": cases}
    (folder / JSON).write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(_lines(steps, cases)) + "\n"
    (folder / TEXT).write_text(text, encoding="utf-8")
    return text
