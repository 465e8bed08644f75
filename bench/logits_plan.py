"""What a run of the logits benchmark measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench import cases, gate, overhead
from bench.cases import Batch
from bench.trainers import LossCandidate

SAMPLES = 6
QUICK_SAMPLES = 2
PATIENCE_SECONDS = 8.0  # of waiting for a quiet machine, in each case

FRACTIONS = (1.0, 0.4, 0.1)
HUGE_FRACTIONS = (1.0, 0.4)


@dataclass(frozen=True)
class Plan:
    """Shapes and shares, and how long and how carefully."""

    shapes: tuple[Batch, ...]
    fractions: tuple[float, ...]  # of the synthetic shapes
    huge_fractions: tuple[float, ...]
    samples: int
    probe_bytes: int
    tolerance: float  # of the canaries
    calibration_samples: int
    patience_seconds: float
    overhead_samples: int
    lower_levels: frozenset[str]  # names of shapes on which lower instruction sets are measured
    ours_memory: frozenset[str]  # names of shapes on which this project's memory is measured
    peers_memory: frozenset[str]  # and the peers', with all positions valid or the real batch
    is_quick: bool = False

    def batches(self, shape: Batch, pages: str) -> Iterator[Batch]:
        """The shape with every share that is to be measured."""
        if shape.name.startswith("real"):
            yield shape
            return
        for fraction in self.fractions if pages == "default" else self.huge_fractions:
            yield cases.with_fraction(shape, fraction)

    def includes(self, candidate: LossCandidate, shape: Batch, pages: str) -> bool:
        """Whether a candidate is measured on a shape."""
        if candidate.name == "Princeton float32" and shape.dtype == "float32":
            return False  # it is the formula
        if not self.is_quick or candidate.is_ours:
            return True
        if pages == "huge":
            return candidate.name == "F.cross_entropy"
        return candidate.kind != "compile" or (
            candidate.name == "torch.compile" and shape.name == self.shapes[0].name
        )

    def measures_memory(self, kind: str, batch: Batch) -> bool:
        """Whether the memory of a kind of candidate is measured on a batch."""
        if kind.startswith("ours"):
            return batch.name in self.ours_memory
        is_widest = batch.share == "100%" or batch.name.startswith("real")
        return is_widest and batch.name in self.peers_memory


def full_plan(samples: int = SAMPLES) -> Plan:
    """All of it."""
    shapes = (
        cases.synthetic(4, 512, 32000, "float32"),
        cases.synthetic(4, 512, 32000, "bfloat16"),
        cases.synthetic(2, 512, 128256, "bfloat16"),
        cases.synthetic(8, 128, 32000, "float32"),
        cases.synthetic(2, 2048, 32000, "bfloat16"),
        cases.synthetic(1, 64, 262144, "bfloat16"),
        cases.real(),
    )
    return Plan(
        shapes=shapes,
        fractions=FRACTIONS,
        huge_fractions=HUGE_FRACTIONS,
        samples=samples,
        probe_bytes=256 * 2**20,
        tolerance=gate.TOLERANCE,
        calibration_samples=gate.CALIBRATION_SAMPLES,
        patience_seconds=PATIENCE_SECONDS,
        overhead_samples=overhead.SAMPLES,
        lower_levels=frozenset(shape.name for shape in shapes[:3]),
        ours_memory=frozenset(shape.name for shape in shapes),
        peers_memory=frozenset((shapes[0].name, shapes[2].name, shapes[-1].name)),
    )


def quick_plan(samples: int = QUICK_SAMPLES) -> Plan:
    """Every step of the full one, on tiny shapes and with few peers. Its times say nothing."""
    shapes = (
        cases.synthetic(2, 16, 512, "float32"),
        cases.real(pairs=1, vocabulary=512, shrink=32),
    )
    return Plan(
        shapes=shapes,
        fractions=(1.0, 0.4),
        huge_fractions=(1.0,),
        samples=samples,
        probe_bytes=32 * 2**20,
        tolerance=0.5,
        calibration_samples=4,
        patience_seconds=0.2,
        overhead_samples=4,
        lower_levels=frozenset((shapes[0].name,)),
        ours_memory=frozenset((shapes[1].name,)),
        peers_memory=frozenset(),
        is_quick=True,
    )
