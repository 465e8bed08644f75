"""What this machine could do at best, and what that makes of a batch: the floor.

cpu/floor.cpp is compiled where it runs. Its probes take their turns between the subjects over the
whole run, so that a slow hour of the machine slows both.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parent / "cpu" / "floor.cpp"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-pthread", "-shared", "-fPIC")

PREFETCH_BYTES = (1024, 2048, 4096)
CANARY_BYTES = 64 * 2**20
CHAIN_STEPS = 400_000  # about a millisecond
EXP_REPEATS = 1500
EXP_TOLERANCE = 1e-4  # of the sum: a wrong exponential would be a fast one

GIGA = 1e9


class FloorError(Exception):
    """The probes cannot be compiled or run here."""


@dataclass(frozen=True)
class Rates:
    """Medians over the run: GB/s of resident memory on huge pages, and 1e9 elements/s."""

    read: float
    copy: float  # bytes read and bytes written, by non-temporal stores
    update: float  # bytes read and bytes written, in place
    exp_float32: float  # elements whose exponentials are summed, out of the first-level cache
    exp_bfloat16: float

    @classmethod
    def of(cls, medians: Mapping[str, float]) -> Rates:
        """Picks the rates that the floor is made of: of reads the better kind."""
        return cls(
            read=max(medians["read"], medians["read_prefetch"]),
            copy=medians["copy"],
            update=medians["update"],
            exp_float32=medians["exp_float32"],
            exp_bfloat16=medians["exp_bfloat16"],
        )


@dataclass(frozen=True)
class Floor:
    """Milliseconds that no implementation of the work can go below, by these rates."""

    forward_ms: float
    forward_backward_ms: float
    forward_backward_inplace_ms: float


def make_floor(rates: Rates, valid_rows: int, vocabulary: int, element_size: int) -> Floor:
    """The floor of a batch with ``valid_rows`` scored positions.

    With bytes = valid_rows * V * element_size and elements = valid_rows * V:

        forward            = max(bytes / read, elements / exp)
        forward + backward = forward + max(2 * bytes / copy, elements / exp)
        the same in place  = forward + max(2 * bytes / update, elements / exp)

    exp is the rate for the logits' dtype. The gradient of masked rows, and the first touch of fresh
    pages, are not in it: an implementation can do without.
    """
    elements = valid_rows * vocabulary
    size = elements * element_size
    exp_rate = rates.exp_float32 if element_size == 4 else rates.exp_bfloat16
    exp_seconds = elements / (exp_rate * GIGA)

    def seconds(moved: float, bandwidth: float) -> float:
        return max(moved / (bandwidth * GIGA), exp_seconds)

    forward = seconds(size, rates.read)
    return Floor(
        forward_ms=1e3 * forward,
        forward_backward_ms=1e3 * (forward + seconds(2 * size, rates.copy)),
        forward_backward_inplace_ms=1e3 * (forward + seconds(2 * size, rates.update)),
    )


def _compiled() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        raise FloorError("there is no C++ compiler: no c++ on the path, and CXX is not set")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "floor.so"
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(library)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise FloorError(f"{' '.join(command)} failed: {result.stderr.strip()[:2000]}")
        return ctypes.CDLL(str(library))


_POINTER, _INT, _INT64, _DOUBLE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
_SIGNATURES: dict[str, tuple[Any, Sequence[Any]]] = {
    "instruction_set": (ctypes.c_char_p, ()),
    "map_buffer": (_POINTER, (_INT64,)),
    "unmap_buffer": (None, (_POINTER, _INT64)),
    "read_seconds": (_DOUBLE, (_POINTER, _INT64, _INT, _INT64)),
    "copy_seconds": (_DOUBLE, (_POINTER, _POINTER, _INT64, _INT)),
    "update_seconds": (_DOUBLE, (_POINTER, _INT64, _INT)),
    "zero_seconds": (_DOUBLE, (_POINTER, _INT64, _INT)),
    "first_touch_seconds": (_DOUBLE, (_INT64, _INT, _INT)),
    "exp_variants": (_INT, (_INT,)),
    "exp_elements": (_INT64, ()),
    "exp_error": (_DOUBLE, (_INT, _INT)),
    "exp_seconds": (_DOUBLE, (_INT, _INT, _INT64, _INT)),
    "chain_seconds": (_DOUBLE, (_INT64, _INT)),
}


class Probes:
    """The compiled probes with their buffers. Every call uses all of the threads."""

    def __init__(self, threads: int, buffer_bytes: int) -> None:
        self._library = _compiled()
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments
        self._threads = threads
        self.instruction_set: str = self._library.instruction_set().decode()
        self._bytes = self._rounded(buffer_bytes)
        self._canary_bytes = self._rounded(min(CANARY_BYTES, buffer_bytes))
        self._canary_offset = 0
        self._from, self._to = self._map(self._bytes), self._map(self._bytes)
        self._prefetch = max(
            PREFETCH_BYTES, key=lambda ahead: max(self._read(ahead) for _ in range(3))
        )
        self._variants = {is_bfloat16: self._best_variant(is_bfloat16) for is_bfloat16 in (0, 1)}

    def close(self) -> None:
        """Gives the buffers back."""
        for buffer in (self._from, self._to):
            self._library.unmap_buffer(buffer, self._bytes)

    def describe(self) -> dict[str, Any]:
        """What was chosen for this machine."""
        return {
            "instruction_set": self.instruction_set,
            "threads": self._threads,
            "buffer_mib": self._bytes / 2**20,
            "prefetch_bytes": self._prefetch,
        }

    def sample(self) -> dict[str, float]:
        """Every probe once: GB/s, or 1e9 elements/s where the name starts with exp."""
        library, size, threads = self._library, self._bytes, self._threads
        return {
            "read": self._read(0),
            "read_prefetch": self._read(self._prefetch),
            "copy": self._rate(2 * size, library.copy_seconds(self._to, self._from, size, threads)),
            "update": self._rate(2 * size, library.update_seconds(self._to, size, threads)),
            "zero": self._rate(size, library.zero_seconds(self._to, size, threads)),
            "first_touch_4k": self._first_touch(0),
            "first_touch_huge": self._first_touch(1),
            "exp_float32": self._exp(0, self._variants[0]),
            "exp_bfloat16": self._exp(1, self._variants[1]),
        }

    def canaries(self) -> dict[str, float]:
        """Steps of a dependent chain in 1e9/s, and the read bandwidth in GB/s: 2 to 5 ms.

        Each reads another part of the buffer, since the last one may still be in the caches.
        """
        chain = self._library.chain_seconds(CHAIN_STEPS, self._threads)
        size = self._canary_bytes
        start = self._from + self._canary_offset
        self._canary_offset = (self._canary_offset + size) % (self._bytes // size * size)
        read = self._library.read_seconds(start, size, self._threads, self._prefetch)
        return {"clock": self._rate(CHAIN_STEPS, chain), "bandwidth": self._rate(size, read)}

    def _rounded(self, size: int) -> int:
        step = 2**21 * self._threads
        return max(1, size // step) * step

    def _map(self, size: int) -> int:
        buffer = self._library.map_buffer(size)
        if not buffer:
            raise FloorError(f"no memory for a buffer of {size} bytes")
        return buffer

    @staticmethod
    def _rate(amount: float, seconds: float) -> float:
        return amount / seconds / GIGA

    def _read(self, prefetch: int) -> float:
        seconds = self._library.read_seconds(self._from, self._bytes, self._threads, prefetch)
        return self._rate(self._bytes, seconds)

    def _first_touch(self, huge: int) -> float:
        size = self._rounded(self._bytes // 4)
        return self._rate(size, self._library.first_touch_seconds(size, self._threads, huge))

    def _exp(self, is_bfloat16: int, variant: int) -> float:
        seconds = self._library.exp_seconds(is_bfloat16, variant, EXP_REPEATS, self._threads)
        elements = self._library.exp_elements() * EXP_REPEATS * self._threads
        return self._rate(elements, seconds)

    def _best_variant(self, is_bfloat16: int) -> int:
        variants = range(self._library.exp_variants(is_bfloat16))
        for variant in variants:
            error = self._library.exp_error(is_bfloat16, variant)
            if not error <= EXP_TOLERANCE:
                raise FloorError(f"exp_seconds: variant {variant} is wrong by {error:.1e}")
        return max(variants, key=lambda each: max(self._exp(is_bfloat16, each) for _ in range(3)))
