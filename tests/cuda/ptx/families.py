"""Kernels that are checked together, their checks, and how much of their PTX these must run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from .cases import (
    far_rows,
    logps,
    logps_cases,
    preference,
    sequences,
    shards,
    shared_rows,
    token_rows,
)
from .harness.buffers import DTYPES
from .harness.checks import Checks
from .harness.coverage import coverage
from .harness.kernels import Kernels

Check: TypeAlias = Callable[[Kernels, Checks], None]

# Most of the other instructions cannot be reached: several segments in kernels for short rows,
# blocks that share rows in kernels with a report, special cases of the toolkit's exp and log.
LEAST_COVERAGE = 0.95

# The template argument for the dtype of logits in a kernel's name.
_ELEMENTS = {"float32": "float", "bfloat16": "BFloat16", "float16": "Float16", "float64": "double"}


class Family(NamedTuple):
    sources: tuple[str, ...]  # files of csrc/cuda
    check: Check
    dtype: str = ""  # of logits; empty: the kernels of all dtypes
    not_measured: str = ""  # a kernel that the coverage leaves out

    def names(self, kernels: Kernels) -> list[str]:
        """The mangled names of its kernels."""
        return [
            name
            for name, short in kernels.names.items()
            if kernels.source_of[name] in self.sources
            and (not self.dtype or f"<{_ELEMENTS[self.dtype]}," in short)
        ]

    def require_right(self, kernels: Kernels) -> None:
        """Runs the kernels, and prints the comparisons and the coverage."""
        checks, names = Checks(), self.names(kernels)
        self.check(kernels, checks)
        measured = [n for n in names if kernels.names[n].split("<")[0] != self.not_measured]
        found = coverage(kernels, measured)
        print(checks.summary(), found.report(), sep="\n")
        assert not checks.failures, "\n".join(checks.failures)
        never_launched = [kernels.names[name] for name in names if name not in kernels.profiles]
        assert names and not never_launched, never_launched
        reports = {report for name in names for report in kernels.profiles[name].reports}
        assert not reports, "\n".join(sorted(reports))
        assert found.share >= LEAST_COVERAGE, found.report()


def _check_logps(dtype: str, kernels: Kernels, checks: Checks) -> None:
    for case in logps_cases.cases(dtype):
        logps.check_logps(kernels, checks, case)
    far_rows.check_far_logps(kernels, checks, dtype)
    shared_rows.check_shared_rows(kernels, checks, dtype)


def _check_token_rows(kernels: Kernels, checks: Checks) -> None:
    token_rows.check_token_rows(kernels, checks)
    for dtype in DTYPES:
        far_rows.check_far_gathers(kernels, checks, dtype)
    for dtype, report in (("float32", "all"), ("float64", "all"), ("float64", "")):
        case = logps_cases.Case(dtype, 100, parts=(60,), report=report, out_of_range=False)
        logps.check_logps(kernels, checks, case)  # for write_logps


_LOGPS_SOURCES = ("token_logps_forward", "token_logps_report", "token_logps_backward")

LOGPS_FAMILIES = {
    f"logps {dtype}": Family(_LOGPS_SOURCES, functools.partial(_check_logps, dtype), dtype)
    for dtype in DTYPES
}
OTHER_FAMILIES = {
    # For compute_100, nvcc unrolls the loops over a short row 16 times, but the row has at most 8
    # elements.
    "token rows": Family(
        ("select_tokens", "gather_rows", "label_values", "hidden_gradient"),
        _check_token_rows,
        not_measured="gather_short_rows_kernel",
    ),
    "shards": Family(("vocab_shards",), shards.check_shards),
    "sequences": Family(("sequence_logps", "sequence_targets"), sequences.check_sequences),
    "pairs": Family(("preference_loss",), preference.check_preference),
}
FAMILIES = LOGPS_FAMILIES | OTHER_FAMILIES
