"""Writes the report of a run: one JSON file, and short tables of the results in its folder.

bench/gpu.sh --report FOLDER

The report can be written again at any time, even for an unfinished run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import records
from bench.gpu.runner import CASES, STEPS

JSON, TEXT = "report.json", "report.txt"
MAX_FAILURES = 10  # shown for each kind of record

Record = dict[str, Any]


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Aligns the columns of rows: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()


def _number(value: float | None, digits: int) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def _notes(results: Iterable[Record]) -> Iterator[str]:
    """Says why candidates were not timed."""
    for result in results:
        if result["status"] != "right":
            errors = {k: v for k, v in result.items() if k.endswith("_error")}
            yield f"  {result['name']}: {result['status']}: {result['reason']} {errors or ''}"


# ---- batches ---------------------------------------------------------------------------------


def logits_lines(case: Record) -> list[str]:
    """The table of one batch of bench.gpu.logits."""
    capped = f", softcap {case['softcap']:g}" if case["softcap"] else ""
    lines = [
        "",
        f"{case['rows']} x {case['vocabulary']} {case['dtype']}, "
        f"{case['valid_fraction']:.0%} scored{capped}; copy {case['copy']['gb_per_s']:.0f} GB/s"
        + ("" if case["device"] == "cuda" else f"  [{case['device']}: no measurement of a GPU]"),
    ]
    units = ("ms", "% copy", "MiB", "error")
    rows = [["", *(f"{phase} {unit}" for phase in ("fwd", "bwd") for unit in units)]]
    for result in case["candidates"]:
        if result["status"] != "right":
            continue
        row = [result["name"]]
        for phase, error in (("forward", "value_error"), ("backward", "gradient_error")):
            row += [
                _number(result[phase]["median_ms"], 3),
                _number(result[phase]["percent_of_copy"], 1),
                _number(result[f"{phase}_peak_extra_mib"], 0),
                f"{result[error]:.0e}",
            ]
        rows.append(row)
    return [*lines, *_table(rows), *_notes(case["candidates"])]


def linear_lines(case: Record) -> list[str]:
    """The table of bench.gpu.linear for one share of scored tokens."""
    floor = case["floor"]
    lines = [
        "",
        f"from hidden states {case['name']}, {case['share']} scored; bare products "
        f"{floor['forward_ms']:.1f} ms forward, {floor['forward_backward_ms']:.1f} ms with "
        f"backward, {floor['gflops'] / 1e3:.0f} TFlop/s"
        + ("" if case["device"] == "cuda" else f"  [{case['device']}: no measurement of a GPU]"),
    ]
    rows = [["", "fwd ms", "x bare", "fwd+bwd ms", "x bare", "MiB", "error"]]
    for result in case["rows"]:
        if result["status"] != "right":
            continue
        row = [result["name"]]
        for phase in ("forward", "forward_backward"):
            median = result[phase]["median_ms"]
            row += [_number(median, 2), _number(median / floor[f"{phase}_ms"], 2)]
        peak = result.get("memory", {}).get("forward_backward_mib")
        rows.append([*row, _number(peak, 0), f"{result['gradient_error']:.0e}"])
    return [*lines, *_table(rows), *_notes(case["rows"])]


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
        cells = [_number(record["metrics"].get(name), 2) for name in names]
        rows.append([record["kernel"], *cells])
    return list(_table(rows))


def _sweep_lines(found: Sequence[Record]) -> list[str]:
    lines = []
    for kernel in ("forward", "backward"):
        variants = [r for r in found if r["kernel"] == kernel]
        timed = sorted((r for r in variants if "ms" in r), key=lambda r: r["ms"])
        best = [
            f"{r['threads']} x {r['unroll']}: {r['ms']:.3f} ms, {r['percent_of_copy']:.1f} %"
            for r in timed[:3]
        ]
        wrong = [f"{r['threads']} x {r['unroll']}: {r['error']}" for r in variants if "error" in r]
        if variants:
            lines.append(f"sweep {kernel}, threads x unroll, best: {'; '.join([*best, *wrong])}")
    return lines


TABLES = {"ncu": _ncu_lines, "sweep": _sweep_lines}
BATCHES = {"logits": logits_lines, "linear": linear_lines}


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
                yield from BATCHES[kind](record)
        else:
            yield ""
            yield from TABLES[kind](found) if kind in TABLES else _outcome_lines(kind, found)
    yield ""
    rows = [["step", "seconds", "budget", "status"]]
    rows += [[s["step"], f"{s['seconds']:.0f}", f"{s['budget']:.0f}", s["status"]] for s in steps]
    yield from _table(rows)
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
