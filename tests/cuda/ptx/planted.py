"""Bugs to plant in the PTX of kernels. A check must find each of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .cases import far_rows, logps, preference, sequences, shards, token_rows
from .cases.logps_cases import SEGMENT, Case
from .families import Check
from .harness.checks import Checks
from .harness.kernels import Kernels
from .interpreter import KernelFault


def _logps(kernels: Kernels, checks: Checks) -> None:
    for V, offset in ((100, 1), (4999, 3)):
        logps.check_logps(kernels, checks, Case("bfloat16", V, seed=1, offset=offset))


def _sure(kernels: Kernels, checks: Checks) -> None:
    logps.check_logps(kernels, checks, Case("bfloat16", 100, sure=True, scale=0.7))


def _segments(kernels: Kernels, checks: Checks) -> None:
    """One block works on all segments: blocks never share rows of a part of the vocabulary."""
    V = 2 * SEGMENT["float32"] + 7
    case = Case("float32", V, B=1, T=2, num_masked=0, out_of_range=False, parts=(V - 1,))
    logps.check_logps(kernels, checks, case)


def _reports(kernels: Kernels, checks: Checks) -> None:
    V = 2 * SEGMENT["float32"] + 7
    case = Case("float32", V, B=1, T=2, num_masked=1, out_of_range=False, report="all")
    logps.check_logps(kernels, checks, case)


def _far_logps(kernels: Kernels, checks: Checks) -> None:
    far_rows.check_far_logps(kernels, checks, "bfloat16")


def _select(kernels: Kernels, checks: Checks) -> None:
    token_rows.check_select_tokens(kernels, checks, "bfloat16", 2, 4500, False, 5, True)


def _gather(kernels: Kernels, checks: Checks) -> None:
    token_rows.check_gather(kernels, checks, "bfloat16", 4104, 0, True)


def _hidden(kernels: Kernels, checks: Checks) -> None:
    token_rows.check_hidden_gradient(kernels, checks, "bfloat16", 1001, True, False, 0)


def _merge(kernels: Kernels, checks: Checks) -> None:
    shards.check_merge_shards(kernels, checks, "float32", 3, has_positions=False)


def _sequences(kernels: Kernels, checks: Checks) -> None:
    layout = sequences.Layout((2, 2600), seed=1, shift=True)
    sequences.check_sequence_logps(kernels, checks, "float32", True, layout)


def _pairs(kernels: Kernels, checks: Checks) -> None:
    rows = preference.Case(sequences.Layout((8, 21), seed=3), {})
    indices = np.random.default_rng(0).integers(0, 6, (600, 2))
    shared = preference.Case(sequences.Layout((6, 9), seed=7), {}, indices, has_weights=True)
    # More sequences than blocks.
    many = preference.Case(sequences.Layout((1100, 2), seed=7), {}, indices[:300])
    for case in (rows, shared, many):
        preference.check_case(kernels, checks, "float32", case)


FORWARD = "token_logps_kernel<BFloat16, ScaledLogits<float>, 128, 4, true, false>"
BACKWARD = "token_logps_backward_kernel<BFloat16, ScaledLogits<float>, 128, 4, true>"


# Kernels whose barriers are removed, one at a time, and what has to find that.
BARRIERS = {
    "token_logps_kernel<float, ScaledLogits<float>, 256, 4, false, false>": _segments,
    "token_logps_kernel<float, ScaledLogits<float>, 256, 4, false, true>": _reports,
    "select_tokens_kernel<float>": _select,
    "sequence_logps_kernel<float>": _sequences,
    "sum_sequences_kernel<float>": _pairs,
    "score_pairs_kernel<float>": _pairs,
    "preference_loss_backward_kernel<float>": _pairs,
}


class Bug(NamedTuple):
    name: str
    kernel: str
    pattern: str  # a regular expression
    replacement: str  # of each match
    check: Check


BUGS = [
    Bug("a shuffle from the wrong lane", FORWARD, ", 16, 31, -1;", ", 8, 31, -1;", _logps),
    Bug("the smaller one of two logits", FORWARD, r"max\.bf16x2", "min.bf16x2", _logps),
    Bug("log2(e) with three digits", FORWARD, "0f3FB8AA3B", "0f3FB87000", _logps),
    Bug(
        "sums of warps behind their array",
        FORWARD,
        r"(st\.shared\.f32\s+\[%\w+)\]",
        r"\1+16]",
        _logps,
    ),
    Bug("a sum that begins with nothing", FORWARD, r"mov\.[bf]64\s+%\w+, 0d0{16};", "", _logps),
    Bug(
        "halves of a word swapped",
        BACKWARD,
        r"(cvt\.rn\.bf16x2\.f32\s+%\w+), (%\w+), (%\w+)",
        r"\1, \3, \2",
        _logps,
    ),
    Bug(
        "vectors one further",
        BACKWARD,
        r"(st\.global\.cs\.v4\.u32\s+\[%\w+)\]",
        r"\1+16]",
        _logps,
    ),
    Bug("a bound one too far", BACKWARD, r"setp\.lt\.s64", "setp.le.s64", _logps),
    Bug(
        "offsets of 32 bits",
        BACKWARD,
        r"(mul\.lo\.s64\s+(%\w+), [^;]*;)",
        r"\1 { .reg .b32 %low; cvt.u32.u64 %low, \2; cvt.s64.s32 \2, %low; }",
        _far_logps,
    ),
    Bug("a sum of other lanes", "select_tokens_kernel<float>", r"sync\.idx", "sync.up", _select),
    Bug(
        "another vector's load",
        "gather_rows_kernel<BFloat16>",
        r"(ld\.global\.L1::no_allocate\.v4\.u32 \{[^}]*\}, \[%\w+)\]",
        r"\1+16]",
        _gather,
    ),
    Bug("a sum's sign", "hidden_gradient_kernel<BFloat16, true>", "add.f32", "sub.f32", _hidden),
    Bug(
        "the smaller maximum",
        "merge_shards_kernel<float>",
        r"setp\.lt\.f32",
        "setp.gt.f32",
        _merge,
    ),
    Bug("the smaller of two logs", "score_pairs_kernel<float>", r"max\.f64", "min.f64", _pairs),
]
# This is a bug only where products are fused with sums.
FUSED_BUG = Bug("a product that may be fused", FORWARD, r"mul\.rn\.f32", "mul.f32", _sure)


def plant(kernels: Kernels, bug: Bug) -> None:
    """Replaces all matches in the kernel's body."""
    name, body = _body(kernels, bug.kernel)
    changed = re.sub(bug.pattern, bug.replacement, body)
    assert changed != body, f"{bug.kernel}: nothing matches {bug.pattern!r}"
    kernels.replace(name, kernels.entries[name]._replace(body=changed))


def without_each_barrier(kernels: Kernels, kernel: str) -> Iterator[int]:
    """Removes the kernel's barriers one at a time, and yields the number of each."""
    name, body = _body(kernels, kernel)
    barriers = list(re.finditer(r"bar\.sync\s+0;", body))
    for i, barrier in enumerate(barriers):
        changed = body[: barrier.start()] + body[barrier.end() :]
        kernels.replace(name, kernels.entries[name]._replace(body=changed))
        yield i
    assert barriers, f"{kernel}: no barrier"


def _body(kernels: Kernels, kernel: str) -> tuple[str, str]:
    """The mangled name and the text of a kernel."""
    name = next(mangled for mangled, short in kernels.names.items() if short == kernel)
    return name, kernels.entries[name].body


def found_by(kernels: Kernels, check: Check) -> list[str]:
    """Runs a check and returns the faults that it finds."""
    checks = Checks()
    try:
        check(kernels, checks)
    except KernelFault as fault:
        return [str(fault)]
    reports = {report for profile in kernels.profiles.values() for report in profile.reports}
    return checks.failures + sorted(reports)
