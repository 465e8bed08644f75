"""What a run of the TRL benchmark looks like: on the screen and in README."""

from __future__ import annotations

from typing import Any

from rich import box

from bench.logits_report import digits
from bench.report import console, make_table, number, print_table
from bench.trl_subjects import OURS, PHASES, STOCK

Case = dict[str, Any]
Row = dict[str, Any]


def add_derived(case: Case) -> None:
    """Adds how many times stock TRL's time and memory each subject takes."""
    stock = next(row for row in case["rows"] if row["name"] == STOCK)
    for row in case["rows"]:
        for phase in PHASES:
            if phase in row and phase in stock:
                row[phase]["x_stock"] = row[phase]["median_ms"] / stock[phase]["median_ms"]


def _title(case: Case) -> str:
    return (
        f"{case['name']}: logits {case['logits_bytes'] / 2**20:.0f} MiB, "
        f"gradients {case['gradient_bytes'] / 2**20:.0f}"
    )


def _notes(case: Case) -> list[str]:
    notes = []
    for row in case["rows"]:
        if row["status"] != "right":
            notes.append(f"{row['name']}: {row['status']}: {row['reason']}")
        reason = row.get("memory", {}).get("reason")
        if reason:
            notes.append(f"{row['name']}: memory not measured: {reason}")
    return notes


def print_case(case: Case) -> None:
    """The rows of one case."""
    units = ("ms", "x TRL", "MiB")
    table = make_table("", *(f"{short}\n{unit}" for short in ("eval", "train") for unit in units))
    table.add_column("values\nerror", justify="right")
    table.add_column("gradient\nerror", justify="right")
    table.box = box.SIMPLE_HEAD
    for row in case["rows"]:
        if row["status"] != "right":
            continue
        cells: list[str] = []
        for phase in PHASES:
            times = row[phase]
            peak = row.get("memory", {}).get(f"{phase}_mib")
            cells += [digits(times["median_ms"]), digits(times["x_stock"]), number(peak, 0)]
        errors = (f"{row['value_error']:.0e}", f"{row['gradient_error']:.0e}")
        table.add_row(row["name"], *cells, *errors, style="bold" if row["name"] in OURS else None)
    print_table(_title(case), table, "\n".join(_notes(case)))


def print_summary(results: dict[str, Any]) -> None:
    """How long it took."""
    console.print(f"\n{results['seconds'] / 60:.1f} minutes", style="dim")


def markdown(results: dict[str, Any]) -> str:
    """A table of peaks and times, a row for each case and subject."""
    machine, software = results["machine"], results["software"]
    lines = [
        f"{machine['name']}, {software['threads']} threads, torch {software['torch']}, TRL "
        f"{software['trl']}, transformers {software['transformers']}, simpo_ext "
        f"{software['simpo_ext']} ({software['commit']}); sequences x T x H x V; medians of "
        f"{results['samples']} interleaved steps, losses and gradients verified against stock "
        "TRL's.",
        "",
        "| | training, peak MiB | ms | evaluation, peak MiB | ms |",
        "|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        lines.append(f"| *{_title(case)} MiB* | | | | |")
        for row in case["rows"]:
            if row["status"] != "right":
                continue
            cells = []
            for phase in ("training", "evaluation"):
                times = row[phase]
                cells.append(number(row.get("memory", {}).get(f"{phase}_mib"), 0))
                cells.append(f"{digits(times['median_ms'])} ({digits(times['x_stock'])}x)")
            name = f"**{row['name']}**" if row["name"] in OURS else row["name"]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
