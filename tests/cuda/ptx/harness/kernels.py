"""The host functions of csrc/cuda in Python. The interpreter executes the kernels they launch."""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..interpreter import Memory, Profile, Program, Rounding, entries, parse, run
from ..interpreter.module import Entry
from .buffers import Buffer
from .build import Built
from .layouts import read_layouts

DTYPE_CODES = {"float64": 0, "float32": 1, "bfloat16": 2, "float16": 3}  # core/dtypes.h
CAPTURE_MODE_GLOBAL, CAPTURE_MODE_RELAXED = 0, 2  # cudaStreamCaptureMode

_FAILED = 999  # cudaErrorUnknown, for a launch that raised a Python exception
_HOST_FUNCTION = re.compile(r"\b(_ZN9simpo_ext4cuda\d+([a-z_]+)ERKNS_\d+\w+ArgsE(Pv)?)$", re.M)

_Size3 = ctypes.POINTER(ctypes.c_uint * 3)
_Launch = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, _Size3, _Size3, ctypes.POINTER(ctypes.c_void_p)
)
_Observe = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int)


class RuntimeCall(NamedTuple):
    """A call of the CUDA runtime that may initialize it or load code."""

    function: str
    capture_mode: int


class Kernels:
    """One architecture's kernels, behind the host functions that csrc/core/kernels.h declares."""

    def __init__(self, built: Built, rounding: Rounding | None = None) -> None:
        self.rounding = rounding or Rounding()
        self.ptx = built.ptx()
        self.entries: dict[str, Entry] = {}  # by mangled name
        self.source_of: dict[str, str] = {}
        for source, text in self.ptx.items():
            found = entries(text)
            self.entries.update(found)
            self.source_of.update(dict.fromkeys(found, source))
        self.names = dict(zip(self.entries, _demangled(self.entries), strict=True))
        self.profiles: dict[str, Profile] = {}  # of the kernels that have been launched
        self.runtime_calls: list[RuntimeCall] = []
        self.last_blocks: int | None = None  # executes only so many of a grid; None: all
        self._programs: dict[str, Program] = {}
        self._memory: Memory | None = None
        self._error: BaseException | None = None
        self._layouts = read_layouts(built.layouts)
        self._library = ctypes.CDLL(str(built.library))
        self._callbacks = _Launch(self._launch), _Observe(self._observe)  # kept alive
        self._functions = {
            name: mangled for mangled, name, _ in _HOST_FUNCTION.findall(_symbols(built))
        }

    def replace(self, name: str, entry: Entry) -> None:
        """Replaces the PTX of a kernel."""
        self.entries[name] = entry
        self._programs.pop(name, None)
        self.profiles.pop(name, None)

    # ---- host functions

    def call(self, name: str, memory: Memory, **members: Any) -> None:
        """Calls the host function of that name with a struct of these members.

        A buffer is passed as its address, None as a null pointer, a dtype's name as its code.
        """
        code = self._call(name, members, memory)
        if self._error is not None:
            raise self._error
        if code != 0:
            raise RuntimeError(f"{name}: error {code}")

    def _call(self, name: str, members: Mapping[str, Any], memory: Memory) -> int:
        struct = "".join(part.capitalize() for part in name.split("_")) + "Args"
        packed = ctypes.c_char_p(self._layouts[struct].pack(_plain(members)))
        self._memory, self._error = memory, None
        self._library.set_callbacks(*self._callbacks)
        code = int(getattr(self._library, self._functions[name])(packed, None))
        self._require_restored_mode(name)
        return code

    def shared_segments(self, dtype: str, N: int, V: int) -> int:
        """The number of segments of a row that blocks share in token_logps; 0: they share none."""
        function = self._library._ZN9simpo_ext4cuda15shared_segmentsENS_5DTypeEll
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        function.restype = ctypes.c_int64
        return int(function(DTYPE_CODES[dtype], N, V))

    def use_device(self, index: int) -> int:
        """Makes a device the current one. Returns 0 or an error code."""
        self._library.set_callbacks(*self._callbacks)
        code = int(self._library._ZN9simpo_ext4cuda10use_deviceEi(index))
        self._require_restored_mode("use_device")
        return code

    def set_device_unguarded(self, index: int) -> int:
        """Calls the runtime without the project's code around it. Returns 0 or an error code."""
        self._library.set_callbacks(*self._callbacks)
        return int(self._library.cudaSetDevice(index))

    def capture_mode(self) -> int:
        """The capture mode of this thread."""
        return int(self._library.current_capture_mode())

    def _require_restored_mode(self, name: str) -> None:
        mode = self.capture_mode()
        if mode != CAPTURE_MODE_GLOBAL:
            raise RuntimeError(f"{name}: left the thread in capture mode {mode}")

    # ---- what the fake runtime calls

    def _observe(self, function: bytes, capture_mode: int) -> None:
        self.runtime_calls.append(RuntimeCall(function.decode(), capture_mode))

    def _launch(self, name: bytes, grid: Any, block: Any, arguments: Any) -> int:
        try:
            self._execute(name.decode(), tuple(grid.contents), tuple(block.contents), arguments)
        except BaseException as error:  # it cannot pass through the C++ code; call() raises it
            self._error = error
            return _FAILED
        return 0

    def _execute(self, name: str, grid: Any, block: Any, arguments: Any) -> None:
        program = self._program(name)
        parameters = [
            ctypes.string_at(arguments[i], each.size)
            for i, each in enumerate(program.kernel.parameters)
        ]
        total = math.prod(grid)
        blocks = range(total - (self.last_blocks or total), total)
        assert self._memory is not None
        run(program, grid, block, parameters, self._memory, self.profiles[name], blocks)

    def _program(self, name: str) -> Program:
        if name not in self._programs:
            kernel = parse(self.entries[name])
            self._programs[name] = Program(kernel, self.rounding)
            self.profiles[name] = Profile(kernel)
        return self._programs[name]


def _plain(members: Mapping[str, Any]) -> dict[str, Any]:
    """Members as numbers."""
    plain = {}
    for name, value in members.items():
        if isinstance(value, Mapping):
            plain[name] = _plain(value)
        elif isinstance(value, Buffer):
            plain[name] = value.address
        elif name == "dtype":
            plain[name] = DTYPE_CODES[value]
        else:
            plain[name] = 0 if value is None else value
    return plain


def _symbols(built: Built) -> str:
    command = ["nm", "-D", "--defined-only", str(built.library)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _demangled(names: Iterable[str]) -> list[str]:
    """Names without namespaces and parameters, such as gather_rows_kernel<float>."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    ).stdout
    short = re.sub(r"simpo_ext::|cuda::|\(anonymous namespace\)::|^void ", "", text, flags=re.M)
    return [re.sub(r"\(\w+Args.*", "", line) for line in short.splitlines()]
