"""What a run of the logits benchmark looks like: on the screen, in README and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box

from bench.floor import Rates, make_floor
from bench.report import console, make_table, number, print_table

Results = dict[str, Any]
Case = dict[str, Any]
Row = dict[str, Any]

PHASES = {"forward": "forward", "forward_backward": "forward + backward"}
PAGES = {"default": "allocator as it comes", "huge": "huge pages for everyone"}

# What README and the plot show: name and share.
FEATURED = (
    ("4x512x32000 float32", "100%"),
    ("2x512x128256 bfloat16", "100%"),
    ("2x512x128256 bfloat16", "40%"),
    ("real", None),
)

# The upcast form of the formula is the formula where logits are float32 already.
UPCAST = "Princeton float32"

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {"default": "#0072B2", "huge": "#E69F00"}
PLOT_INCHES, PLOT_DPI = (12.0, 5.2), 130


def add_derived(case: Case, rates: Rates) -> None:
    """Adds GB/s, per cent of the floor and x ours to the times of a case.

    GB/s are of the bytes that the work has to touch: the valid rows once in the forward, and in the
    backward once more, with their gradient.
    """
    floor = make_floor(rates, case["valid_rows"], case["vocabulary"], case["element_size"])
    case["floor"] = {
        "forward_ms": floor.forward_ms,
        "forward_backward_ms": floor.forward_backward_ms,
        "forward_backward_inplace_ms": floor.forward_backward_inplace_ms,
    }
    size = case["valid_rows"] * case["vocabulary"] * case["element_size"]
    ours = next((row for row in case["rows"] if row["kind"] == "ours" and row["is_best"]), None)
    for row in case["rows"]:
        inplace = "_inplace" if row["kind"] == "ours in place" else ""
        floors = {
            "forward": case["floor"]["forward_ms"],
            "forward_backward": case["floor"][f"forward_backward{inplace}_ms"],
        }
        for phase, moved in (("forward", size), ("forward_backward", 3 * size)):
            times = row.get(phase)
            if times is None:
                continue
            times["gb_per_s"] = moved / times["median_ms"] / 1e6
            times["percent_of_floor"] = 100.0 * floors[phase] / times["median_ms"]
            if ours is not None and phase in ours:
                times["x_ours"] = times["median_ms"] / ours[phase]["median_ms"]


def digits(value: float) -> str:
    """Three significant ones, without an exponent."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def milliseconds(times: dict[str, Any]) -> str:
    """The median; with a star where too few samples were of a quiet machine."""
    return f"{digits(times['median_ms'])}{'*' if times['disturbed'] else ''}"


# ---- the screen ------------------------------------------------------------------------------


def _case_title(case: Case) -> str:
    return (
        f"{case['name']}, {case['share']} valid ({case['valid_rows']} rows), "
        f"{case['logits_bytes'] / 2**20:.0f} MiB of logits; {PAGES[case['pages']]}"
    )


def _label(row: Row) -> str:
    return row["name"] if row["is_best"] or not row["level"] else f"{row['name']} {row['level']}"


def _notes(case: Case) -> list[str]:
    return [
        f"{_label(row)}: {row['status']}: {row['reason']}"
        + (
            f" (loss {row['value_error']}, gradient {row['gradient_error']})"
            if row["status"] == "wrong"
            else ""
        )
        for row in case["rows"]
        if row["status"] != "right"
    ]


