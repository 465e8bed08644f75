"""What a run looks like: tables on the screen and in Markdown, the plot, and the results file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Results = dict[str, Any]
Case = dict[str, Any]
Row = dict[str, Any]

FLOOR = "floor"

PAGES = {"default": "default allocator", "huge": "huge pages for all"}
# Okabe and Ito's colours, which colour-blind readers tell apart.
BLUE, ORANGE = "#0072B2", "#E69F00"
PLOT_HEIGHT, PANEL_WIDTH, PLOT_DPI = 4.9, 2.9, 130


def write(results: Results, path: Path) -> None:
    """One JSON file, with a line for each case."""
    head = {key: value for key, value in results.items() if key != "cases"}
    cases = ",\n".join(json.dumps(case, allow_nan=False) for case in results["cases"])
    text = json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}")
    path.write_text(f'{text},\n "cases": [\n{cases}\n ]\n}}\n', encoding="utf-8")


def digits(value: float | None) -> str:
    """Three significant ones, without an exponent."""
    if value is None:
        return ""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: the first column to the left, the others to the right."""
    from tabulate import tabulate  # which the run on a GPU machine unpacks in its first step

    sides = ("left", *["right"] * (len(rows[0]) - 1))
    table = tabulate(rows[1:], rows[0], "simple", disable_numparse=True, colalign=sides)
    return table.splitlines()


def in_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    from tabulate import tabulate

    return tabulate(rows[1:], rows[0], "github", disable_numparse=True, stralign=None)


def milliseconds(times: dict[str, Any]) -> str:
    """The median, with a star if it was disturbed."""
    return f"{digits(times['median_ms'])}{'*' if times['disturbed'] else ''}"


def _peak(row: Row, phase: str) -> str:
    peak = row.get("memory", {}).get(f"{phase}_mib")
    return "" if peak is None else f"{peak:.0f}"


def _error(row: Row) -> str:
    return f"{row['value_error']:.0e}"


# ---- the screen ------------------------------------------------------------------------------


def _notes(case: Case) -> Iterator[str]:
    for row in case["rows"]:
        if row["status"] != "right":
            errors = {key: value for key, value in row.items() if key.endswith("_error")}
            yield f"{row['name']}: {row['status']}: {row['reason']} {errors or ''}"
        reason = row.get("memory", {}).get("reason")
        if reason:
            yield f"{row['name']}: memory not measured: {reason}"
    if case["floor"]:
        yield f"{FLOOR}: " + ", ".join(f"{key} {digits(x)}" for key, x in case["floor"].items())


def case_lines(phases: dict[str, str], baseline: str, case: Case) -> Iterator[str]:
    """The rows of one case. ``phases`` says what the columns call each of them."""
    has_floor, has_memory = bool(case["floor"]), any("memory" in row for row in case["rows"])
    head = [""]
    for name in phases.values():
        head += [f"{name} ms", f"x {baseline}"]
        head += [f"x {FLOOR}"] * has_floor + ["peak MiB"] * has_memory
    rows = [[*head, "loss error"]]
    for row in case["rows"]:
        if row["status"] != "right":
            continue
        cells = []
        for phase in phases:
            times = row[phase]
            cells += [milliseconds(times), digits(times.get("x_baseline"))]
            cells += [digits(times.get("x_floor"))] * has_floor + [_peak(row, phase)] * has_memory
        rows.append([row["name"], *cells, _error(row)])
    mib = {key: case[f"{key}_bytes"] / 2**20 for key in ("logits", "gradient")}
    yield (
        f"{case['valid_rows']} scored rows, {mib['logits']:.0f} MiB of logits, "
        f"{mib['gradient']:.0f} MiB of gradients"
    )
    yield from aligned(rows)
    yield from _notes(case)


# ---- Markdown --------------------------------------------------------------------------------


def _featured(results: Results, pages: str) -> list[Case]:
    """The cases that tables and plot show; all of them if none is marked."""
    cases = [case for case in results["cases"] if case["pages"] == pages]
    return [case for case in cases if case["featured"]] or cases


def heading(case: Case) -> str:
    """What a case is called."""
    return f"{case['name']}, {case['share']} scored"


def _row(case: Case, name: str) -> Row:
    return next((row for row in case["rows"] if row["name"] == name), {})


def _names(cases: Sequence[Case]) -> list[str]:
    """Of all that was right somewhere, in the order of the case that has most."""
    lists = [[row["name"] for row in case["rows"] if row["status"] == "right"] for case in cases]
    return list(dict.fromkeys(name for names in sorted(lists, key=len)[::-1] for name in names))


