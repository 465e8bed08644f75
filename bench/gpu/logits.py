"""Measures per-token log-probabilities and the SimPO loss: every candidate, side by side.

    python -m bench.gpu.logits [--device cuda] [--sizes 32768x32000 ...] [--record FILE.jsonl]

Each batch is recorded as soon as it is measured. A candidate's values and gradient are compared
with float64 before it is timed. A wrong candidate is reported with its error and not timed.

GB/s is the fewest bytes that the work has to move (workload.py), divided by the median time.
Percentages are relative to a device-to-device copy of the logits, which is timed in the same rounds
and counts the bytes read and written.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench import records
from bench.common.peers import Candidate, candidates, our_token_logps
from bench.common.timing import Clock, Subject, Times, interleaved, make_clock
from bench.common.workload import (
    Reference,
    Size,
    Workload,
    fewest_bytes,
    gradient_error,
    make_reference,
    make_workload,
    value_error,
)
from bench.gpu import program
from bench.gpu.report import logits_lines

# Usual batches, a small one, and one with so few rows that most of a GPU may be idle.
SIZES = ("32768x32000", "16384x128256", "2048x128256", "64x262144")
VALID = (1.0, 0.4)
CAPPED_SIZES = ("16384x128256",)
SOFTCAP = 30.0
ROUNDS = 15

# Relative errors. A float32 result comes from float32 arithmetic. A bfloat16 result was rounded to
# 8 bits, and a gradient may have been computed from such a result.
VALUE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}
GRADIENT_TOLERANCE = {torch.float32: 2.0**-7, torch.bfloat16: 2.0**-6}


@dataclass(frozen=True)
class _Step:
    """What a phase hands to the next."""

    logits: Tensor
    output: Tensor | None = None
    gradient: Tensor | None = None


def _make_subject(candidate: Candidate, workload: Workload, buffer: Tensor) -> Subject:
    zero = torch.zeros((), dtype=buffer.dtype, device=buffer.device, requires_grad=True)

    def prepare() -> _Step:
        buffer.copy_(workload.logits)  # some candidates overwrite them
        # Part of a graph without a copy, like a model's output: a leaf may not be overwritten.
        return _Step(buffer.detach().add_(zero))

    def forward(step: _Step) -> _Step:
        return _Step(step.logits, candidate.forward(step.logits, workload.labels))

    def backward(step: _Step) -> _Step:
        assert step.output is not None
        gradient = candidate.backward(step.output, step.logits, workload.upstream)
        return _Step(step.logits, step.output.detach(), gradient)

    return Subject(prepare, {"forward": forward, "backward": backward})


def _copy_subject(workload: Workload, buffer: Tensor) -> Subject:
    return Subject(
        prepare=lambda: buffer.copy_(workload.logits),
        phases={"copy": lambda _: buffer.copy_(workload.logits)},
    )


def _errors(subject: Subject, work: str, reference: Reference) -> dict[str, Any]:
    """Runs a subject once and compares. The tolerances depend on the result's dtype."""
    step = subject.prepare()
    for phase in subject.phases.values():
        step = phase(step)
    if work == "token_logps":
        expected, upstream = reference.token_logps, reference.workload.upstream
    else:
        expected, upstream = reference.simpo_loss, reference.simpo_upstream
    return {
        "value_error": value_error(step.output, expected),
        "value_tolerance": VALUE_TOLERANCE[step.output.dtype],
        "gradient_error": gradient_error(step.gradient, upstream, reference),
        "gradient_tolerance": GRADIENT_TOLERANCE[step.output.dtype],
    }


def _checked(
    candidate: Candidate, subject: Subject, reference: Reference, clock: Clock, device: torch.device
) -> dict[str, Any]:
    """Status, errors and peak memory of a candidate. Only those with status "right" are timed."""
    result: dict[str, Any] = {
        "name": candidate.name,
        "work": candidate.work,
        "ours": candidate.is_ours,
    }
    is_available, reason = candidate.available(device)
    if not is_available:
        return {**result, "status": "unavailable", "reason": reason}
    try:
        errors = _errors(subject, candidate.work, reference)
        is_right = (
            errors["value_error"] <= errors["value_tolerance"]
            and errors["gradient_error"] <= errors["gradient_tolerance"]
        )
        # JSON has no NaN and no infinity.
        errors = {key: x if math.isfinite(x) else str(x) for key, x in errors.items()}
        result.update(errors)
        if not is_right:
            return {**result, "status": "wrong", "reason": "differs from float64 by too much"}
        program.release_memory(device)
        peaks = clock.peak_extra_mib(subject)
    except Exception as error:  # a peer may raise anything
        text = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {text[0] if text else ''}"
        return {**result, "status": "failed", "reason": reason}
    finally:
        program.release_memory(device)
    phases = zip(subject.phases, peaks, strict=True)
    peak_by_phase = {f"{phase}_peak_extra_mib": peak for phase, peak in phases}
    return {**result, "status": "right", **peak_by_phase}


