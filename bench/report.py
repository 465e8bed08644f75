"""The tables on the screen, and the one JSON that a run of bench/gpu.sh leaves.

    python -m bench.report FOLDER [--output FILE.json] [--dry-run]

FOLDER holds what the steps left, each file of which may be missing: machine.json, build.json,
steps.jsonl, measurements.json, linear.json, sweep.jsonl and dram.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.machine import slug

RESULTS = Path(__file__).resolve().parent / "results"
STATUS_STYLE = {"ok": "green", "skipped": "yellow", "failed": "bold red"}

MIN_WIDTH = 120  # where the output is no terminal, rich would take 80

console = Console(highlight=False, markup=False)
console.width = max(console.width, MIN_WIDTH)


# ---- reading ---------------------------------------------------------------------------------


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _read_json_lines(path: Path) -> list[Any]:
    """The lines that are JSON: a program that was stopped may have left half of one."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def merge(folder: Path, *, dry_run: bool) -> dict[str, Any]:
    """Everything in one; what is missing is null or empty."""
    steps = _read_json_lines(folder / "steps.jsonl")
    return {
        "dry_run": dry_run,
        "ok": bool(steps) and all(step["status"] != "failed" for step in steps),
        "machine": _read_json(folder / "machine.json"),
        "build": _read_json(folder / "build.json"),
        "steps": steps,
        "measurements": _read_json(folder / "measurements.json"),
        "linear": _read_json(folder / "linear.json"),
        "sweep": _read_json_lines(folder / "sweep.jsonl"),
        "dram": _read_json(folder / "dram.json"),
    }


def default_output(results: dict[str, Any]) -> Path:
    """bench/results/gpu-NAME.json; a temporary file for a dry run, or one that measured nothing."""
    gpu = (results["machine"] or {}).get("gpu")
    if results["dry_run"] or not results["measurements"] or not gpu:
        with tempfile.NamedTemporaryFile(prefix="gpu-", suffix=".json", delete=False) as file:
            return Path(file.name)
    return RESULTS / f"gpu-{slug(gpu)}.json"


# ---- printing --------------------------------------------------------------------------------


def make_table(*columns: str) -> Table:
    """An empty table, the first column of which holds names."""
    table = Table()
    for index, column in enumerate(columns):
        first = index == 0
        table.add_column(column, justify="left" if first else "right", no_wrap=first)
    return table


def print_table(title: str, table: Table, note: str = "") -> None:
    """A table between its title and its note."""
    console.print()
    console.print(title, style="bold")
    console.print(table)
    if note:
        console.print(note, style="dim")


