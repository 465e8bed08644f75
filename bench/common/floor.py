"""The floor: what no implementation can go below on this machine, measured in the same rounds.

From logits, it follows from memory bandwidths and the rate of exponentials. On a CPU,
cpu/floor.cpp measures these, and is compiled where it runs. On a GPU, it is the bandwidth of a
copy. From hidden states, it is the bare matrix products.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import statistics
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common.cases import Batch
from bench.common.timing import Subject, Times

SOURCE = Path(__file__).resolve().parents[1] / "cpu" / "floor.cpp"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-fschedule-insns")
FLAGS += ("-pthread", "-shared", "-fPIC")

BUFFER_BYTES = 256 * 2**20
PREFETCH_BYTES = (1024, 2048, 4096)
EXP_REPEATS = 1500
EXP_TOLERANCE = 1e-4  # of the sum: a wrong exponential would be a fast one

BLOCKS = (0, 4096, 8192)  # columns of a matrix product; 0: all in one call

GIGA = 1e9


class FloorError(Exception):
    """The probes cannot be compiled or run here."""


class Floor(ABC):
    """Takes its turns among the subjects, and then says how long the work takes at least."""

    @abstractmethod
    def subjects(self) -> dict[str, Subject]:
        """What is timed, by names that no candidate has."""

    @abstractmethod
    def describe(self, times: Mapping[str, Mapping[str, Times]]) -> dict[str, float]:
        """``forward_ms`` and ``forward_backward_ms`` by the subjects' times, and rates."""


# ---- from logits -----------------------------------------------------------------------------


def logits_floor(rates: Mapping[str, float], batch: Batch) -> dict[str, float]:
    """Milliseconds by rates in GB/s, and 1e9 elements/s of the exponentials.

    With R scored rows, elements = R * V and bytes = elements * e:

        forward            = max(bytes / read, elements / exp)
        forward + backward = forward + max(2 * bytes / copy, elements / exp)
        the same in place  = forward + max(2 * bytes / update, elements / exp)

    exp is the rate for the logits' dtype. The gradient of masked rows and the first touch of fresh
    pages are left out, because an implementation can do without.
    """
    elements = batch.valid_rows * batch.vocabulary
    size = elements * batch.element_size
    exp_seconds = elements / (rates[f"exp_{batch.dtype}"] * GIGA)

    def milliseconds(moved: float, bandwidth: float) -> float:
        return 1e3 * max(moved / (bandwidth * GIGA), exp_seconds)

    forward = milliseconds(size, max(rates["read"], rates["read_prefetch"]))
    return {
        "forward_ms": forward,
        "forward_backward_ms": forward + milliseconds(2 * size, rates["copy"]),
        "forward_backward_in_place_ms": forward + milliseconds(2 * size, rates["update"]),
    }


class LogitsFloor(Floor):
    """The machine's rates, sampled once a round."""

    def __init__(self, batch: Batch, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._batch = batch
        self._probes = Probes(torch.get_num_threads(), buffer_bytes)
        self._samples: list[dict[str, float]] = []

    def subjects(self) -> dict[str, Subject]:
        """See the base class."""
        sample = self._probes.sample
        return {"floor": Subject(lambda: None, {"all": lambda _: self._samples.append(sample())})}

    def describe(self, times: Mapping[str, Mapping[str, Times]]) -> dict[str, float]:
        """See the base class. The rates are medians over the rounds."""
        rates = {
            name: statistics.median(sample[name] for sample in self._samples)
            for name in self._samples[0]
        }
        return {**logits_floor(rates, self._batch), **rates}


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
    "map_buffer": (_POINTER, (_INT64,)),
    "unmap_buffer": (None, (_POINTER, _INT64)),
    "read_seconds": (_DOUBLE, (_POINTER, _INT64, _INT, _INT64)),
    "copy_seconds": (_DOUBLE, (_POINTER, _POINTER, _INT64, _INT)),
    "update_seconds": (_DOUBLE, (_POINTER, _INT64, _INT)),
    "exp_variants": (_INT, ()),
    "exp_elements": (_INT64, ()),
    "exp_error": (_DOUBLE, (_INT, _INT)),
    "exp_seconds": (_DOUBLE, (_INT, _INT, _INT64, _INT)),
}


