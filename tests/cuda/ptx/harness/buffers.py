"""Named arrays in the memory of a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..interpreter import READABLE, WRITABLE, WRITTEN, KernelFault, Memory
from ..interpreter.module import Array

# How elements are stored.
_STORED: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int64": np.int64,
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Half of the distance between 1 and the next number above it.
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# The smallest positive number.
SMALLEST = {"float64": 2.0**-1074, "float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


def compute_of(dtype: str) -> str:
    """The dtype of arithmetic on elements."""
    return "float64" if dtype == "float64" else "float32"


def rounded(values: Any, dtype: str) -> Array:
    """The nearest numbers of a dtype, as float64."""
    return _decoded(_encoded(values, dtype), dtype)


def _encoded(values: Any, dtype: str) -> Array:
    if dtype == "int64":
        return np.asarray(values, np.int64)
    values = np.asarray(values, np.float64)
    if dtype != "bfloat16":
        return values.astype(_STORED[dtype])
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def _decoded(stored: Array, dtype: str) -> Array:
    if dtype == "int64":
        return stored
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


@dataclass
class Buffer:
    memory: Memory
    address: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def itemsize(self) -> int:
        return int(np.dtype(_STORED[self.dtype]).itemsize)

    def get(self, whole: bool = True) -> Array:
        """The values. Unless whole is False, all of them must have been written."""
        unwritten = self._state() & WRITTEN == 0
        if whole and unwritten.any():
            raise KernelFault(f"{int(unwritten.sum())} bytes of an output were not written")
        raw = self.memory.bytes_at(self.address, self._size()).tobytes()
        return _decoded(np.frombuffer(raw, _STORED[self.dtype]).reshape(self.shape), self.dtype)

    def written(self) -> Array:
        """Which elements have been written."""
        return (self._state() & WRITTEN != 0).all(-1)

    def allow_writes(self, where: Array) -> None:
        self._state()[where] |= WRITABLE

    def hide(self, where: Array) -> None:
        """Makes elements inaccessible."""
        self._state()[where] = 0

    def _size(self) -> int:
        return int(np.prod(self.shape)) * self.itemsize

    def _state(self) -> Array:
        """The state flags of each byte [*shape, itemsize]."""
        state = self.memory.state_at(self.address, self._size())
        return state.reshape(*self.shape, self.itemsize)


class Device:
    def __init__(self, size: int = 1 << 20) -> None:
        self.memory = Memory("global", size + (1 << 20), base=0x7F40_0000_0000)

    def put(self, values: Any, dtype: str, offset: int = 0, writable: bool = False) -> Buffer:
        """Stores an input, offset elements behind a 256-byte boundary."""
        stored = _encoded(values, dtype)
        state = READABLE | WRITTEN | (WRITABLE if writable else 0)
        address = self.memory.allocate(stored.nbytes, 256, offset * stored.itemsize, state)
        self.memory.bytes_at(address, stored.nbytes)[:] = np.frombuffer(stored.tobytes(), np.uint8)
        return Buffer(self.memory, address, stored.shape, dtype)

    def out(self, shape: tuple[int, ...], dtype: str, offset: int = 0) -> Buffer:
        """Allocates an output, which nobody has written yet."""
        itemsize = np.dtype(_STORED[dtype]).itemsize
        address = self.memory.allocate(int(np.prod(shape)) * itemsize, 256, offset * itemsize)
        return Buffer(self.memory, address, shape, dtype)