def print_case(case: Case) -> None:
    """The rows of one case."""
    units = ("ms", "x", "GB/s", "%floor", "MiB")
    table = make_table("", *(f"{phase}\n{unit}" for phase in ("fwd", "f+b") for unit in units))
    table.add_column("loss\nerror", justify="right")
    table.box = box.SIMPLE_HEAD
    for row in case["rows"]:
        if row["status"] != "right":
            continue
        cells: list[str] = []
        memory = row.get("memory") or {}
        for phase in PHASES:
            times = row.get(phase)
            if times is None:
                cells += [""] * len(units)
                continue
            cells += [
                milliseconds(times),
                digits(times["x_ours"]) if "x_ours" in times else "",
                number(times["gb_per_s"], 1),
                number(times["percent_of_floor"], 0),
                number(memory[f"{phase}_mib"], 0) if f"{phase}_mib" in memory else "",
            ]
        style = "bold" if row["kind"].startswith("ours") and row["is_best"] else None
        table.add_row(_label(row), *cells, f"{row['value_error']:.0e}", style=style)
    floor = case["floor"]
    notes = [
        f"floor {floor['forward_ms']:.2f} ms forward, {floor['forward_backward_ms']:.2f} with "
        f"backward, {floor['forward_backward_inplace_ms']:.2f} in place",
        *_notes(case),
    ]
    print_table(_case_title(case), table, "\n".join(notes))


def print_summary(results: Results) -> None:
    """Rates, canaries and overhead."""
    rates = make_table("machine", "median", "min", "max")
    for name, rate in results["rates"].items():
        unit = "Gelem/s" if name.startswith("exp") else "GB/s"
        cells = (f"{rate[key]:.1f}" for key in ("median", "min", "max"))
        rates.add_row(f"{name} {unit}", *cells)
    canaries = results["canaries"]
    print_table(
        f"{results['machine']['name']}, {results['software']['threads']} threads",
        rates,
        f"samples kept {canaries['kept']}, dropped {canaries['dropped']}",
    )
    if results["overhead"]:
        overhead = results["overhead"]
        console.print(
            f"\na call at 2x8x64 on one thread: simpo_ext {overhead['simpo_ext_us']:.0f} us, "
            f"eager {overhead['eager_us']:.0f} us; out of cold caches "
            f"{overhead['simpo_ext_cold_us']:.0f} us and {overhead['eager_cold_us']:.0f} us"
        )


# ---- README ----------------------------------------------------------------------------------


def featured(results: Results, pages: str) -> list[Case]:
    """The cases that README shows, or where there are none of them, the first few."""
    cases = [case for case in results["cases"] if case["pages"] == pages]
    found = [
        case
        for name, share in FEATURED
        for case in cases
        if (case["name"] == name and case["share"] == share)
        or (share is None and case["name"].startswith(name))
    ]
    return found or cases[: len(FEATURED)]


def _names(cases: Sequence[Case]) -> list[str]:
    """The rows at the best instruction set, in the order of the case that has most of them."""
    lists = [[row["name"] for row in case["rows"] if row["is_best"]] for case in cases]
    return list(dict.fromkeys(name for names in sorted(lists, key=len)[::-1] for name in names))


def _row(case: Case, name: str) -> Row:
    return next((row for row in case["rows"] if row["name"] == name and row["is_best"]), {})


def heading(case: Case) -> str:
    """Of a case's column."""
    return f"{case['name']}, {case['share']} valid"


def _markdown_table(cases: Sequence[Case], phase: str) -> list[str]:
    lines = [
        f"| {PHASES[phase]}, ms | " + " | ".join(heading(case) for case in cases) + " |",
        "|---|" + "---|" * len(cases),
    ]
    for name in _names(cases):
        cells = []
        for case in cases:
            row = _row(case, name)
            times = row.get(phase)
            if times is None:
                same = name == UPCAST and case["dtype"] == "float32"
                cells.append("as Princeton" if same else row.get("status", ""))
                continue
            ratio = f" ({times['x_ours']:.1f}x)" if "x_ours" in times else ""
            cells.append(f"{milliseconds(times)}{ratio}")
        bold = "**" if name.startswith("simpo_ext") else ""
        lines.append(f"| {bold}{name}{bold} | " + " | ".join(cells) + " |")
    floor_key = f"{phase}_ms"
    lines.append(
        "| floor | " + " | ".join(digits(case["floor"][floor_key]) for case in cases) + " |"
    )
    return [*lines, ""]


