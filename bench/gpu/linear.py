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
from collections.abc import Sequence

import torch

from bench import records
from bench.common import cases
from bench.common.measure import measure
from bench.common.timing import make_clock
from bench.gpu import program
from bench.gpu.report import linear_lines
from bench.linear import LinearProblem, linear_candidates

SIZE = "16384x4096x128256"
SEQUENCES = 16
FRACTIONS = (1.0, 0.4)
ROUNDS = 4


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
    options.batch = cases.synthetic(
        sequences, tokens // sequences, vocabulary, "bfloat16", hidden=hidden
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
    all_right = True
    for fraction in FRACTIONS:
        problem = LinearProblem(cases.with_fraction(options.batch, fraction), device)
        found = measure(problem, options.candidates, clock, options.rounds)
        case = {"device": device.type, **found}
        print("\n".join(linear_lines(case)), flush=True)
        if options.record is not None:
            records.append(options.record, {"kind": "linear", **case})
        ours = [row for row in case["rows"] if row["kind"] == "ours"]
        all_right &= all(row["status"] == "right" for row in ours)
        del problem
        program.release_memory(device)
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