def number(value: float | None, digits: int) -> str:
    """With so many digits, or n/a."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def print_run(run: dict[str, Any], device: str) -> None:
    """The candidates of one batch."""
    of_phase = ("ms", "GB/s", "%copy", "MiB", "error")
    table = make_table("", *(f"{phase} {unit}" for phase in ("fwd", "bwd") for unit in of_phase))
    notes = []
    for result in run["candidates"]:
        errors = {"forward": result.get("value_error"), "backward": result.get("gradient_error")}
        if result["status"] != "right":
            note = f"{result['name']}: {result['status']}: {result['reason']}"
            if result["status"] == "wrong":
                note += f" (values {errors['forward']}, gradient {errors['backward']})"
            notes.append(note)
            continue
        cells: list[str] = []
        for phase, error in errors.items():
            speed = result[phase]
            cells += [
                number(speed["median_ms"], 3),
                number(speed["gb_per_s"], 0 if device == "cuda" else 2),
                number(speed["percent_of_copy"], 1),
                number(result[f"{phase}_peak_extra_mib"], 0),
                f"{error:.0e}",
            ]
        table.add_row(result["name"], *cells, style="bold" if result["ours"] else None)
    copy = run["copy"]
    title = (
        f"bfloat16 {run['rows']} x {run['vocabulary']}, {run['valid_fraction']:.0%} valid, "
        f"{run['logits_mib']:.0f} MiB of logits; copy {copy['gb_per_s']:.0f} GB/s"
    )
    if device != "cuda":
        title += f"  [{device}: no measurement of a GPU]"
    print_table(title, table, "\n".join(notes))


def _print_sweep(lines: Sequence[dict[str, Any]]) -> None:
    variants = [line for line in lines if "threads" in line]
    if not variants:
        return
    kernels = list(dict.fromkeys(line["kernel"] for line in variants))
    best = {
        kernel: min(
            (line["ms"] for line in variants if line["kernel"] == kernel and "ms" in line),
            default=None,
        )
        for kernel in kernels
    }
    units = ("ms", "% copy")
    table = make_table(
        "threads x unroll", *(f"{kernel} {unit}" for kernel in kernels for unit in units)
    )
    for shape in dict.fromkeys((line["threads"], line["unroll"]) for line in variants):
        cells = []
        for kernel in kernels:
            line = next(
                line
                for line in variants
                if (line["kernel"], line["threads"], line["unroll"]) == (kernel, *shape)
            )
            if "ms" in line:
                mark = " *" if line["ms"] == best[kernel] else ""
                cells += [f"{line['ms']:.3f}{mark}", f"{line['percent_of_copy']:.1f}"]
            else:
                cells += [line["error"], ""]
        table.add_row(f"{shape[0]} x {shape[1]}", *cells)
    copy = next((line for line in lines if line.get("kernel") == "copy"), None)
    note = f"copy {copy['gb_per_s']:.0f} GB/s in the same rounds" if copy else ""
    print_table("Sweep", table, note)


def _print_dram(dram: dict[str, Any]) -> None:
    if not dram["available"]:
        console.print(f"\nDRAM throughput not read: {dram['reason']}")
        return
    table = make_table("kernel", "DRAM % of peak", "ms")
    for kernel in dram["kernels"]:
        table.add_row(
            kernel["kernel"], f"{kernel['dram_percent']:.1f}", f"{kernel['milliseconds']:.3f}"
        )
    print_table("Nsight Compute, kernels alone", table)


def _print_summary(measurements: dict[str, Any], phase: str) -> None:
    """One phase of all batches: milliseconds and per cent of the copy bandwidth."""
    runs = measurements["runs"]
    table = make_table(
        phase,
        *(f"{run['rows']}x{run['vocabulary']}\n{run['valid_fraction']:.0%} valid" for run in runs),
    )
    by_run = [{result["name"]: result for result in run["candidates"]} for run in runs]
    for name, first in by_run[0].items():
        speeds = [results[name].get(phase) for results in by_run]
        if any(speeds):
            cells = [
                f"{speed['median_ms']:.3f} ms {speed['percent_of_copy']:5.1f}%" if speed else ""
                for speed in speeds
            ]
            table.add_row(name, *cells, style="bold" if first["ours"] else None)
    title = f"{phase.capitalize()}: ms, and % of the copy bandwidth"
    if measurements["device"] != "cuda":
        title += f"  [{measurements['device']}: no measurement of a GPU]"
    print_table(title, table, f"copy {measurements['copy_gb_per_s']:.0f} GB/s")


def print_all(results: dict[str, Any]) -> None:
    """A summary of everything there is."""
    if results["measurements"]:
        _print_summary(results["measurements"], "forward")
        _print_summary(results["measurements"], "backward")
    _print_sweep(results["sweep"])
    if results["dram"]:
        _print_dram(results["dram"])
    table = make_table("step", "seconds", "budget", "")
    for step in results["steps"]:
        status = step["status"] + (f": {step['reason']}" if step["reason"] else "")
        table.add_row(
            step["name"],
            str(step["seconds"]),
            str(step["budget"]),
            status,
            style=STATUS_STYLE[step["status"]],
        )
    machine = results["machine"] or {}
    where = machine.get("gpu") or "no GPU"
    print_table(f"{'Dry run' if results['dry_run'] else 'Run'} on {where}", table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Merges, prints and writes.

    Returns:
        0, also where a step failed: gpu.sh says so.
    """
    parser = argparse.ArgumentParser(description="Merges what the steps of gpu.sh left.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    results = merge(options.folder, dry_run=options.dry_run)
    print_all(results)
    output = options.output or default_output(results)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    console.print(f"\nresults: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
