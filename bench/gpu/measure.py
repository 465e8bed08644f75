"""Measures the losses on a GPU: every candidate, side by side.

    python -m bench.gpu.measure logits|linear|sweep [--device cuda] [--quick] [--cases TEXT ...]
        [--candidates NAME ...] [--rounds N] [--library FILE.so] [--record FILE.jsonl]

The problems are those of logits.py and linear.py, in bfloat16. ``sweep`` has variants of the
kernels in the place of the peers. CUDA events time whole phases, and torch's allocator counts the
peak memory of each. From logits, the floor is the fewest bytes at the bandwidth of a copy.

Each case is recorded as soon as it is measured. ``--device cpu`` only checks that the program
works.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench import records
from bench.common import cases
from bench.common.cases import Batch
from bench.common.floor import CopyFloor
from bench.common.measure import Problem, measure, release_memory
from bench.common.peers import OURS
from bench.common.timing import make_clock
from bench.gpu import sweep
from bench.gpu.report import batch_lines
from bench.linear import LinearProblem
from bench.logits import LogitsProblem

# B, T, V, H. From logits: usual batches, a small one, and one with so few rows that most of a GPU
# may be idle. From hidden states: an output layer of Llama-3-8B's size.
USUAL = (8, 2048, 128256, 0)
SHAPES = {
    "logits": ((8, 4096, 32000, 0), USUAL, (8, 256, 128256, 0), (8, 8, 262144, 0)),
    "linear": ((16, 1024, 128256, 4096),),
    "sweep": (USUAL,),
}
QUICK_SHAPES = {
    "logits": ((8, 8, 1024, 0),),
    "linear": ((4, 32, 1024, 64),),
    "sweep": ((8, 8, 1024, 0),),
}
FRACTIONS = {"logits": (1.0, 0.4), "linear": (1.0, 0.4), "sweep": (1.0,)}
SOFTCAP = 30.0
ROUNDS = 7


class GpuLogits(LogitsProblem):
    """From logits, with the floor of a GPU."""

    def make_floor(self) -> CopyFloor:
        """See the base class."""
        return CopyFloor(self.batch, self._buffer, self._logits)


def _plan(kind: str, is_quick: bool) -> Iterator[tuple[str, Batch, float | None]]:
    """Name, batch and softcap of each case."""
    shapes = (QUICK_SHAPES if is_quick else SHAPES)[kind]
    for sequences, time, vocabulary, hidden in shapes:
        for fraction in FRACTIONS[kind]:
            batch = cases.synthetic(sequences, time, vocabulary, "bfloat16", fraction, hidden)
            yield batch.name, batch, None
    if kind == "logits":
        batch = cases.synthetic(*(shapes[0] if is_quick else USUAL)[:3], "bfloat16")
        yield f"{batch.name}, softcap {SOFTCAP:g}", batch, SOFTCAP


def _make(
    kind: str, batch: Batch, device: torch.device, softcap: float | None, library: Path | None
) -> Problem:
    if kind == "linear":
        return LinearProblem(batch, device)
    problem = GpuLogits(batch, device, softcap)
    if kind == "sweep":
        assert library is not None
        problem.candidates = [problem.candidate(OURS), *sweep.variants(library)]
    return problem


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.measure", description="Times the losses beside their peers."
    )
    parser.add_argument("kind", choices=SHAPES)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny cases, to try the program")
    parser.add_argument("--cases", nargs="+", metavar="TEXT", help="only cases that contain one")
    parser.add_argument("--candidates", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--library", type=Path, metavar="FILE.so", help="sweep: compiled variants")
    parser.add_argument("--record", type=Path, metavar="FILE.jsonl")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    if options.kind == "sweep" and options.library is None:
        parser.error("--library: expected the compiled variants of bench/cuda/sweep.cu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a CUDA device, torch finds none; use --device cpu")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and records what the command line asks for.

    Returns:
        0 if all of this project's candidates were right and timed, else 1.
    """
    options = _parse(arguments)
    device = torch.device(options.device)
    clock = make_clock(device)
    all_right, is_empty = True, True
    missing = set(options.candidates or ())
    for name, batch, softcap in _plan(options.kind, options.quick):
        title = f"{name}, {batch.share}"
        if options.cases and not any(text in title for text in options.cases):
            continue
        problem = _make(options.kind, batch, device, softcap, options.library)
        candidates = [
            each
            for each in problem.candidates
            if options.candidates is None or each.name in options.candidates
        ]
        missing -= {each.name for each in candidates}
        is_empty = False
        found = measure(problem, candidates, clock, options.rounds)
        case = {**found, "kind": options.kind, "device": device.type, "name": name}
        print("\n".join(batch_lines(case)), flush=True)
        if options.record is not None:
            records.append(options.record, case)
        # A variant of the kernels may need more of the GPU than there is.
        passing = ("right", "failed") if options.kind == "sweep" else ("right",)
        ours = [row for row in case["rows"] if row["kind"] == "ours"]
        all_right &= all(row["status"] in passing for row in ours)
        del problem, candidates
        release_memory(device)
    if missing or is_empty:
        raise SystemExit(f"found no case {options.cases}, or no candidates {sorted(missing)}")
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