def _markdown_memory(cases: Sequence[Case]) -> list[str]:
    lines = [
        "| peak extra MiB, forward / with backward; error of the loss | "
        + " | ".join(heading(case) for case in cases)
        + " |",
        "|---|" + "---|" * len(cases),
        "| logits | " + " | ".join(f"{case['logits_bytes'] / 2**20:.0f}" for case in cases) + " |",
    ]
    for name in _names(cases):
        cells = []
        for case in cases:
            row = _row(case, name)
            memory = row.get("memory") or {}
            sizes = [memory.get(f"{phase}_mib") for phase in PHASES]
            text = " / ".join(f"{size:.0f}" for size in sizes if size is not None)
            if row.get("status") == "right":
                text += f"{'; ' if text else ''}{row['value_error']:.0e}"
            cells.append(text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def markdown(results: Results) -> str:
    """Tables of the featured cases."""
    machine, software = results["machine"], results["software"]
    lines = [
        f"{machine['name']}, {software['threads']} threads, {software['level']}, torch "
        f"{software['torch']}, simpo_ext {software['simpo_ext']} ({software['commit']}); medians, "
        f"interleaved, each result verified against float64. In brackets: multiples of "
        "simpo_ext's time.",
        "",
    ]
    for pages, description in PAGES.items():
        cases = featured(results, pages)
        if cases:
            lines += [f"**{description[0].upper()}{description[1:]}**", ""]
            for phase in PHASES:
                lines += _markdown_table(cases, phase)
    lines += _markdown_memory(featured(results, "default"))
    return "\n".join(lines) + "\n"


# ---- the plot --------------------------------------------------------------------------------


def plot(results: Results, path: Path) -> None:
    """Bars of forward + backward in multiples of this project's time, a panel for each case."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    by_pages = {pages: featured(results, pages) for pages in PAGES}
    cases = by_pages["default"] or by_pages["huge"]
    names = _names(cases)
    figure, axes = plt.subplots(
        1, len(cases), figsize=PLOT_INCHES, sharey=True, squeeze=False, layout="constrained"
    )
    height = 0.4
    for axis, case in zip(axes[0], cases, strict=True):
        longest = 1.0
        for offset, (pages, colour) in zip((-0.5, 0.5), COLOURS.items(), strict=True):
            same = [
                other
                for other in by_pages[pages]
                if (other["name"], other["share"]) == (case["name"], case["share"])
            ]
            for position, name in enumerate(names):
                times = _row(same[0], name).get("forward_backward") if same else None
                if times is None or "x_ours" not in times:
                    continue
                ratio, y = times["x_ours"], position + offset * height
                longest = max(longest, ratio)
                axis.barh(y, ratio, height, color=colour)
                axis.annotate(
                    f"{ratio:.1f}", (ratio, y), (4, 0), textcoords="offset points", va="center",
                    fontsize=11, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                )  # fmt: skip
        if UPCAST in names and case["dtype"] == "float32":
            axis.annotate(
                "as Princeton", (1, names.index(UPCAST)), (4, 0), textcoords="offset points",
                va="center", fontsize=11, color="dimgrey",
            )  # fmt: skip
        axis.axvline(1.0, color="black", linewidth=1, linestyle=":")
        axis.set_xlim(0, longest * 1.2)
        geometry, _, dtype = case["name"].rpartition(" ")
        axis.set_title(f"{geometry}\n{dtype}, {case['share']} valid", fontsize=12)
        axis.tick_params(labelsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(names)), names, fontsize=12)
    axes[0][0].invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, PAGES.values(), loc="outside lower center", ncols=2, fontsize=12)
    figure.suptitle(
        "Forward + backward: time in multiples of simpo_ext's (shorter is faster)", fontsize=14
    )
    figure.savefig(path, dpi=PLOT_DPI)
    plt.close(figure)
