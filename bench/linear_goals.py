"""What the linear front end is meant to reach, held against what a run measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from bench.goals import Figure, judge, place
from bench.linear_subjects import OURS, OURS_0, OURS_UNLIMITED, UNLIMITED
from simpo_ext._ops.logits_plan import kept_logits_shape

Results = dict[str, Any]
Case = dict[str, Any]
Row = dict[str, Any]

WITHIN_BUDGET, AT_BUDGET_0 = 1.10, 1.45  # times the floor
PARTIAL_RATIO, FULL_RATIO = 2.2, 1.0  # times as fast as a peer
COMPUTE_BYTES = 4  # of a float32: sums of products are in it
LIBRARY_MIB = 8.0  # what the library's products pack their operands into, and bookkeeping


def chunk_bytes(rows: int, vocabulary: int, element_size: int, device: str) -> tuple[int, int]:
    """Of the logits of one chunk; and the least budget that keeps all of them.

    There is one chunk more that is worked on.
    """
    chunks, _, width = kept_logits_shape(rows, vocabulary, element_size, UNLIMITED, device)
    of_one = rows * width * element_size
    return of_one, (chunks + 1) * of_one


def row_of(case: Case, name: str) -> Row:
    """One candidate's, or an empty one."""
    return next((row for row in case["rows"] if row["name"] == name), {})


def allowed_mib(case: Case, budget: int) -> float:
    """Gradients, budget and what is stated: one chunk, and three arrays as the valid hidden rows.

    A budget that is more than all logits and the chunk that is worked on counts as these.
    """
    chunk, everything = case["chunk_bytes"], case["all_chunks_bytes"]
    logits = max(min(budget, everything), chunk)
    # The compacted rows, a product of their shape, and the sum of such products.
    element = torch.finfo(getattr(torch, case["dtype"])).bits // 8
    work = case["compacted_bytes"] * (2 + max(COMPUTE_BYTES, element) / element)
    return (case["gradient_bytes"] + logits + work) / 2**20 + LIBRARY_MIB


def _x_floor(cases: Iterable[Case], name: str, most: float) -> Iterator[Figure]:
    for case in cases:
        ratio = row_of(case, name).get("forward_backward", {}).get("x_floor")
        is_within = name != OURS or case["all_chunks_bytes"] <= case["default_budget"]
        if ratio is not None and is_within:
            yield Figure(f"{ratio:.2f}x", f"{place(case)}, {name}", most / ratio)


def _ratios(cases: Iterable[Case], phase: str, least: float) -> Iterator[Figure]:
    for case in cases:
        for row in case["rows"]:
            ratio = row.get(phase, {}).get("x_ours")
            if row["kind"] == "peer" and ratio is not None:
                where = f"{place(case)}, {row['name']}"
                yield Figure(f"{ratio:.2f}x", where, ratio / least)


def _memory(cases: Iterable[Case], name: str) -> Iterator[Figure]:
    for case in cases:
        peak = (row_of(case, name).get("memory") or {}).get("forward_backward_mib")
        if peak is not None:
            allowed = allowed_mib(case, case["default_budget"] if name == OURS else 0)
            text = f"{peak:.0f} MiB of {allowed:.0f} allowed"
            yield Figure(text, f"{place(case)}, {name}", allowed / max(peak, 1e-9))


def _below_peers(cases: Iterable[Case], name: str) -> Iterator[Figure]:
    for case in cases:
        ours = (row_of(case, name).get("memory") or {}).get("forward_backward_mib")
        for row in case["rows"]:
            peak = (row.get("memory") or {}).get("forward_backward_mib")
            if ours is None or peak is None or row["kind"] != "peer":
                continue
            where = f"{place(case)}, {row['name']}"
            yield Figure(f"{ours:.0f} against {peak:.0f} MiB", where, peak / max(ours, 1e-9))


def evaluate(results: Results) -> list[dict[str, Any]]:
    """Every goal, in the order in which they are printed."""
    cases = results["cases"]
    full = [case for case in cases if case["share"] == "100%"]
    partial = [case for case in cases if case["share"] != "100%"]
    both = "forward_backward"
    within = [
        *_x_floor(cases, OURS, WITHIN_BUDGET),
        *_x_floor(cases, OURS_UNLIMITED, WITHIN_BUDGET),
    ]
    goals = [
        judge("forward+backward within the budget <= 1.10x the floor", within),
        judge(
            "forward+backward at budget 0 <= 1.45x the floor", _x_floor(cases, OURS_0, AT_BUDGET_0)
        ),
        judge(
            "forward+backward at 40 % or less >= 2.2x faster than every peer",
            _ratios(partial, both, PARTIAL_RATIO),
        ),
        judge(
            "forward+backward at 100 % never slower than a peer", _ratios(full, both, FULL_RATIO)
        ),
        judge("forward at 100 % never slower than a peer", _ratios(full, "forward", FULL_RATIO)),
        judge("peak memory: gradients + budget + stated slack", _memory(cases, OURS)),
        judge("the same at budget 0", _memory(cases, OURS_0)),
        judge("peak memory below every peer's", _below_peers(cases, OURS)),
        judge("the same at budget 0", _below_peers(cases, OURS_0)),
    ]
    return [asdict(goal) for goal in goals]
