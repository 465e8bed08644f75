"""Batches of logits for every size of a row and every kernel of token_logps."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from ..harness.buffers import Buffer, Device
from ..interpreter.module import Array
from .members import IGNORED

# Columns of a segment of a row: csrc/cuda/rows.h.
SEGMENT = {"float64": 8192, "float32": 16384, "float16": 32768, "bfloat16": 32768}


class Case(NamedTuple):
    dtype: str
    V: int
    B: int = 2
    T: int = 4
    shift: bool = False
    offset: int = 0  # elements between a 256-byte boundary and the first logit
    padding: int = 0  # elements between rows
    scale: float = 1.0
    cap: float = 0.0
    amplitude: float = 4.0
    seed: int = 0
    report: str = ""  # "valid" or "all" rows are reported; "": none
    dlogits_offset: int | None = None  # like offset, for a separate gradient; None: in place
    parts: tuple[int, ...] = ()  # where the parts of the vocabulary end, except the last
    special: bool = False  # some rows hold infinities and NaN
    num_masked: int = 2
    out_of_range: bool = True  # some labels are out of range
    sure: bool = False  # labels have much larger logits, and all logits a large offset
    levels: bool = False  # some logits are 724 lower: exp of that in float64 is subnormal

    @property
    def N(self) -> int:
        return self.B * self.T

    @property
    def is_split(self) -> bool:
        return bool(self.parts)

    def ranges(self) -> list[range]:
        """The columns of each part of the vocabulary."""
        return [range(*each) for each in itertools.pairwise((0, *self.parts, self.V))]


def make_logits(case: Case, rng: np.random.Generator) -> Array:
    """Logits [N, V], before they are rounded."""
    x = rng.standard_normal((case.N, case.V)) * case.amplitude
    if case.levels:
        x[_low(case, rng)] -= 724.0
    if SEGMENT[case.dtype] < case.V:
        # Segments so far apart that exp of the distance is subnormal or 0.
        x[0, : SEGMENT[case.dtype]] -= 720.0
        x[1, -100:] -= 720.0
        x[-1, : SEGMENT[case.dtype]] += 800.0
    x[case.N // 2] += 100.0
    x[-1, rng.random(case.V) < 0.3] = -np.inf
    if case.special:
        x[0] = -np.inf
        x[1, case.V // 2] = np.nan
        x[2, case.V - 1] = np.inf
        x[3] = 0.0
    return x


def _low(case: Case, rng: np.random.Generator) -> Array:
    """Which logits are at the lower level. The pattern varies by row."""
    low = np.zeros((case.N, case.V), bool)
    for i, row in enumerate(low):
        if i % 4 == 0:
            row[:] = rng.random(case.V) < 0.5
        elif i % 4 == 1:  # the maximum rises after other logits have been added
            row[: case.V // 2] = True
        elif i % 4 == 2:  # all but the edges of the row
            row[1:-1] = True
        else:
            row[rng.integers(case.V, size=1 + case.V // 500)] = True
            row[:] = ~row
    return low


def make_targets(case: Case, rng: np.random.Generator, x: Array) -> Array:
    """The label that scores each row [N]. For case.sure, raises its logit."""
    targets = rng.integers(0, case.V, case.N)
    finite = np.flatnonzero(np.isfinite(x[-1]))
    if len(finite):
        targets[-1] = finite[0]
    rows = rng.permutation(case.N - 1 if case.special else case.N)
    if case.special:
        rows = rows[rows > 3]
    targets[rows[: case.num_masked]] = IGNORED
    if case.out_of_range:
        for row, label in zip(rows[case.num_masked :], (case.V, -1, 2**40), strict=False):
            targets[row] = label
    if case.shift:
        targets.reshape(case.B, case.T)[:, -1] = IGNORED
    if case.sure:
        scored = np.flatnonzero((targets >= 0) & (targets < case.V))
        x += 1000.0
        x[scored, targets[scored]] += 60.0
    return targets


def put_labels(device: Device, case: Case, targets: Array) -> Buffer:
    """Stores labels [B, T] that have these targets."""
    if not case.shift:
        return device.put(targets.reshape(case.B, case.T), "int64")
    labels = np.full((case.B, case.T), 2**50)
    labels[:, 1:] = targets.reshape(case.B, case.T)[:, :-1]
    buffer = device.put(labels, "int64")
    unused = np.zeros((case.B, case.T), bool)
    unused[:, 0] = True
    buffer.hide(unused)
    return buffer


class RowsBuffer(NamedTuple):
    """Rows [N, V] with padding between them, which no kernel may touch."""

    buffer: Buffer  # [N, stride]
    V: int

    @property
    def stride(self) -> int:
        return self.buffer.shape[1]

    def get(self, whole: bool = False) -> Array:
        return self.buffer.get(whole)[:, : self.V]


def _without_padding(buffer: Buffer, V: int) -> RowsBuffer:
    padding = np.zeros(buffer.shape, bool)
    padding[:, V:] = True
    buffer.hide(padding)
    return RowsBuffer(buffer, V)


def put_rows(device: Device, values: Array, case: Case) -> RowsBuffer:
    N, V = values.shape
    padded = np.zeros((N, V + case.padding))
    padded[:, :V] = values
    return _without_padding(device.put(padded, case.dtype, case.offset, writable=True), V)


def rows_out(device: Device, like: RowsBuffer, case: Case) -> RowsBuffer:
    """Allocates a separate gradient for those rows."""
    out = device.out(like.buffer.shape, case.dtype, case.dlogits_offset or 0)
    return _without_padding(out, like.V)


# Rows of a little over 16 KiB: two or more full batches of a small block's loads, and a rest.
_LARGE = {"float64": 2051, "float32": 4099, "bfloat16": 8195, "float16": 8195}
# Rows of several iterations of every loop, in a small block and in a large one.
_LOOPS = {
    "float64": (1501, 7003),
    "float32": (3999, 15003),
    "float16": (8001, 30003),
    "bfloat16": (8001, 30003),
}


def cases(dtype: str) -> list[Case]:
    found = []
    for V in (1, 7, 100, 1001, _LARGE[dtype]):
        found += _cases_of_size(dtype, V)
    for V, cap, report in itertools.product(_LOOPS[dtype], (0.0, 8.0), ("", "all")):
        one = Case(dtype, V, B=1, cap=cap, report=report)
        found += [
            one._replace(seed=30, scale=0.9, shift=True, out_of_range=report == ""),
            one._replace(seed=31, special=True, T=5, dlogits_offset=1),
            one._replace(seed=32, parts=(20, V - 20), out_of_range=False),
        ]
    found += _cases_of_levels(dtype) + _cases_of_segments(dtype)
    found.append(Case(dtype, 600, amplitude=30.0 if dtype == "float16" else 60.0, seed=10))
    return found


def _cases_of_segments(dtype: str) -> list[Case]:
    """Rows of several segments, which blocks share unless there is a report."""
    V = 2 * SEGMENT[dtype]
    one = Case(dtype, V + 77, B=1, T=4, out_of_range=False, num_masked=1, offset=1, seed=11)
    return [
        one._replace(dlogits_offset=0),
        one._replace(V=V, cap=1500.0, T=5, out_of_range=True),
        one._replace(report="all"),
        one._replace(report="all", cap=1500.0),
        one._replace(parts=(V - 5,)),
        one._replace(parts=(V - 5,), cap=1500.0),
    ]


def _cases_of_size(dtype: str, V: int) -> list[Case]:
    one = Case(dtype, V)
    found = [
        one._replace(offset=V % 2),
        one._replace(offset=3, padding=2, scale=0.7, shift=True, dlogits_offset=3, seed=1),
        one._replace(cap=5.0, dlogits_offset=1, offset=2, seed=2),
        one._replace(report="all", scale=1.3, seed=3),
        one._replace(report="valid", cap=15.0, scale=0.5, seed=4, padding=1),
        one._replace(sure=True, scale=0.7, seed=12),
        one._replace(sure=True, scale=0.7, seed=13, cap=50.0),
    ]
    if V >= 7:
        parts = one._replace(parts=(V // 3, V // 3, V - 2), out_of_range=False)
        found += [
            one._replace(special=True, report="valid", T=6, seed=5, dlogits_offset=0),
            parts._replace(seed=6, dlogits_offset=0, offset=1),
            parts._replace(seed=7, report="all", cap=9.0),
            parts._replace(seed=8, report="valid"),
        ]
    if V < 1000:
        found += [
            one._replace(offset=k, padding=k % 3, seed=20 + k, B=3, T=7) for k in (1, 3, 5, 7)
        ]
    return found


def _cases_of_levels(dtype: str) -> list[Case]:
    """Cases in which the exp of a double is subnormal or 0."""
    levels = Case(dtype, 100, seed=34, out_of_range=False, levels=True)
    forms = list(itertools.product(("", "all"), (0.0, 4000.0)))
    found = [levels._replace(report=report, parts=(50,), cap=cap) for report, cap in forms]
    if dtype != "float64":  # others use exp of a double only to merge sums
        return found
    found += [
        levels._replace(V=V, report=report, parts=parts, cap=cap)
        for V, parts in ((100, ()), (1501, ()), (1501, (50,)), (7003, ()), (7003, (50,)))
        for report, cap in forms
    ]
    wide = Case(dtype, 600, amplitude=200.0, report="all", seed=33, out_of_range=False, offset=1)
    found += [
        wide._replace(V=V, cap=cap) for V, cap in itertools.product((600, 1501, 7003), (0.0, 700.0))
    ]
    return found