def _markdown_table(title: str, cases: Sequence[Case], rows: dict[str, list[str]]) -> str:
    table = [[title, *map(heading, cases)]]
    for name, cells in rows.items():
        if any(cells):
            table.append([f"**{name}**" if name.startswith("simpo_ext") else name, *cells])
    return in_markdown(table)


def _times_table(results: Results, cases: Sequence[Case], phase: str) -> str:
    def cell(case: Case, name: str) -> str:
        times = _row(case, name).get(phase)
        if times is None:
            return ""
        ratio = digits(times.get(results["ratio"]))
        return f"{milliseconds(times)}{f' ({ratio}x)' if ratio else ''}"

    rows = {name: [cell(case, name) for case in cases] for name in _names(cases)}
    floor = f"{FLOOR}: {results['floor']}"
    rows[floor] = [digits(case["floor"].get(f"{phase}_ms")) for case in cases]
    return _markdown_table(f"{results['phases'][phase]}, ms", cases, rows)


def _memory_table(results: Results, cases: Sequence[Case]) -> str:
    def cell(case: Case, name: str) -> str:
        row = _row(case, name)
        peaks = [_peak(row, phase) for phase in results["phases"]]
        parts = [" / ".join(peaks) if any(peaks) else "", _error(row) if row else ""]
        return "; ".join(part for part in parts if part)

    rows = {name: [cell(case, name) for case in cases] for name in _names(cases)}
    for key in ("logits", "gradient"):
        rows[f"size of the {key}{'s' if key == 'gradient' else ''}"] = [
            f"{case[f'{key}_bytes'] / 2**20:.0f}" for case in cases
        ]
    phases = " / ".join(results["phases"].values())
    return _markdown_table(f"peak extra MiB, {phases}; error of the loss", cases, rows)


def markdown(results: Results) -> str:
    """What ran, and tables of the featured cases."""
    software = ", ".join(f"{name} {value}" for name, value in results["software"].items())
    parts = [
        f"{results['machine']['name']}, {results['machine']['cores']} cores; {software}; "
        f"commit {results['commit']}, {results['date']}.",
    ]
    pages = [each for each in PAGES if _featured(results, each)]
    for each in pages:
        if len(pages) > 1:
            parts.append(f"**{PAGES[each].capitalize()}**")
        parts += [_times_table(results, _featured(results, each), it) for it in results["phases"]]
    parts.append(_memory_table(results, _featured(results, pages[0])))
    return "\n\n".join(parts) + "\n"


# ---- the plot --------------------------------------------------------------------------------


def plot(results: Results, path: Path) -> None:
    """Bars of the last phase in multiples of the baseline's time or of the floor, by case."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    phase, title = list(results["phases"].items())[-1]
    by_pages = {pages: cases for pages in PAGES if (cases := _featured(results, pages))}
    cases = next(iter(by_pages.values()))
    names = _names(cases)
    figure, axes = plt.subplots(
        1, len(cases), figsize=(2.5 + PANEL_WIDTH * len(cases), PLOT_HEIGHT), sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    height = 0.8 / len(by_pages)
    colours = dict(zip(PAGES, (BLUE, ORANGE), strict=True))
    for axis, case in zip(axes[0], cases, strict=True):
        longest = 1.0
        for index, (pages, others) in enumerate(by_pages.items()):
            same = [each for each in others if heading(each) == heading(case)]
            for position, name in enumerate(names):
                row = _row(same[0], name) if same else {}
                ratio = row.get(phase, {}).get(results["ratio"])
                if ratio is None:
                    continue
                y = position + (index + 0.5) * height - 0.4
                longest = max(longest, ratio)
                kind = BLUE if row["kind"] == "ours" else ORANGE
                axis.barh(y, ratio, height, color=colours[pages] if len(by_pages) > 1 else kind)
                axis.annotate(
                    digits(ratio), (ratio, y), (4, 0), textcoords="offset points", va="center",
                    fontsize=11, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                )  # fmt: skip
        axis.axvline(1.0, color="black", linewidth=1, linestyle=":")
        axis.set_xlim(0, longest * 1.25)
        geometry, _, dtype = case["name"].rpartition(" ")
        axis.set_title(f"{geometry}\n{dtype}, {case['share']} scored", fontsize=12)
        axis.tick_params(labelsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(names)), names, fontsize=12)
    axes[0][0].invert_yaxis()
    if len(by_pages) > 1:
        handles = [plt.Rectangle((0, 0), 1, 1, color=colours[pages]) for pages in by_pages]
        labels = [PAGES[pages] for pages in by_pages]
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=12)
    unit = results["floor"] if results["ratio"] == "x_floor" else f"{results['baseline']}'s time"
    figure.suptitle(f"{title.capitalize()} in multiples of {unit} (shorter is faster)", fontsize=14)
    figure.savefig(path, dpi=PLOT_DPI)
    plt.close(figure)
