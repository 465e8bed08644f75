"""What a run of the linear benchmark looks like: on the screen, in README and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box

from bench.linear_subjects import BUDGETS, OURS
from bench.logits_report import (
    PHASES,
    PLOT_DPI,
    digits,
    heading,
    milliseconds,
)
from bench.report import console, make_table, number, print_table

Results = dict[str, Any]
Case = dict[str, Any]
Row = dict[str, Any]

# What README and the plot show: name and share.
FEATURED = (
    ("8x512x2048x32000 bfloat16", "100%"),
    ("4x512x1024x128256 bfloat16", "100%"),
    ("4x512x1024x128256 bfloat16", "40%"),
    ("4x512x1024x32000 float32", "100%"),
    ("real", None),
)

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {"ours": "#0072B2", "peer": "#E69F00"}
PLOT_INCHES = (14.0, 4.6)


def row_of(case: Case, name: str) -> Row:
    """A candidate's row, or an empty one."""
    return next((row for row in case["rows"] if row["name"] == name), {})


def add_derived(case: Case) -> None:
    """Adds x floor and x ours to the times of a case."""
    ours = row_of(case, OURS)
    for row in case["rows"]:
        for phase in PHASES:
            times = row.get(phase)
            if times is None:
                continue
            times["x_floor"] = times["median_ms"] / case["floor"][f"{phase}_ms"]
            if phase in ours:
                times["x_ours"] = times["median_ms"] / ours[phase]["median_ms"]


def _time(times: dict[str, Any]) -> str:
    """The median; with a star where disturbed, in brackets where it was measured at 100 %."""
    text = milliseconds(times)
    return f"({text})" if times.get("borrowed") else text


# ---- the screen ------------------------------------------------------------------------------


def _floor_note(case: Case) -> str:
    floor = case["floor"]
    variants = "; ".join(
        f"{each['name']} {digits(each['forward_ms'])} and {digits(each['forward_backward_ms'])}"
        for each in floor["variants"]
    )
    return (
        f"floor {digits(floor['forward_ms'])} ms forward, "
        f"{digits(floor['forward_backward_ms'])} with backward "
        f"({floor['gflops']:.0f} GFlop/s); {variants}"
    )


def _notes(case: Case) -> list[str]:
    notes = []
    for row in case["rows"]:
        if row["status"] != "right":
            errors = (
                f" (loss {row['value_error']}, gradient {row['gradient_error']}, whole "
                f"{row['norm_error']})"
                if row["status"] == "wrong"
                else ""
            )
            notes.append(f"{row['name']}: {row['status']}: {row['reason']}{errors}")
        reason = (row.get("memory") or {}).get("reason")
        if reason:
            notes.append(f"{row['name']}: memory not measured: {reason}")
    return notes


def print_case(case: Case) -> None:
    """The rows of one case."""
    units = ("ms", "x floor", "x ours", "MiB")
    table = make_table("", *(f"{phase}\n{unit}" for phase in ("fwd", "f+b") for unit in units))
    table.add_column("loss\nerror", justify="right")
    table.add_column("gradient\nerror", justify="right")
    table.box = box.SIMPLE_HEAD
    for row in case["rows"]:
        if row["status"] != "right":
            continue
        cells: list[str] = []
        memory = row.get("memory") or {}
        for phase in PHASES:
            times = row.get(phase)
            if times is None:
                cells += ["", "", ""]
            else:
                ratio = digits(times["x_ours"]) if "x_ours" in times else ""
                cells += [_time(times), digits(times["x_floor"]), ratio]
            peak = memory.get(f"{phase}_mib")
            cells.append("" if peak is None else number(peak, 0))
        errors = (f"{row['value_error']:.0e}", f"{row['norm_error']:.0e}")
        table.add_row(row["name"], *cells, *errors, style="bold" if row["kind"] == "ours" else None)
    title = (
        f"{case['name']}, {case['share']} valid ({case['valid_rows']} rows); logits "
        f"{case['logits_bytes'] / 2**20:.0f} MiB, gradients {case['gradient_bytes'] / 2**20:.0f}"
    )
    print_table(title, table, "\n".join([_floor_note(case), *_notes(case)]))


def print_summary(results: Results) -> None:
    """How long it took, and how many samples were kept."""
    canaries = results["canaries"]
    kept, dropped = canaries["kept"], canaries["dropped"]
    minutes = results["seconds"] / 60
    console.print(f"\nsamples kept {kept}, dropped {dropped}; {minutes:.1f} minutes")


# ---- README ----------------------------------------------------------------------------------


