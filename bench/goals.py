"""What the kernels are meant to reach, held against what a run measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

Results = dict[str, Any]
Case = dict[str, Any]
Row = dict[str, Any]

FLOOR_FLOAT32 = 90.0  # per cent
FLOOR_LARGE_VOCABULARY = 90.0
FLOOR_BFLOAT16 = 85.0
LARGE_VOCABULARY = 128_000

# What counts as nothing: a few pages of bookkeeping, next to logits of this size.
SLACK_MIB = 4.0
SLACK_SHARE = 0.01
HUGE_PAGE_MIB = 2.0  # a sequence's rows may begin and end within one


@dataclass(frozen=True)
class Goal:
    """One goal and how it went."""

    text: str
    reached: bool | None  # None: nothing of it was measured
    worst: str
    met: int
    of: int


@dataclass(frozen=True)
class Figure:
    """One case's figure: how it reads, where it was, and by how much it passes (below 1: not)."""

    text: str
    where: str
    margin: float


def judge(text: str, figures: Iterable[Figure]) -> Goal:
    """A goal that all figures have to pass."""
    found = list(figures)
    if not found:
        return Goal(text, None, "not measured", 0, 0)
    worst = min(found, key=lambda figure: figure.margin)
    met = sum(figure.margin >= 1.0 for figure in found)
    return Goal(text, met == len(found), f"{worst.text} at {worst.where}", met, len(found))


def place(case: Case) -> str:
    """Where a figure is from."""
    return f"{case['name']} {case['share']}"


def best_row(case: Case, kind: str = "ours") -> Row | None:
    """This project's row at the best instruction set."""
    return next((row for row in case["rows"] if row["kind"] == kind and row["is_best"]), None)


def _floor_shares(cases: Iterable[Case], least: float) -> Iterator[Figure]:
    for case in cases:
        row = best_row(case)
        if row is not None and "forward" in row:
            percent = row["forward"]["percent_of_floor"]
            yield Figure(f"{percent:.0f} %", place(case), percent / least)


def _ratios(
    cases: Iterable[Case], phase: str, wanted: Callable[[Row], bool], least: float
) -> Iterator[Figure]:
    for case in cases:
        for row in case["rows"]:
            if wanted(row) and phase in row and "x_ours" in row[phase]:
                ratio = row[phase]["x_ours"]
                yield Figure(f"{ratio:.1f}x", f"{place(case)}, {row['name']}", ratio / least)


def _memory(
    cases: Iterable[Case], kind: str, phase: str, allowed_mib: Callable[[Case], float]
) -> Iterator[Figure]:
    for case in cases:
        row = best_row(case, kind)
        memory = (row or {}).get("memory") or {}
        if phase in memory:
            allowed = allowed_mib(case)
            margin = allowed / max(memory[phase], 1e-9)
            text = f"{memory[phase]:.1f} MiB of {allowed:.1f} allowed"
            yield Figure(text, place(case), margin)


def _nothing(case: Case) -> float:
    return SLACK_MIB + SLACK_SHARE * case["logits_bytes"] / 2**20


def _one_gradient(case: Case) -> float:
    gradient = case["valid_rows"] * case["vocabulary"] * case["element_size"] / 2**20
    return gradient + _nothing(case) + 2 * HUGE_PAGE_MIB * case["batch"]


def evaluate(results: Results) -> list[dict[str, Any]]:
    """Every goal, in the order in which they are printed."""
    plain = [case for case in results["cases"] if case["pages"] == "default"]
    huge = [case for case in results["cases"] if case["pages"] == "huge"]
    full = [case for case in plain if case["share"] == "100%"]
    partial = [case for case in plain if case["share"] == "40%"]
    float32 = [case for case in plain if case["dtype"] == "float32"]
    bfloat16 = [case for case in plain if case["dtype"] == "bfloat16"]
    large = [case for case in bfloat16 if case["vocabulary"] >= LARGE_VOCABULARY]
    small = [case for case in bfloat16 if case["vocabulary"] < LARGE_VOCABULARY]

    def compiled(row: Row) -> bool:
        return row["name"] == "torch.compile"

    def eager(row: Row) -> bool:
        return row["kind"] == "eager"

    def cross_entropy(row: Row) -> bool:
        return row["name"] == "F.cross_entropy"

    def compiled_or_cross_entropy(row: Row) -> bool:
        return compiled(row) or cross_entropy(row)

    def peer(row: Row) -> bool:
        return row["kind"] in ("compile", "eager")

    both = "forward_backward"
    overhead = results.get("overhead")
    overhead_figures = (
        [Figure(f"{overhead['ratio']:.2f}x", "2x8x64", 1.0 / overhead["ratio"])] if overhead else []
    )
    goals = [
        judge(
            "forward >= 90 % of the floor, float32",
            _floor_shares(float32, FLOOR_FLOAT32),
        ),
        judge(
            "forward >= 90 % of the floor, bfloat16, V >= 128k",
            _floor_shares(large, FLOOR_LARGE_VOCABULARY),
        ),
        judge(
            "forward >= 85 % of the floor, bfloat16, V = 32k", _floor_shares(small, FLOOR_BFLOAT16)
        ),
        judge("forward >= 3x torch.compile", _ratios(plain, "forward", compiled, 3.0)),
        judge("forward >= 7x every eager form", _ratios(plain, "forward", eager, 7.0)),
        judge("forward+backward >= 5x torch.compile at 100 %", _ratios(full, both, compiled, 5.0)),
        judge(
            "forward+backward >= 7x F.cross_entropy at 100 %",
            _ratios(full, both, cross_entropy, 7.0),
        ),
        judge(
            "forward+backward >= 8x torch.compile and F.cross_entropy at 40 %",
            _ratios(partial, both, compiled_or_cross_entropy, 8.0),
        ),
        judge(
            "forward+backward >= 2x every peer, huge pages for everyone",
            _ratios(huge, both, peer, 2.0),
        ),
        judge("no extra memory in the forward", _memory(plain, "ours", "forward_mib", _nothing)),
        judge(
            "extra memory out of place: the gradient of valid rows",
            _memory(plain, "ours", "forward_backward_mib", _one_gradient),
        ),
        judge(
            "no extra memory in place",
            _memory(plain, "ours in place", "forward_backward_mib", _nothing),
        ),
        judge("a call costs <= 1.0x the eager formula's", overhead_figures),
    ]
    return [asdict(goal) for goal in goals]
