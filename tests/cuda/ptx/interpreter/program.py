"""A kernel's instructions as functions that execute them for a group of threads."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from . import floats
from .arithmetic import operation_of
from .contraction import Products
from .module import (
    TYPES,
    Address,
    Array,
    Instruction,
    Kernel,
    KernelFault,
    Operand,
    Variable,
    Vector,
)

if TYPE_CHECKING:
    from .machine import Batch

WARP_SIZE = 32
PARAM_BASE = 1 << 48
SHARED_BASE = 0x400  # so that no variable lies at address 0
_GAP = 32  # bytes out of bounds around each variable
_BLOCK_ENDS = ("bra", "ret", "exit", "bar")  # which the machine executes, not the program
_CACHE_HINTS = ("L1::no_allocate", "cs", "nc")  # which change no value
_ULP = {"ex2": 2, "rcp": 1}  # the PTX manual's largest errors of .approx.ftz.f32


@dataclass(frozen=True)
class Rounding:
    """Choices that PTX leaves open in arithmetic."""

    # Sums take products without rounding them where PTX allows it, as ptxas makes them do.
    contracts: bool = False
    # Results of approximate instructions are off, within the PTX manual's limits.
    perturbs: bool = False


class Group:
    """Threads of a batch that are at the same instruction, in order."""

    def __init__(self, threads: Array, batch: Batch) -> None:
        self.threads = threads
        self.has_all_live = len(threads) == batch.num_live
        first, end = int(threads[0]), int(threads[-1]) + 1
        # For indexing: a slice makes no copy.
        self.select: Any = slice(first, end) if end - first == len(threads) else threads

    @functools.cached_property
    def has_whole_warps(self) -> bool:
        num_warps = int(np.count_nonzero(np.diff(self.threads // WARP_SIZE))) + 1
        return num_warps * WARP_SIZE == len(self.threads)


Step: TypeAlias = Callable[["Batch", Group], None]
Read: TypeAlias = Callable[["Batch", Group], Any]
Write: TypeAlias = Callable[["Batch", Group, Any], None]


class Program:
    def __init__(self, kernel: Kernel, rounding: Rounding | None = None) -> None:
        self.kernel, self._rounding = kernel, rounding or Rounding()
        self._products = Products()
        self._blocks: dict[int, tuple[list[Step], int]] = {}
        # Registers of one width are the rows of one array.
        self.num_rows: dict[int, int] = {}  # by the width in bytes
        self._places: dict[str, tuple[int, int, int]] = {}  # number, bytes, row
        for number, (name, kind) in enumerate(kernel.registers.items()):
            size = TYPES[kind].itemsize
            row = self.num_rows.setdefault(size, 0)
            self.num_rows[size] = row + 1
            self._places[name] = (number, size, row)
        self.symbols: dict[str, int] = {}
        self.params_size = self._lay_out(kernel.parameters, PARAM_BASE)
        self.shared_size = self._lay_out(kernel.shared, SHARED_BASE)

    def _lay_out(self, variables: list[Variable], base: int) -> int:
        end = _GAP
        for variable in variables:
            alignment = max(variable.alignment, 16)
            start = -(-end // alignment) * alignment
            self.symbols[variable.name] = base + start
            end = start + variable.size + _GAP
        return -(-end // 256) * 256

    def block(self, start: int) -> tuple[list[Step], int]:
        """The steps of the basic block that begins at an instruction, and where it ends."""
        if start not in self._blocks:
            instructions, steps, end = self.kernel.instructions, [], start
            self._products.clear()
            while end < len(instructions) and (end == start or end not in self.kernel.block_starts):
                if instructions[end].opcode not in _BLOCK_ENDS:
                    steps.append(self._step(instructions[end]))
                    if self._rounding.contracts:
                        self._products.note(instructions[end])
                end += 1
            self._blocks[start] = steps, end
        return self._blocks[start]

    # ---- instructions

    def _step(self, instruction: Instruction) -> Step:
        special = {"ld": self._load, "st": self._store, "mov": self._move, "shfl": self._shuffle}
        step = special.get(instruction.opcode, self._operation)(instruction)
        if not instruction.guard:
            return step
        read = self.reader(instruction.guard, "pred", instruction)

        def guarded(batch: Batch, group: Group) -> None:
            chosen = group.threads[read(batch, group) != instruction.guard_negated]
            if len(chosen):
                step(batch, Group(chosen, batch))

        return guarded

    def _operation(self, instruction: Instruction) -> Step:
        if found := self._products.in_sum(instruction):
            return self._multiply_add(instruction, *found)
        operation = operation_of(instruction)
        result, *sources = instruction.operands
        if len(sources) != len(operation.sources):
            raise NotImplementedError(str(instruction))
        write = self._writer(result, operation.result, instruction)
        narrows = instruction.opcode == "cvt"  # which may take the low bits of a register
        reads = [
            self.reader(*each, instruction, narrows)
            for each in zip(sources, operation.sources, strict=True)
        ]
        function = self._function(instruction, operation.function)
        # A loop over the sources would take longer than many operations.
        if len(reads) == 1:
            (a,) = reads
            return lambda batch, group: write(batch, group, function(a(batch, group)))
        if len(reads) == 2:
            a, b = reads
            return lambda batch, group: write(
                batch, group, function(a(batch, group), b(batch, group))
            )
        a, b, c = reads
        return lambda batch, group: write(
            batch, group, function(a(batch, group), b(batch, group), c(batch, group))
        )

    def _function(self, instruction: Instruction, exact: Callable[..., Any]) -> Callable[..., Any]:
        if not self._rounding.perturbs or instruction.modifiers != ("approx", "ftz", "f32"):
            return exact
        ulp = _ULP[instruction.opcode]
        # The toolkit's exp of a double relies on exact results of ex2 for integers.
        keeps_powers = instruction.opcode == "ex2"
        return lambda source: floats.perturbed(exact(source), ulp, keeps_powers)

    def _multiply_add(self, instruction: Instruction, place: int, product: Instruction) -> Step:
        """A sum or difference whose term at that place is a product, which is not rounded."""
        (kind,) = instruction.modifiers
        result, *terms = instruction.operands
        left, right = (self.reader(each, kind, instruction) for each in product.operands[1:])
        other = self.reader(terms[1 - place], kind, instruction)
        write = self._writer(result, kind, instruction)
        is_difference = instruction.opcode == "sub"

        def multiply_add(batch: Batch, group: Group) -> None:
            a, b, c = left(batch, group), right(batch, group), other(batch, group)
            if is_difference and place == 0:
                c = -c
            elif is_difference:
                a = -a
            write(batch, group, floats.fused_multiply_add(a, b, c))

        return multiply_add

    def _move(self, instruction: Instruction) -> Step:
        (kind,) = instruction.modifiers
        to, source = instruction.operands
        if isinstance(source, Vector):
            return self._join(instruction, kind, to, source)
        read = self.reader(source, kind, instruction)
        if isinstance(to, Vector):
            return self._split(instruction, kind, to, read)
        write = self._writer(to, kind, instruction)
        return lambda batch, group: write(batch, group, read(batch, group))

    def _join(self, instruction: Instruction, kind: str, to: Operand, source: Vector) -> Step:
        bits, wide = int(kind[1:]) // len(source.elements), TYPES[kind]
        reads = [self.reader(each, f"b{bits}", instruction) for each in source.elements]
        write = self._writer(to, kind, instruction)

        def join(batch: Batch, group: Group) -> None:
            value = wide.type(0)
            for i, read in enumerate(reads):
                value = value | (read(batch, group).astype(wide) << wide.type(i * bits))
            write(batch, group, value)

        return join

    def _split(self, instruction: Instruction, kind: str, to: Vector, read: Read) -> Step:
        bits, wide = int(kind[1:]) // len(to.elements), TYPES[kind]
        part = TYPES[f"b{bits}"]
        writes = [self._writer(each, f"b{bits}", instruction) for each in to.elements]

        def split(batch: Batch, group: Group) -> None:
            value = read(batch, group)
            for i, write in enumerate(writes):
                write(batch, group, (value >> wide.type(i * bits)).astype(part))

        return split

    def _access(self, instruction: Instruction) -> tuple[str, int, str]:
        """Space, number of elements, and their type."""
        modifiers = instruction.modifiers
        if modifiers[:2] == ("relaxed", "gpu"):  # memory here knows no order that this could relax
            modifiers = modifiers[2:]
        space, *hints, kind = modifiers
        count = 1
        for hint in hints:
            if re.fullmatch(r"v[248]", hint):
                count = int(hint[1:])
            elif hint not in _CACHE_HINTS:
                raise NotImplementedError(str(instruction))
        if space not in ("global", "shared", "param") or kind not in TYPES:
            raise NotImplementedError(str(instruction))
        return space, count, kind

    def _addresses(self, space: str, address: Operand, instruction: Instruction) -> Read:
        if not isinstance(address, Address):
            raise NotImplementedError(str(instruction))
        is_short = self.kernel.registers.get(address.base) == "b32" and space == "shared"
        width = "u32" if is_short else "u64"
        base = self.reader(address.base, width, instruction)
        offset = np.int64(address.offset).astype(TYPES[width])

        def read(batch: Batch, group: Group) -> Array:
            addresses = np.broadcast_to(base(batch, group) + offset, group.threads.shape)
            return batch.shared_addresses(addresses, group) if space == "shared" else addresses

        return read

    def _load(self, instruction: Instruction) -> Step:
        space, count, kind = self._access(instruction)
        to, address = instruction.operands
        addresses, dtype = self._addresses(space, address, instruction), TYPES[kind]
        results = to.elements if isinstance(to, Vector) else (to,)
        writes = [self._writer(each, kind, instruction, widens=True) for each in results]
        if len(writes) != count:
            raise NotImplementedError(str(instruction))

        def load(batch: Batch, group: Group) -> None:
            threads = batch.identities[group.select]
            values = batch.memories[space].load(addresses(batch, group), dtype, count, threads)
            for i, write in enumerate(writes):
                write(batch, group, values[:, i])

        return load

    def _store(self, instruction: Instruction) -> Step:
        space, count, kind = self._access(instruction)
        address, source = instruction.operands
        addresses, dtype = self._addresses(space, address, instruction), TYPES[kind]
        sources = source.elements if isinstance(source, Vector) else (source,)
        reads = [self.reader(each, kind, instruction, narrows=True) for each in sources]
        if len(reads) != count or space == "param":
            raise NotImplementedError(str(instruction))

        def store(batch: Batch, group: Group) -> None:
            threads = batch.identities[group.select]
            values = [read(batch, group) for read in reads]
            batch.memories[space].store(addresses(batch, group), values, dtype, threads)

        return store

    def _shuffle(self, instruction: Instruction) -> Step:
        sync, mode, kind = instruction.modifiers
        if sync != "sync" or kind != "b32" or mode not in ("bfly", "idx", "up", "down"):
            raise NotImplementedError(str(instruction))
        to, source, distance, clamp, mask = instruction.operands
        result, _, predicate = str(to).partition("|")
        write = self._writer(result, "b32", instruction)
        write_found = self._writer(predicate or "_", "pred", instruction)
        read = self.reader(source, "b32", instruction)
        controls = [self.reader(each, "u32", instruction) for each in (distance, clamp, mask)]

        def shuffle(batch: Batch, group: Group) -> None:
            by, packed, members = (each(batch, group).astype(np.int64) for each in controls)
            lane = group.threads % WARP_SIZE
            by, segment, limit = by & 31, packed >> 8 & 31, packed & 31
            first = lane & segment
            last = first | (limit & ~segment)
            if mode == "idx":
                wanted = first | (by & ~segment)
            else:
                wanted = {"bfly": lane ^ by, "up": lane - by, "down": lane + by}[mode]
            found = wanted >= last if mode == "up" else wanted <= last
            other = np.where(found, wanted, lane)
            if not (members >> other & 1).all():
                raise KernelFault("a shuffle from a lane that its mask leaves out")
            # The machine runs this only when all lanes of the mask are in the group.
            places = np.searchsorted(group.threads, group.threads - lane + other)
            write(batch, group, read(batch, group)[places])
            write_found(batch, group, found)

        return shuffle

    # ---- operands

    def _writer(
        self, operand: Operand, kind: str, instruction: Instruction, widens: bool = False
    ) -> Write:
        if operand == "_":
            return lambda batch, group, value: None
        if operand not in self._places:
            raise NotImplementedError(str(instruction))
        number, size, row = self._places[str(operand)]
        dtype = TYPES[kind]
        if dtype.itemsize != size:
            if not widens or dtype.itemsize > size:
                raise NotImplementedError(str(instruction))
            dtype = np.dtype(f"{dtype.kind}{size}")
        view = dtype.str

        def write(batch: Batch, group: Group, value: Any) -> None:
            batch.views[view][row][group.select] = value
            if batch.writers[number] is not group:
                batch.note_writer(number, group)

        return write

    def reader(
        self, operand: Operand, kind: str, instruction: Instruction, narrows: bool = False
    ) -> Read:
        dtype = TYPES[kind]
        if isinstance(operand, int | float):
            return self._constant(operand, dtype, instruction)
        name = str(operand)
        if name in self.symbols:
            return self._constant(self.symbols[name], dtype, instruction)
        if name not in self._places:
            return self._special(name, dtype)
        number, size, row = self._places[name]
        if dtype.itemsize != size and not (narrows and dtype.itemsize < size):
            raise NotImplementedError(str(instruction))
        view = dtype.str if dtype.itemsize == size else f"<u{size}"
        is_narrowed = dtype.itemsize < size

        def read(batch: Batch, group: Group) -> Any:
            if batch.writers[number] is not group and not batch.is_written_for(number, group):
                batch.profile.reports.add(f"{name} is read before it is written: {instruction}")
            value = batch.views[view][row][group.select]
            return value.astype(dtype) if is_narrowed else value

        return read

    @staticmethod
    def _special(name: str, dtype: np.dtype[Any]) -> Read:
        def read(batch: Batch, group: Group) -> Any:
            return batch.special[name][group.select].astype(dtype)

        if re.fullmatch(r"%laneid|%(tid|ntid|ctaid|nctaid)\.[xyz]", name):
            return read
        raise NotImplementedError(name)

    @staticmethod
    def _constant(value: float, dtype: np.dtype[Any], instruction: Instruction) -> Read:
        if isinstance(value, float) != (dtype.kind == "f"):
            raise NotImplementedError(str(instruction))
        if isinstance(value, int):
            constant = np.uint64(value % 2**64).astype(f"u{dtype.itemsize}").view(dtype)
        else:
            constant = dtype.type(value)
        return lambda batch, group: constant
