"""Measures the loss from hidden states on a GPU: every candidate, side by side.

    python -m bench.linear_gpu [--device cuda] [--size NxHxV] [--sequences 2P] [--json FILE]

The default is an output layer of Llama-3-8B's size, in bfloat16. Candidates, verification and floor
are those of bench_linear.py, with the peers that need a GPU; this project is told the number of
valid tokens, as a trainer's collator knows it. CUDA events time whole phases, and torch's allocator
counts the peak of each. With --device cpu it says whether the program works.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import linear_batch, linear_floor, linear_goals, linear_laps, linear_report
from bench.linear_batch import LinearBatch
from bench.linear_floor import BLOCKS
from bench.linear_laps import FORWARD, FORWARD_BACKWARD, LinearLaps
from bench.linear_subjects import LIGER_COMPILED, LinearCandidate, linear_candidates
from bench.timing import Clock, Subject, interleaved, make_clock

SIZE = "16384x4096x128256"
SEQUENCES = 16
FRACTIONS = (1.0, 0.4)
ROUNDS = 4


def _subject(laps: LinearLaps, candidate: LinearCandidate, phase: str) -> Subject:
    return Subject(lambda: None, {phase: lambda _: laps.lap(candidate, phase)})


def _floor_subject(floor: linear_floor.Floor, block: int) -> Subject:
    phases: dict[str, Callable[[Any], Any]] = {
        "forward": lambda _: floor.forward(block),
        "backward": lambda _: floor.backward(block),
    }
    return Subject(lambda: None, phases)


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def measure(
    laps: LinearLaps, each: LinearBatch, clock: Clock, device: torch.device, rounds: int
) -> dict[str, Any]:
    """One share of a batch."""
    laps.set_mask(each)
    is_gpu = device.type == "cuda"  # elsewhere this is a trial, and compiling would take longest
    candidates = [each for each in linear_candidates() if is_gpu or each.name != LIGER_COMPILED]
    rows = []
    for candidate in candidates:
        rows.append(linear_laps.first_row(laps, candidate, device))
        _release(device)
    right = [
        (candidate, row)
        for candidate, row in zip(candidates, rows, strict=True)
        if row["status"] == "right"
    ]
    for candidate, row in right:
        memory = {}
        for phase in (FORWARD, FORWARD_BACKWARD):
            peak = clock.peak_extra_mib(_subject(laps, candidate, phase))[0]
            _release(device)
            if peak is not None:
                memory[f"{phase}_mib"] = peak
        if memory:
            row["memory"] = memory

    floor = laps.make_floor()
    subjects = {str(block): _floor_subject(floor, block) for block in BLOCKS}
    for candidate, _ in right:
        for phase in (FORWARD, FORWARD_BACKWARD):
            subjects[f"{candidate.name}/{phase}"] = _subject(laps, candidate, phase)
    times = interleaved(subjects, clock, rounds)
    for candidate, row in right:
        for phase in (FORWARD, FORWARD_BACKWARD):
            measured = asdict(times[f"{candidate.name}/{phase}"][phase])
            row[phase] = {**measured, "disturbed": False}
    floor_ms = {}
    for block in BLOCKS:
        products = times[str(block)]
        forward = products["forward"].median_ms
        floor_ms[block] = (forward, forward + products["backward"].median_ms)
    case = {
        **linear_laps.describe(each, device),
        "floor": linear_floor.describe(floor_ms, each.flops(each.batch.valid_rows)),
        "rows": rows,
    }
    linear_report.add_derived(case)
    return case


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times the loss from hidden states on a GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", default=SIZE, metavar="NxHxV")
    parser.add_argument("--sequences", type=int, default=SEQUENCES, metavar="2P")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        tokens, hidden, vocabulary = map(int, options.size.split("x"))
    except ValueError:
        parser.error(f"--size: expected NxHxV, got {options.size}")
    sequences = options.sequences
    if min(tokens, hidden, vocabulary) < 1:
        parser.error(f"--size: expected positive numbers, got {options.size}")
    if sequences < 2 or sequences % 2 or tokens % sequences or tokens < 4 * sequences:
        parser.error(f"--sequences: expected an even divisor of {tokens}, got {sequences}")
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a CUDA device, torch finds none; --device cpu times a CPU")
    options.batch = linear_batch.synthetic(
        sequences, tokens // sequences, hidden, vocabulary, "bfloat16"
    )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes what the command line asks for.

    Returns:
        0 if all of this project's candidates were right and timed, else 1.
    """
    options = _parse(arguments)
    device = torch.device(options.device)
    clock = make_clock(device)
    laps = LinearLaps(options.batch, device)
    results: dict[str, Any] = {"device": device.type, "timing": clock.description, "cases": []}
    for fraction in FRACTIONS:
        each = linear_batch.with_fraction(options.batch, fraction)
        case = measure(laps, each, clock, device, options.rounds)
        results["cases"].append(case)
        linear_report.print_case(case)
        _release(device)
    results["goals"] = linear_goals.evaluate(results)
    linear_report.print_goals(results["goals"])
    if options.json is not None:
        text = json.dumps(results, indent=1, allow_nan=False) + "\n"
        options.json.write_text(text, encoding="utf-8")
    ours = [row for case in results["cases"] for row in case["rows"] if row["kind"] == "ours"]
    return 0 if all(row["status"] == "right" for row in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