class Probes:
    """The compiled probes with their buffers. Every call uses all of the threads."""

    def __init__(self, threads: int, buffer_bytes: int) -> None:
        self._library = _compiled()
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments
        self._threads = threads
        self._bytes = self._rounded(buffer_bytes)
        self._buffers = (self._map(self._bytes), self._map(self._bytes))
        self._from, self._to = self._buffers
        self._prefetch = max(
            PREFETCH_BYTES, key=lambda ahead: max(self._read(ahead) for _ in range(3))
        )
        self._variants = {is_bfloat16: self._best_variant(is_bfloat16) for is_bfloat16 in (0, 1)}

    def __del__(self) -> None:
        for buffer in getattr(self, "_buffers", ()):
            self._library.unmap_buffer(buffer, self._bytes)

    def sample(self) -> dict[str, float]:
        """Every probe once: GB/s, or 1e9 elements/s where the name starts with exp."""
        library, size, threads = self._library, self._bytes, self._threads
        return {
            "read": self._read(0),
            "read_prefetch": self._read(self._prefetch),
            "copy": self._rate(2 * size, library.copy_seconds(self._to, self._from, size, threads)),
            "update": self._rate(2 * size, library.update_seconds(self._to, size, threads)),
            "exp_float32": self._exp(0, self._variants[0]),
            "exp_bfloat16": self._exp(1, self._variants[1]),
        }

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

    def _exp(self, is_bfloat16: int, variant: int) -> float:
        seconds = self._library.exp_seconds(is_bfloat16, variant, EXP_REPEATS, self._threads)
        elements = self._library.exp_elements() * EXP_REPEATS * self._threads
        return self._rate(elements, seconds)

    def _best_variant(self, is_bfloat16: int) -> int:
        variants = range(self._library.exp_variants())
        for variant in variants:
            error = self._library.exp_error(is_bfloat16, variant)
            if not error <= EXP_TOLERANCE:
                raise FloorError(f"exp_seconds: variant {variant} is wrong by {error:.1e}")
        return max(variants, key=lambda each: max(self._exp(is_bfloat16, each) for _ in range(3)))


class CopyFloor(Floor):
    """The fewest bytes at the bandwidth of a copy between two tensors of the device.

        forward             R V e                reads each scored row
        forward + backward  2 R V e + B T V e    reads it again, writes the gradient of all rows

    e is the size of an element. Smaller tensors are left out.
    """

    def __init__(self, batch: Batch, to: Tensor, source: Tensor) -> None:
        self._batch, self._to, self._from = batch, to, source

    def subjects(self) -> dict[str, Subject]:
        """See the base class."""
        return {"copy": Subject(lambda: None, {"all": lambda _: self._to.copy_(self._from)})}

    def describe(self, times: Mapping[str, Mapping[str, Times]]) -> dict[str, float]:
        """See the base class. A copy reads and writes every byte."""
        bytes_per_ms = 2 * self._from.nbytes / times["copy"]["all"].median_ms
        read = self._batch.valid_rows * self._batch.vocabulary * self._batch.element_size
        return {
            "forward_ms": read / bytes_per_ms,
            "forward_backward_ms": (2 * read + self._from.nbytes) / bytes_per_ms,
            "copy": bytes_per_ms * 1e3 / GIGA,
        }


# ---- from hidden states ----------------------------------------------------------------------


class LinearFloor(Floor):
    """The bare matrix products over the scored rows, by torch.mm into memory written to before.

        forward             logits = x W^T                      2 R V H flops
        forward + backward  the same, dx = dz W, dW = dz^T x    6 R V H flops

    In one call each, or in blocks of the vocabulary, whichever is fastest: the logits of a block
    stay nearer. The blocks' products for dx are not summed.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, flops: float) -> None:
        """Hidden [R, H] of the scored rows, and weight [V, H]."""
        self._hidden, self._weight, self._flops = hidden, weight, flops
        self._logits = hidden.new_ones(len(hidden) * len(weight))
        self._hidden_gradient = torch.ones_like(hidden)
        self._weight_gradient = torch.ones_like(weight)

    def subjects(self) -> dict[str, Subject]:
        """See the base class."""

        def subject(block: int) -> Subject:
            phases = {"forward": self.forward, "backward": self.backward}
            made = {name: lambda _, run=run: run(block) for name, run in phases.items()}
            return Subject(lambda: None, made)

        return {f"products in blocks of {block}": subject(block) for block in BLOCKS}

    def describe(self, times: Mapping[str, Mapping[str, Times]]) -> dict[str, float]:
        """See the base class. Of the fastest way for each phase."""
        ways = [times[name] for name in self.subjects()]
        both = min(way["forward"].median_ms + way["backward"].median_ms for way in ways)
        return {
            "forward_ms": min(way["forward"].median_ms for way in ways),
            "forward_backward_ms": both,
            "gflops": self._flops / both / 1e6,
        }

    def forward(self, block: int) -> None:
        """The logits."""
        for columns in self._blocks(block):
            torch.mm(self._hidden, self._weight[columns].t(), out=self._of(columns))

    def backward(self, block: int) -> None:
        """The two gradients, with the logits in the place of their gradient."""
        for columns in self._blocks(block):
            logits = self._of(columns)
            torch.mm(logits.t(), self._hidden, out=self._weight_gradient[columns])
            torch.mm(logits, self._weight[columns], out=self._hidden_gradient)

    def _blocks(self, block: int) -> list[slice]:
        vocabulary = len(self._weight)
        step = min(block or vocabulary, vocabulary)
        return [slice(at, min(at + step, vocabulary)) for at in range(0, vocabulary, step)]

    def _of(self, columns: slice) -> Tensor:
        """The logits of a block. All blocks use the same memory."""
        rows, width = len(self._hidden), columns.stop - columns.start
        return self._logits[: rows * width].view(rows, width)
