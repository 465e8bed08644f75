"""Peak memory of one lap beyond its inputs, by the resident pages of a process of its own.

The process first lets the candidate work on a small batch, so that code and threads are loaded. It
then makes the batch, notes what is resident, resets the kernel's record of the peak, and runs the
lap. If the kernel does not permit the reset, the peak so far must not lie above what is resident.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import re
from pathlib import Path
from typing import Any

from bench.common.cases import Case
from bench.common.processes import ApartError, apart


def peaks(program: str, case: Case, name: str, phases: tuple[str, ...]) -> dict[str, Any]:
    """``PHASE_mib`` of each phase, each from a process of its own; or ``reason``."""
    found: dict[str, Any] = {}
    request = {"program": program, "case": case.to_json(), "name": name}
    try:
        for phase in phases:
            found[f"{phase}_mib"] = apart("bench.common.memory:measure", phase=phase, **request)
    except ApartError as error:
        return {"reason": str(error)}
    return found


# ---- in the fresh process --------------------------------------------------------------------


def _kib(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"^{field}:\s*(\d+) kB", status, re.MULTILINE)
    assert found is not None, field
    return int(found[1])


def _give_back_free_memory() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Baseline:
    """What is resident before a candidate is at work."""

    def __init__(self) -> None:
        _give_back_free_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        except OSError:
            if _kib("VmHWM") > _kib("VmRSS") + 1024:
                raise RuntimeError("the kernel does not let the peak be reset") from None
        self._kib = _kib("VmRSS")

    def peak_extra_mib(self) -> float:
        """The peak since then."""
        return max(0, _kib("VmHWM") - self._kib) / 1024


def measure(program: str, case: dict[str, Any], name: str, phase: str) -> float:
    """Peak MiB of one phase. ``program`` is a module with ``make_problem`` and ``small``."""
    module = importlib.import_module(program)
    chosen = Case.from_json(case)
    problem = module.make_problem(chosen)
    # Compiled code is of one shape, and has to be compiled before anything is measured.
    is_compiled = problem.candidate(name).is_compiled
    warm = problem if is_compiled else module.make_problem(module.small(chosen))
    warm.lap(warm.candidate(name), phase, warm.prepare(warm.candidate(name)))
    del warm
    candidate = problem.candidate(name)
    prepared = problem.prepare(candidate)
    baseline = Baseline()
    problem.lap(candidate, phase, prepared)
    return baseline.peak_extra_mib()
