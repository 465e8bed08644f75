"""Times and peak memory of things that run in phases, on a GPU or a CPU, behind one interface.

A subject is prepared, and then its phases run one after another. Each phase gets what the one
before returned. Subjects take turns in every round, so that a change of the machine's state meets
all of them.

On a GPU, CUDA events stand between the phases. All of them are enqueued before the first is over:
the preparation keeps the GPU busy meanwhile, so that launches and Python stay out of the times.
Before the first event a large buffer is read, so that the L2 cache holds none of the subject's
data.
On a CPU, the wall clock is read between the phases, and caches are as the preparation left them.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
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

# One parallel region of this many elements wakes every thread of torch's pool.
WAKE_ELEMENTS_PER_THREAD = 2**15

# Beyond this multiple of its fastest sample, a median says as much about the machine's other work
# as about the subject.
DISTURBED = 1.2


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

    @property
    def is_disturbed(self) -> bool:
        """Whether the samples are too far apart to trust the median."""
        return self.median_ms > DISTURBED * self.min_ms


class Clock(ABC):
    """Where time is read."""

    @abstractmethod
    def laps(self, subject: Subject) -> list[float]:
        """Prepares and runs a subject once; milliseconds of each phase."""

    @abstractmethod
    def peak_extra_mib(self, subject: Subject) -> list[float | None]:
        """Peak memory of each phase above what stood before the first; None: unknown."""


class CudaClock(Clock):
    """CUDA events, and the counters of torch's caching allocator."""

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
    """The wall clock. A process knows its peak memory only once: memory.py measures it."""

    def __init__(self) -> None:
        self._wake = torch.ones(WAKE_ELEMENTS_PER_THREAD * torch.get_num_threads())

    def laps(self, subject: Subject) -> list[float]:
        """See the base class. What the last phase returns is freed after the clock has stopped."""
        prepared = carry = subject.prepare()
        gc.collect(0)
        self._wake.add_(1.0)
        times = [time.perf_counter()]
        for phase in subject.phases.values():
            carry = phase(carry)
            times.append(time.perf_counter())
        del carry, prepared
        return [(after - before) * 1e3 for before, after in itertools.pairwise(times)]

    def peak_extra_mib(self, subject: Subject) -> list[float | None]:
        """See the base class."""
        return [None for _ in subject.phases]


def make_clock(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def interleaved(
    subjects: Mapping[str, Subject], clock: Clock, rounds: int, budget_ms: float = math.inf
) -> dict[str, dict[str, Times]]:
    """Times of every phase of every subject, by the names of both.

    The order changes from round to round, so that no subject always finds the caches and the memory
    as the same other one left them. A subject that would take longer than ``budget_ms`` takes part
    in fewer rounds, but in one at least. They are spread evenly over the run.
    """
    names, order = list(subjects), random.Random(0)
    lap_ms = dict.fromkeys(subjects, 0.0)
    for _ in range(WARMUP_ROUNDS):
        for name, subject in subjects.items():
            if lap_ms[name] <= budget_ms / 2:
                lap_ms[name] = sum(clock.laps(subject))
    wanted = {
        name: rounds if rounds * lap <= budget_ms else max(1, int(budget_ms / lap))
        for name, lap in lap_ms.items()
    }
    samples: dict[str, list[list[float]]] = {name: [] for name in subjects}
    for index in range(rounds):
        order.shuffle(names)
        for name in names:
            if (index + 1) * wanted[name] // rounds > index * wanted[name] // rounds:
                samples[name].append(clock.laps(subjects[name]))
    return {
        name: {
            phase: Times.of([laps[position] for laps in samples[name]])
            for position, phase in enumerate(subject.phases)
        }
        for name, subject in subjects.items()
    }
