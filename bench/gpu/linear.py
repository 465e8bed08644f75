"""Measures the loss from hidden states on a GPU: every candidate, side by side.

    python -m bench.gpu.linear [--device cuda] [--size NxHxV] [--sequences 2P] [--record FILE.jsonl]

The default is an output layer of Llama-3-8B's size, in bfloat16. The results for each share of
scored tokens are recorded as soon as they are measured. The candidates, their verification and the
bare products are those of linear.py, plus the peers that need a GPU. This project is told the
number of scored tokens, which a trainer's collator knows. CUDA events time whole phases, and
torch's allocator counts the peak memory of each. --device cpu only checks that the program works.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from bench import linear_batch, linear_floor, linear_laps, records
from bench.gpu import program
from bench.gpu.report import linear_lines
from bench.linear_batch import LinearBatch
from bench.linear_floor import BLOCKS
from bench.linear_laps import FORWARD, FORWARD_BACKWARD, LinearLaps
from bench.linear_subjects import LinearCandidate, linear_candidates
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


def measure(
    laps: LinearLaps,
    each: LinearBatch,
    candidates: Sequence[LinearCandidate],
    clock: Clock,
    device: torch.device,
    rounds: int,
) -> dict[str, Any]:
    """Measures a batch with one share of its tokens scored."""
    laps.set_mask(each)
    rows = []
    for candidate in candidates:
        rows.append(linear_laps.first_row(laps, candidate, device))
        program.release_memory(device)
    right = [
        (candidate, row)
        for candidate, row in zip(candidates, rows, strict=True)
        if row["status"] == "right"
    ]
    for candidate, row in right:
        memory = {}
        for phase in (FORWARD, FORWARD_BACKWARD):
            peak = clock.peak_extra_mib(_subject(laps, candidate, phase))[0]
            program.release_memory(device)
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
    return {
        "device": device.type,
        **linear_laps.describe(each, device),
        "floor": linear_floor.describe(floor_ms, each.flops(each.batch.valid_rows)),
        "rows": rows,
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.linear", description="Times the loss from hidden states."
    )
    parser.add_argument("--size", default=SIZE, metavar="NxHxV")
    parser.add_argument("--sequences", type=int, default=SEQUENCES, metavar="2P")
    program.add_options(parser, ROUNDS)
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
    program.check_options(parser, options, linear_candidates())
    options.batch = linear_batch.synthetic(
        sequences, tokens // sequences, hidden, vocabulary, "bfloat16"
    )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and records what the command line asks for.

    Returns:
        0 if all of this project's candidates were right and timed, else 1.
    """
    options = _parse(arguments)
    device = torch.device(options.device)
    clock = make_clock(device)
    laps = LinearLaps(options.batch, device)
    all_right = True
    for fraction in FRACTIONS:
        each = linear_batch.with_fraction(options.batch, fraction)
        case = measure(laps, each, options.candidates, clock, device, options.rounds)
        print("\n".join(linear_lines(case)), flush=True)
        if options.record is not None:
            records.append(options.record, {"kind": "linear", **case})
        ours = [row for row in case["rows"] if row["kind"] == "ours"]
        all_right &= all(row["status"] == "right" for row in ours)
        program.release_memory(device)
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
