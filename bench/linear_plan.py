"""What a run of the linear benchmark measures, and about how long that takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench import cases, gate, linear_batch
from bench.linear_batch import LinearBatch
from bench.linear_floor import BLOCKS
from bench.linear_subjects import (
    BUDGETS,
    EAGER,
    LIGER,
    LIGER_COMPILED,
    OURS,
    OURS_0,
    OURS_UNLIMITED,
    TORCH,
)

FRACTIONS = (1.0, 0.4)
SMALL_BATCH, SMALL_HIDDEN, LARGE = 4, 1024, 128256
PEERS = (EAGER, TORCH, LIGER, LIGER_COMPILED)

SAMPLES = 3
QUICK_SAMPLES = 2
PATIENCE_SECONDS = 3.0  # of waiting for a quiet machine, in each case

# A lap that takes longer gets so many samples instead.
FEWER_SAMPLES = ((1000.0, SAMPLES), (2000.0, 2), (float("inf"), 1))
WARMED_MS = 1000.0  # the longest lap with a run before each turn that is not timed
# A lap that takes longer is timed while it is verified, and not again, but up to the second limit
# for this project with the default budget.
TIMED_ONCE_MS, TIMED_TWICE_MS = 4000.0, 10_000.0
NO_PEER_FORWARD_MS = 4000.0  # the longest lap of a peer whose forward alone is timed

# For the estimate: 1e9 flops a second of the bare products on the machine of the published results,
# how many times as long as these a lap of each subject takes, and what is done once.
GFLOPS = {"float32": 170.0, "bfloat16": 550.0}
LAPS = {OURS: 1.2, OURS_0: 1.5, OURS_UNLIMITED: 1.15, EAGER: 1.45, TORCH: 1.35, LIGER: 1.5,
        LIGER_COMPILED: 1.5}  # fmt: skip
FORWARD_SHARE = 0.37
COMPILE_SECONDS = 12.0
PROCESS_SECONDS = 6.0  # of a fresh one, and its imports
PREPARE_SECONDS = 2.5e-8  # for each element of the weight
VERIFY_SECONDS = 8e-9


@dataclass(frozen=True)
class Case:
    """A batch, and what is measured on it."""

    each: LinearBatch
    names: frozenset[str]  # of the candidates that are timed
    borrows: bool = False  # times of peers that are not timed are those with all positions valid
    memory: frozenset[str] = frozenset()  # names of the candidates whose memory is measured


@dataclass(frozen=True)
class Plan:
    """Cases in groups of the same tensors, and how carefully they are timed."""

    groups: tuple[tuple[Case, ...], ...]
    samples: int
    probe_bytes: int
    tolerance: float  # of the canaries
    calibration_samples: int
    patience_seconds: float

    def samples_for(self, lap_ms: float) -> int:
        """Fewer for slow laps."""
        return min(self.samples, next(count for limit, count in FEWER_SAMPLES if lap_ms <= limit))

    def cases(self) -> Iterator[Case]:
        """All of them."""
        for group in self.groups:
            yield from group


def takes_turns(name: str, lap_ms: float) -> bool:
    """Whether forward and backward are timed again after they have been verified."""
    return lap_ms <= (TIMED_TWICE_MS if name == OURS else TIMED_ONCE_MS)


def times_forward(name: str, lap_ms: float) -> bool:
    """Whether the forward alone is timed: of this project it does not depend on the budget."""
    return name == OURS if name in BUDGETS else lap_ms <= NO_PEER_FORWARD_MS


def _cases(shape: LinearBatch) -> tuple[Case, ...]:
    """What is measured on a shape of the full plan; linear.py says what is left out."""
    batch = shape.batch
    ours = frozenset(BUDGETS)
    peers = frozenset((EAGER, TORCH, LIGER))
    partial = linear_batch.with_fraction(shape, FRACTIONS[1])
    if batch.dtype == "float32" and batch.vocabulary == LARGE:
        if batch.batch > SMALL_BATCH:
            return (Case(shape, frozenset((OURS, OURS_0, EAGER))),)
        if shape.hidden > SMALL_HIDDEN:
            ours, peers = ours - {OURS_UNLIMITED}, peers - {LIGER}
        return (Case(shape, ours | peers), Case(partial, ours, borrows=True))
    if batch.batch > SMALL_BATCH or shape.hidden > SMALL_HIDDEN:
        return (Case(shape, ours | peers), Case(partial, ours, borrows=True))
    if batch.vocabulary == LARGE:
        return (
            Case(shape, ours | peers, memory=ours | peers),
            Case(partial, ours, borrows=True, memory=frozenset((OURS, OURS_0))),
        )
    memory = frozenset((OURS, OURS_0, EAGER, TORCH)) if batch.dtype == "float32" else frozenset()
    return (
        Case(shape, ours | frozenset(PEERS), memory=memory),
        Case(partial, ours | peers, borrows=True),
    )


def full_plan(samples: int = SAMPLES) -> Plan:
    """All of it."""
    shapes = [
        linear_batch.synthetic(batch, 512, hidden, vocabulary, dtype)
        for dtype in ("bfloat16", "float32")
        for vocabulary in (32000, LARGE)
        for batch in (SMALL_BATCH, 2 * SMALL_BATCH)
        for hidden in (SMALL_HIDDEN, 2 * SMALL_HIDDEN)
    ]
    largest = linear_batch.synthetic(2 * SMALL_BATCH, 512, 2 * SMALL_HIDDEN, LARGE, "float32")
    groups = [_cases(shape) for shape in shapes if shape != largest]
    ours = frozenset(BUDGETS)
    real = LinearBatch(cases.real(), 2 * SMALL_HIDDEN)
    return Plan(
        groups=(*groups, (Case(real, ours | {EAGER, TORCH, LIGER}, memory=ours | {EAGER, TORCH}),)),
        samples=samples,
        probe_bytes=256 * 2**20,
        tolerance=gate.TOLERANCE,
        calibration_samples=gate.CALIBRATION_SAMPLES,
        patience_seconds=PATIENCE_SECONDS,
    )


def quick_plan(samples: int = QUICK_SAMPLES) -> Plan:
    """Every step of the full one, on tiny shapes and with few peers. Its times say nothing."""
    shape = linear_batch.synthetic(2, 32, 64, 640, "float32")
    real = LinearBatch(cases.real(pairs=1, vocabulary=512, shrink=32), 64)
    peers = frozenset(PEERS) - {LIGER_COMPILED}
    ours = frozenset(BUDGETS)
    return Plan(
        groups=(
            (
                Case(shape, ours | peers, memory=frozenset((OURS,))),
                Case(linear_batch.with_fraction(shape, FRACTIONS[1]), ours, borrows=True),
            ),
            (Case(real, ours | {EAGER}),),
        ),
        samples=samples,
        probe_bytes=32 * 2**20,
        tolerance=0.5,
        calibration_samples=4,
        patience_seconds=0.2,
    )


def _timed_runs(plan: Plan, lap_ms: float) -> float:
    """Samples, and runs that warm."""
    return plan.samples_for(lap_ms) * (1.5 if lap_ms <= WARMED_MS else 1.0)


def _candidate_seconds(plan: Plan, case: Case, name: str, lap_ms: float) -> float:
    elements = case.each.batch.vocabulary * case.each.hidden
    forward_ms = lap_ms * (1.0 if name in (LIGER, LIGER_COMPILED) else FORWARD_SHARE)
    seconds = 0.0
    if name in case.memory:
        seconds += 2 * (PROCESS_SECONDS + PREPARE_SECONDS * elements)
        seconds += (lap_ms + forward_ms) / 1e3
    if name not in case.names:
        return seconds
    seconds += VERIFY_SECONDS * elements + lap_ms / 1e3
    if name == LIGER_COMPILED:
        seconds += COMPILE_SECONDS + lap_ms / 1e3
    if takes_turns(name, lap_ms):
        seconds += lap_ms / 1e3 * _timed_runs(plan, lap_ms)
    if times_forward(name, lap_ms):
        seconds += forward_ms / 1e3 * _timed_runs(plan, forward_ms)
    return seconds


def estimate_seconds(plan: Plan) -> float:
    """About how long a run takes on the machine of the published results."""
    seconds = 0.0
    for group in plan.groups:
        seconds += PREPARE_SECONDS * group[0].each.batch.vocabulary * group[0].each.hidden
        for case in group:
            each = case.each
            rate = 1e6 * GFLOPS[each.batch.dtype]
            valid_ms = each.flops(each.batch.valid_rows) / rate
            dense_ms = each.flops(each.tokens) / rate
            seconds += len(BLOCKS) * valid_ms / 1e3 * plan.samples_for(valid_ms)
            for name in case.names | case.memory:
                lap_ms = LAPS[name] * (valid_ms if name in BUDGETS else dense_ms)
                seconds += _candidate_seconds(plan, case, name, lap_ms)
    return seconds
