"""A memory that tracks what may be accessed, what has been written, and by which thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .module import Array, KernelFault

# State flags of a byte.
READABLE, WRITABLE, WRITTEN = 1, 2, 4

# In place of a thread: no thread, or several, have accessed a unit since the last barrier.
_NOBODY, _MANY = -1, -2
_UNIT = 2  # bytes whose accesses are tracked together; smaller stores are not supported


_MOST_LOADS = 4096  # that are kept, with the places of their threads


class _Load(NamedTuple):
    """One load of several threads."""

    start: int
    end: int
    places: Array  # in units of size
    size: int
    threads: Array

    def overlaps(self, start: int, end: int) -> bool:
        return self.start < end and start < self.end


class Memory:
    """Bytes at addresses from base on, of which some are allocated."""

    def __init__(self, name: str, size: int, base: int = 0, tracks_threads: bool = True) -> None:
        self.name, self.base, self._tracks_threads = name, base, tracks_threads
        self.size = -(-size // 16) * 16
        self.data = np.full(self.size, 0xFF, np.uint8)  # NaN in every dtype
        self.state = np.zeros(self.size, np.uint8)
        self.writers = np.full(self.size // _UNIT, _NOBODY, np.int32)
        self.readers = np.full(self.size // _UNIT, _NOBODY, np.int32)
        self._loads: list[_Load] = []  # whose readers have not been noted yet
        self._stored = (self.size, 0)  # all stores since the last barrier lie between these places
        self._free = 16

    def allocate(
        self, size: int, alignment: int = 16, offset: int = 0, state: int = READABLE | WRITABLE
    ) -> int:
        """Allocates bytes, offset bytes behind an aligned address, with a gap on each side."""
        start = -(-self._free // alignment) * alignment + offset
        if start + size + 16 > self.size:
            raise MemoryError(f"{self.name} memory of {self.size} bytes is full")
        self.state[start : start + size] = state
        self._free = start + size + 16
        return self.base + start

    def bytes_at(self, address: int, size: int) -> Array:
        return self.data[address - self.base :][:size]

    def state_at(self, address: int, size: int) -> Array:
        return self.state[address - self.base :][:size]

    def forget_accesses(self, start: int = 0, size: int | None = None) -> None:
        """Acts as a barrier: accesses before it do not race with those after it."""
        if size is None:
            start, size = 0, self.size
            self._loads.clear()
            self._stored = (self.size, 0)
        self._note_readers(0, self.size)  # before those of the range are forgotten
        end = start + size
        self.writers[start // _UNIT : end // _UNIT] = _NOBODY
        self.readers[start // _UNIT : end // _UNIT] = _NOBODY

    def load(self, addresses: Array, dtype: np.dtype[Any], count: int, threads: Array) -> Array:
        """The values at each thread's address [threads, count]."""
        size = dtype.itemsize * count
        places = self._places(addresses, size, READABLE, threads, "load")
        if self._tracks_threads:
            self._note_load(places, addresses, size, threads)
        return self.data.view(dtype).reshape(-1, count)[places]

    def store(
        self, addresses: Array, values: Sequence[Any], dtype: np.dtype[Any], threads: Array
    ) -> None:
        size = dtype.itemsize * len(values)
        places = self._places(addresses, size, WRITABLE, threads, "store")
        self._note_store(places, addresses, size, threads)
        rows = self.data.view(dtype).reshape(-1, len(values))
        for i, value in enumerate(values):
            rows[places, i] = value
        self.state.reshape(-1, size)[places] |= WRITTEN

    def _places(self, addresses: Array, size: int, needed: int, threads: Array, verb: str) -> Array:
        """Checks the addresses and returns them in units of size."""

        def require(good: Array, problem: str) -> None:
            self._require(good, problem, addresses, size, threads, verb)

        # First all threads at once, then, if a check fails, the one that is to blame.
        offsets = addresses.astype(np.uint64) - np.uint64(self.base)
        wanted = needed | (WRITTEN if needed == READABLE else 0)
        if offsets.max() <= self.size - size and np.bitwise_or.reduce(offsets) % size == 0:
            places = (offsets // size).astype(np.int64)
            width = min(size, 8)
            states = self.state.view(f"<u{width}").reshape(-1, size // width)[places]
            everywhere = int.from_bytes(bytes([wanted] * width), "little")
            if int(np.bitwise_and.reduce(states, axis=None)) & everywhere == everywhere:
                return places
        require(offsets <= self.size - size, "out of bounds")
        require(offsets % size == 0, "misaligned")
        states = np.bitwise_and.reduce(self.state.reshape(-1, size)[offsets // size], axis=1)
        require(states & needed != 0, "out of bounds")
        require(states & wanted == wanted, "of uninitialised memory")
        raise AssertionError("unreachable")

    def _require(
        self, good: Array, problem: str, addresses: Array, size: int, threads: Array, verb: str
    ) -> None:
        if good.all():
            return
        bad = int(np.flatnonzero(~good)[0])
        raise KernelFault(
            f"{self.name} {verb} of {size} bytes {problem}, at {int(addresses[bad]):#x} by thread"
            f" {threads[bad]} ({int((~good).sum())} such threads)"
        )

    def _note_load(self, places: Array, addresses: Array, size: int, threads: Array) -> None:
        load = _Load(int(places.min()) * size, int(places.max() + 1) * size, places, size, threads)
        if load.overlaps(*self._stored):
            writers = self.writers.reshape(-1, size // _UNIT)[places]
            alone = ((writers == _NOBODY) | (writers == threads[:, None])).all(axis=1)
            self._require(alone, "that another thread has stored", addresses, size, threads, "load")
        self._loads.append(load)
        if len(self._loads) > _MOST_LOADS:
            self._note_readers(0, self.size)

    def _note_readers(self, start: int, end: int) -> None:
        """Notes the readers of all loads that overlap the range. Most are never stored to."""
        kept = []
        for load in self._loads:
            if not load.overlaps(start, end):
                kept.append(load)
                continue
            me, all_readers = load.threads[:, None], self.readers.reshape(-1, load.size // _UNIT)
            before = all_readers[load.places]
            all_readers[load.places] = np.where((before == _NOBODY) | (before == me), me, _MANY)
            shared = all_readers[load.places] != me  # also read by other threads in this same load
            if shared.any():
                all_readers[load.places[shared.any(axis=1)]] = _MANY
        self._loads = kept

    def _note_store(self, places: Array, addresses: Array, size: int, threads: Array) -> None:
        if size < _UNIT:
            raise NotImplementedError("stores of single bytes")

        def require(alone: Array, problem: str) -> None:
            self._require(alone, problem, addresses, size, threads, "store")

        start, end = int(places.min()) * size, int(places.max() + 1) * size
        self._note_readers(start, end)
        self._stored = min(start, self._stored[0]), max(end, self._stored[1])
        me, units = threads[:, None], size // _UNIT
        all_writers = self.writers.reshape(-1, units)
        all_readers = self.readers.reshape(-1, units)
        writers, readers = all_writers[places], all_readers[places]
        alone = ((writers == _NOBODY) | (writers == me)).all(axis=1)
        require(alone, "that another thread has stored")
        alone = ((readers == _NOBODY) | (readers == me)).all(axis=1)
        require(alone, "that another thread has loaded")
        all_writers[places] = me
        require((all_writers[places] == me).all(axis=1), "that another thread stores")
