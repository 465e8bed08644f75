"""Times and peak memory of things that run in phases, on a GPU or a CPU, behind one interface.

A subject is prepared, and then its phases run one after another, each handed what the one before
returned. Subjects take turns in every round, so that a change of the machine's state meets all.

On a GPU, CUDA events stand between the phases, all of them enqueued before the first is over: the
preparation keeps the GPU busy meanwhile, so that launches and Python stay out of the times. Before
the first event a large buffer is read, which leaves the L2 cache with clean lines of no use to
anyone.
On a CPU, the wall clock is read between the phases, and caches are as the preparation left them.

gate.py times what runs in other processes, on a machine that others disturb.
"""

from __future__ import annotations

import itertools
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

WARMUP_ROUNDS = 2
FLUSH_BYTES = 2**30  # several times any L2
FLUSHES = 2


@dataclass(frozen=True)
class Subject:
    """Something to be timed."""

    prepare: Callable[[], Any]
    phases: Mapping[str, Callable[[Any], Any]]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one phase over the rounds."""

    median_ms: float
    min_ms: float
    max_ms: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> Times:
        """Summarises the samples."""
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))


class Clock(ABC):
    """Where time is read."""

    description: str

    @abstractmethod
    def laps(self, subject: Subject) -> list[float]:
        """Prepares and runs a subject once; milliseconds of each phase."""

    @abstractmethod
    def peak_extra_mib(self, subject: Subject) -> list[float | None]:
        """Peak of the memory of each phase over what stood before the first; None: unknown."""


class CudaClock(Clock):
    """CUDA events, and the counters of torch's caching allocator."""

    description = "CUDA events"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flushed = torch.zeros(FLUSH_BYTES // 4, device=device)

    def laps(self, subject: Subject) -> list[float]:
        """See the base class."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(subject.phases) + 1)]
        carry = subject.prepare()
        for _ in range(FLUSHES):
            self._flushed.amax()
        events[0].record()
        for event, phase in zip(events[1:], subject.phases.values(), strict=True):
            carry = phase(carry)
            event.record()
        torch.cuda.synchronize(self._device)
        return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]

    def peak_extra_mib(self, subject: Subject) -> list[float | None]:
        """See the base class."""
        carry = subject.prepare()
        torch.cuda.synchronize(self._device)
        before = torch.cuda.memory_allocated(self._device)
        peaks: list[float | None] = []
        for phase in subject.phases.values():
            torch.cuda.reset_peak_memory_stats(self._device)
            carry = phase(carry)
            torch.cuda.synchronize(self._device)
            peaks.append((torch.cuda.max_memory_allocated(self._device) - before) / 2**20)
        return peaks


class CpuClock(Clock):
    """The wall clock. Memory is not measured: a process knows only its own peak, once."""

    description = "wall clock"

    def laps(self, subject: Subject) -> list[float]:
        """See the base class."""
        carry = subject.prepare()
        times = [time.perf_counter()]
        for phase in subject.phases.values():
            carry = phase(carry)
            times.append(time.perf_counter())
        return [(after - before) * 1e3 for before, after in itertools.pairwise(times)]

    def peak_extra_mib(self, subject: Subject) -> list[float | None]:
        """See the base class."""
        return [None for _ in subject.phases]


def make_clock(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def interleaved(
    subjects: Mapping[str, Subject], clock: Clock, rounds: int
) -> dict[str, dict[str, Times]]:
    """Times of every phase of every subject, by the names of both."""
    samples: dict[str, list[list[float]]] = {name: [] for name in subjects}
    for index in range(WARMUP_ROUNDS + rounds):
        for name, subject in subjects.items():
            laps = clock.laps(subject)
            if index >= WARMUP_ROUNDS:
                samples[name].append(laps)
    return {
        name: {
            phase: Times.of([laps[position] for laps in samples[name]])
            for position, phase in enumerate(subject.phases)
        }
        for name, subject in subjects.items()
    }
