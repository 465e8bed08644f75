"""Times on a machine that others disturb: samples between canaries, and turns that alternate.

A canary is a short program whose rate is known from the start of the run. Canaries run before and
after each sample; where one of them is slower than it should be, something else had the machine,
and the sample is dropped and taken again, as long as there is patience left.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from bench.timing import Times

TOLERANCE = 0.12  # how far below its calibrated rate a canary of a quiet machine may be
CALIBRATION_SAMPLES = 48
CALIBRATION_QUANTILE = 0.9
ATTEMPTS = 4  # at one sample
MIN_CLEAN_SHARE = 0.5  # of the wanted samples; with fewer clean ones the median is over all

# Threads of a pool that has just worked spin for a few milliseconds before they sleep.
SETTLE_SECONDS = 0.01
RETRY_SECONDS = 0.03

# A turn begins with a run that is not timed, as a training step follows another: while others had
# their turns, the system may have taken back the memory that this one allocates and frees.
SAMPLES_PER_TURN = 2

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class GatedTimes(Times):
    """Times of which some were dropped. Milliseconds."""

    dropped: int = 0
    disturbed: bool = False  # too few clean samples: these are of all that were taken


@dataclass
class Samples:
    """What one subject gathers, in milliseconds."""

    clean: list[float] = field(default_factory=list)
    dropped: list[float] = field(default_factory=list)

    def times(self, wanted: int) -> GatedTimes:
        """Of the clean samples, or of all of them where fewer than half of the wanted are clean."""
        is_disturbed = len(self.clean) < max(1, MIN_CLEAN_SHARE * wanted)
        used = self.clean + self.dropped if is_disturbed else self.clean
        return GatedTimes(
            statistics.median(used), min(used), max(used), len(used), len(self.dropped),
            is_disturbed,
        )  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """A subject's turns: what is not timed, and what says how many milliseconds it took."""

    warm: Callable[[], None]  # before the samples of a turn
    prepare: Callable[[], None]  # before each sample
    run: Callable[[], float]
    samples: int  # in all turns together


def rate_to_expect(rates: list[float]) -> float:
    """A high quantile: what the canary does when nobody disturbs, without the luckiest samples."""
    ordered = sorted(rates)
    return ordered[min(len(ordered) - 1, int(CALIBRATION_QUANTILE * len(ordered)))]


class Gate:
    """Lets samples through that were taken on a quiet machine."""

    def __init__(
        self,
        canaries: Callable[[], Mapping[str, float]],
        *,
        tolerance: float = TOLERANCE,
        calibration_samples: int = CALIBRATION_SAMPLES,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._canaries = canaries
        self._sleep = sleep
        self._clock = clock
        self._patience = 0.0
        self.tolerance = tolerance
        self.kept = 0
        self.dropped = 0
        readings = [canaries() for _ in range(calibration_samples)]
        self.expected = {
            name: rate_to_expect([reading[name] for reading in readings]) for name in readings[0]
        }

    def allow(self, seconds: float) -> None:
        """From now on, at most this long goes into waiting for quiet and into repeated samples."""
        self._patience = seconds

    def is_quiet(self) -> bool:
        """Whether all canaries are as fast as they should be."""
        reading = self._canaries()
        return all(
            reading[name] >= (1.0 - self.tolerance) * rate for name, rate in self.expected.items()
        )

    def sample(self, prepare: Callable[[], None], run: Callable[[], float], into: Samples) -> None:
        """Takes one sample, and others in its place while the machine is disturbed."""
        for attempt in range(ATTEMPTS):
            began = self._clock()
            prepare()
            self._sleep(SETTLE_SECONDS)
            was_quiet = self._wait_for_quiet()
            milliseconds = run()
            self._sleep(SETTLE_SECONDS)
            if was_quiet and self.is_quiet():
                self.kept += 1
                into.clean.append(milliseconds)
                return
            self.dropped += 1
            into.dropped.append(milliseconds)
            self._patience -= self._clock() - began
            if self._patience <= 0.0 or attempt == ATTEMPTS - 1:
                return

    def _wait_for_quiet(self) -> bool:
        while not self.is_quiet():
            if self._patience <= 0.0:
                return False
            self._sleep(RETRY_SECONDS)
            self._patience -= RETRY_SECONDS
        return True


def take_turns(
    turns: Mapping[Key, Turn],
    gate: Gate,
    between_rounds: Callable[[], None] = lambda: None,
) -> dict[Key, GatedTimes]:
    """Times of all subjects, which take turns in every round.

    One with fewer samples than the others skips rounds, evenly over the run.
    """
    samples: dict[Key, Samples] = {key: Samples() for key in turns}
    wanted = {key: -(-turn.samples // SAMPLES_PER_TURN) for key, turn in turns.items()}
    rounds = max(wanted.values(), default=0)
    left = {key: turn.samples for key, turn in turns.items()}
    for index in range(rounds):
        between_rounds()
        for key, turn in turns.items():
            if (index + 1) * wanted[key] // rounds == index * wanted[key] // rounds:
                continue
            turn.warm()
            for _ in range(min(SAMPLES_PER_TURN, left[key])):
                gate.sample(turn.prepare, turn.run, samples[key])
                left[key] -= 1
    return {key: samples[key].times(turn.samples) for key, turn in turns.items()}