def _speed(times: Times, moved_bytes: int, copy_gb_per_s: float) -> dict[str, Any]:
    gb_per_s = moved_bytes / times.median_ms / 1e6
    return {
        **asdict(times),
        "gb_per_s": gb_per_s,
        "percent_of_copy": 100.0 * gb_per_s / copy_gb_per_s,
    }


def measure(
    size: Size,
    valid_fraction: float,
    chosen: Sequence[Candidate],
    clock: Clock,
    device: torch.device,
    rounds: int,
    softcap: float | None = None,
) -> dict[str, Any]:
    """Measures one batch: the copy bandwidth, and errors and times of the candidates."""
    workload = make_workload(size, valid_fraction, device, softcap=softcap)
    reference = make_reference(workload)
    buffer = torch.empty_like(workload.logits)

    subjects = {each.name: _make_subject(each, workload, buffer) for each in chosen}
    results = [_checked(each, subjects[each.name], reference, clock, device) for each in chosen]
    right = {
        result["name"]: subjects[result["name"]]
        for result in results
        if result["status"] == "right"
    }
    times = interleaved({"copy": _copy_subject(workload, buffer), **right}, clock, rounds)

    moved = fewest_bytes(size, workload.valid_rows, buffer.element_size())
    copy_times = times["copy"]["copy"]
    copy_gb_per_s = 2 * buffer.nbytes / copy_times.median_ms / 1e6
    for result in results:
        if result["status"] == "right":
            of_candidate = times[result["name"]]
            result["forward"] = _speed(of_candidate["forward"], moved.forward, copy_gb_per_s)
            result["backward"] = _speed(of_candidate["backward"], moved.backward, copy_gb_per_s)
    return {
        "device": device.type,
        "dtype": "bfloat16",
        "softcap": softcap,
        "rows": size.rows,
        "vocabulary": size.vocabulary,
        "valid_fraction": valid_fraction,
        "valid_rows": workload.valid_rows,
        "logits_mib": buffer.nbytes / 2**20,
        "forward_bytes": moved.forward,
        "backward_bytes": moved.backward,
        "copy": {**asdict(copy_times), "gb_per_s": copy_gb_per_s},
        "candidates": results,
    }


def _sizes(texts: Sequence[str], parser: argparse.ArgumentParser) -> list[Size]:
    try:
        return [Size.parse(text) for text in texts]
    except ValueError as error:
        parser.error(str(error))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.logits", description="Times token_logps beside its peers."
    )
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="NxV")
    parser.add_argument("--valid", nargs="+", type=float, default=VALID, metavar="FRACTION")
    parser.add_argument(
        "--capped", nargs="*", default=CAPPED_SIZES, metavar="NxV", help="with a softcap, only ours"
    )
    program.add_options(parser, ROUNDS)
    options = parser.parse_args(arguments)
    options.sizes = _sizes(options.sizes, parser)
    options.capped = _sizes(options.capped, parser)
    if not all(0.0 < fraction <= 1.0 for fraction in options.valid):
        parser.error(f"--valid: expected fractions in (0, 1], got {options.valid}")
    program.check_options(parser, options, candidates())
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and records what the command line asks for.

    Returns:
        0 if all of this project's candidates were right and timed, else 1.
    """
    options = _parse(arguments)
    device = torch.device(options.device)
    clock = make_clock(device)
    batches = [
        (size, fraction, options.candidates, None)
        for size in options.sizes
        for fraction in options.valid
    ]
    batches += [(size, 1.0, our_token_logps(SOFTCAP), SOFTCAP) for size in options.capped]
    all_right = True
    for size, fraction, chosen, softcap in batches:
        run = measure(size, fraction, chosen, clock, device, options.rounds, softcap)
        print("\n".join(logits_lines(run)), flush=True)
        if options.record is not None:
            records.append(options.record, {"kind": "logits", **run})
        ours = [result for result in run["candidates"] if result["ours"]]
        all_right &= all(result["status"] == "right" for result in ours)
        program.release_memory(device)
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