def featured(results: Results) -> list[Case]:
    """The cases that README shows, or where there are none of them, the first few."""
    cases = results["cases"]
    found = [
        case
        for name, share in FEATURED
        for case in cases
        if (case["name"] == name and case["share"] == share)
        or (share is None and case["name"].startswith(name))
    ]
    return found or cases[: len(FEATURED)]


def _names(cases: Sequence[Case], *keys: str) -> list[str]:
    """The rows that have one of the keys, in the order of the case that has most of them."""
    lists = [
        [row["name"] for row in case["rows"] if any(key in row for key in keys)] for case in cases
    ]
    return list(dict.fromkeys(name for names in sorted(lists, key=len)[::-1] for name in names))


def _bold(name: str) -> str:
    return f"**{name}**" if name in BUDGETS else name


def _markdown_times(cases: Sequence[Case], phase: str) -> list[str]:
    lines = [
        f"| {PHASES[phase]}, ms | " + " | ".join(heading(case) for case in cases) + " |",
        "|---|" + "---|" * len(cases),
    ]
    for name in _names(cases, phase):
        cells = []
        for case in cases:
            times = row_of(case, name).get(phase)
            ratio = "" if times is None else f" ({times['x_floor']:.2f}x)"
            cells.append("" if times is None else f"{milliseconds(times)}{ratio}")
        lines.append(f"| {_bold(name)} | " + " | ".join(cells) + " |")
    floors = " | ".join(digits(case["floor"][f"{phase}_ms"]) for case in cases)
    return [*lines, f"| floor: the bare matrix products of the valid rows | {floors} |", ""]


def _markdown_memory(cases: Sequence[Case]) -> list[str]:
    cases = [case for case in cases if any("memory" in row for row in case["rows"])]
    if not cases:
        return []
    gradients = " | ".join(f"{case['gradient_bytes'] / 2**20:.0f}" for case in cases)
    lines = [
        "| peak MiB above inputs, forward / with backward | "
        + " | ".join(heading(case) for case in cases)
        + " |",
        "|---|" + "---|" * len(cases),
    ]
    for name in _names(cases, "memory"):
        cells = []
        for case in cases:
            memory = row_of(case, name).get("memory") or {}
            sizes = [memory.get(f"{phase}_mib") for phase in PHASES]
            cells.append(" / ".join(f"{size:.0f}" for size in sizes if size is not None))
        lines.append(f"| {_bold(name)} | " + " | ".join(cells) + " |")
    return [*lines, f"| of these, the gradients | {gradients} |", ""]


def markdown(results: Results) -> str:
    """Tables of the featured cases."""
    machine, software = results["machine"], results["software"]
    liger = software["liger-kernel"]
    cases = featured(results)
    lines = [
        f"{machine['name']}, {software['threads']} threads, {software['level']}, torch "
        f"{software['torch']}, Liger {liger}, simpo_ext {software['simpo_ext']} "
        f"({software['commit']}); B x T x H x V; medians, interleaved, each result verified "
        "against float64. In brackets: multiples of the floor.",
        "",
    ]
    for phase in reversed(PHASES):
        lines += _markdown_times(cases, phase)
    lines += _markdown_memory(cases)
    return "\n".join(lines) + "\n"


# ---- the plot --------------------------------------------------------------------------------


def plot(results: Results, path: Path) -> None:
    """Bars of forward + backward in multiples of the floor, a panel for each case."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    cases = featured(results)
    names = _names(cases, "forward_backward")
    figure, axes = plt.subplots(
        1, len(cases), figsize=PLOT_INCHES, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, case in zip(axes[0], cases, strict=True):
        longest = 1.0
        for position, name in enumerate(names):
            row = row_of(case, name)
            times = row.get("forward_backward")
            if times is None:
                continue
            ratio = times["x_floor"]
            longest = max(longest, ratio)
            axis.barh(position, ratio, 0.7, color=COLOURS[row["kind"]])
            axis.annotate(
                f"{ratio:.2f}", (ratio, position), (4, 0), textcoords="offset points", va="center",
                fontsize=11, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
        axis.axvline(1.0, color="black", linewidth=1, linestyle=":")
        axis.set_xlim(0, longest * 1.25)
        geometry, _, dtype = case["name"].rpartition(" ")
        axis.set_title(f"{geometry}\n{dtype}, {case['share']} valid", fontsize=12)
        axis.tick_params(labelsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(names)), names, fontsize=12)
    axes[0][0].invert_yaxis()
    figure.suptitle(
        "Forward + backward: time in multiples of the bare matrix products of the valid tokens\n"
        "(B x T x H x V, shorter is faster)",
        fontsize=14,
    )
    figure.savefig(path, dpi=PLOT_DPI)
    plt.close(figure)
