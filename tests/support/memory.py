"""The memory that tensors on the CPU take while a function runs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch


def _changes(function: Callable[[], object]) -> list[int]:
    """The bytes of each allocation, and minus those of each deallocation, in order."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def allocated_bytes(function: Callable[[], object]) -> int:
    """The sum of all allocations, including freed ones."""
    return sum(max(change, 0) for change in _changes(function))


def peak_bytes(function: Callable[[], object]) -> int:
    """The largest sum of memory in use, beyond what was in use before."""
    return max(accumulate(_changes(function), initial=0))
