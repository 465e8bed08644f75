"""The order in which threads run.

The blocks of a batch run together. A register is an array with one element for each thread. Threads
at the same instruction form a group. The group at the lowest instruction runs next, up to the end
of its basic block, where groups split and merge.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

from .memory import READABLE, WRITABLE, WRITTEN, Memory
from .module import Array, Instruction, KernelFault
from .profile import Profile
from .program import PARAM_BASE, SHARED_BASE, WARP_SIZE, Group, Program

Size3: TypeAlias = tuple[int, int, int]

# Larger batches spend less of the interpreter's time per thread; smaller ones need less memory.
_THREADS_OF_A_BATCH = 8192


class Batch:
    """Some blocks of a grid, executed together."""

    def __init__(
        self,
        program: Program,
        grid: Size3,
        block: Size3,
        parameters: Sequence[bytes],
        memory: Memory,
        blocks: range,
        profile: Profile,
    ) -> None:
        self.program, self.kernel, self.profile = program, program.kernel, profile
        per_block = block[0] * block[1] * block[2]
        if per_block % WARP_SIZE:
            raise NotImplementedError("blocks of partial warps")
        if self.kernel.max_threads and per_block > self.kernel.max_threads:
            raise KernelFault(f"a block of {per_block} threads, above .maxntid")
        self.size = len(blocks) * per_block
        self.threads = np.arange(self.size)
        self.block_of_thread = self.threads // per_block
        # Memory identifies threads by their numbers in the whole grid.
        numbers = self.threads + blocks.start * per_block
        self.identities = (numbers % 2**31).astype(np.int32)
        self.special = self._special_registers(grid, block, blocks)

        bits = {size: np.zeros((n, self.size), f"u{size}") for size, n in program.num_rows.items()}
        self.views: dict[str, Array] = {"|b1": bits[1].view(np.bool_)} if 1 in bits else {}
        for size, array in bits.items():
            if size > 1:
                views = {f"<{kind}{size}": array.view(f"<{kind}{size}") for kind in "uif"}
                self.views.update(views)
        # For each register: the last group that wrote it, the threads that wrote it before, and
        # whether all live threads have written it.
        self.writers: list[Group | None] = [None] * len(self.kernel.registers)
        self._written = np.zeros((len(self.kernel.registers), self.size), np.bool_)
        self._is_written = [False] * len(self.kernel.registers)

        self.memories = {
            "global": memory,
            "param": self._param_memory(parameters),
            "shared": self._shared_memory(len(blocks)),
        }
        self.ready: dict[int, list[Array]] = {0: [self.threads]}
        self.stalled: dict[int, Array] = {}  # at a shuffle that other lanes have not reached
        self.at_barrier: dict[int, tuple[int, list[Array]]] = {}  # by block
        self.live = np.full(len(blocks), per_block)
        self.num_live = self.size

    def _special_registers(self, grid: Size3, block: Size3, blocks: range) -> dict[str, Array]:
        within = self.threads % (block[0] * block[1] * block[2])
        index = np.arange(blocks.start, blocks.stop)[self.block_of_thread]
        special = {"%laneid": self.threads % WARP_SIZE}
        for axis, name in enumerate("xyz"):
            special[f"%tid.{name}"], within = within % block[axis], within // block[axis]
            special[f"%ctaid.{name}"], index = index % grid[axis], index // grid[axis]
            special[f"%ntid.{name}"] = np.full(self.size, block[axis])
            special[f"%nctaid.{name}"] = np.full(self.size, grid[axis])
        return {name: value.astype(np.uint32) for name, value in special.items()}

    def _param_memory(self, parameters: Sequence[bytes]) -> Memory:
        memory = Memory("param", self.program.params_size, PARAM_BASE, tracks_threads=False)
        for variable, value in zip(self.kernel.parameters, parameters, strict=True):
            if len(value) != variable.size:
                raise ValueError(
                    f"{variable.name}: expected {variable.size} bytes, got {len(value)}"
                )
            address = self.program.symbols[variable.name]
            memory.bytes_at(address, variable.size)[:] = np.frombuffer(value, np.uint8)
            memory.state_at(address, variable.size)[:] = READABLE | WRITTEN
        return memory

    def _shared_memory(self, num_blocks: int) -> Memory:
        size = self.program.shared_size
        memory = Memory("shared", num_blocks * size)
        state = memory.state.reshape(num_blocks, size)
        for variable in self.kernel.shared:
            start = self.program.symbols[variable.name] - SHARED_BASE
            state[:, start : start + variable.size] = READABLE | WRITABLE
        return memory

    def shared_addresses(self, addresses: Array, group: Group) -> Array:
        """Maps addresses in each block's shared memory to those in the batch's."""
        within = addresses.astype(np.int64) - SHARED_BASE
        if ((within < 0) | (within >= self.program.shared_size)).any():
            raise KernelFault("shared access out of bounds")
        return within + self.block_of_thread[group.select] * self.program.shared_size

    # ---- which registers have been written

    def note_writer(self, register: int, group: Group) -> None:
        last = self.writers[register]
        self.writers[register] = group
        if group.has_all_live:
            self._is_written[register] = True
        elif last is not None and not self._is_written[register]:
            self._written[register][last.threads] = True

    def is_written_for(self, register: int, group: Group) -> bool:
        """Whether all threads of the group have written the register."""
        if self._is_written[register]:
            return True
        last = self.writers[register]
        if last is not None:
            self._written[register][last.threads] = True
        return bool(self._written[register][group.select].all())

    # ---- scheduling

    def run(self) -> None:
        while self.ready:
            start = min(self.ready)
            parts = self.ready.pop(start)
            if start in self.stalled:
                parts.append(self.stalled.pop(start))
            threads = parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts))
            self._run_block(start, Group(threads, self))
        if self.stalled:
            at = self.kernel.instructions[min(self.stalled)]
            raise KernelFault(f"{self.kernel.name}: lanes do not reach the shuffle: {at}")
        if self.at_barrier:
            raise KernelFault(f"{self.kernel.name}: a barrier that some threads do not reach")

    def _run_block(self, start: int, group: Group) -> None:
        """Executes a basic block."""
        if start == len(self.kernel.instructions):
            self._exit(group)
            return
        instruction = self.kernel.instructions[start]
        if instruction.opcode == "shfl":
            whole = self._stall_incomplete(start, instruction, group)
            if whole is None:
                return
            group = whole
        steps, end = self.program.block(start)
        self.profile.executed[start:end] += len(group.threads)
        for i, step in enumerate(steps):
            try:
                step(self, group)
            except KernelFault as fault:
                at = self.kernel.instructions[start + i]
                raise KernelFault(f"{self.kernel.name}: {fault}; {at}") from None
        self._leave(self.kernel.instructions[end - 1], end, group)

    def _leave(self, last: Instruction, end: int, group: Group) -> None:
        if last.opcode in ("ret", "exit", "bar") and last.guard:
            raise NotImplementedError(str(last))
        if last.opcode in ("ret", "exit"):
            self._exit(group)
        elif last.opcode == "bar":
            if last.modifiers != ("sync",) or last.operands != (0,):
                raise NotImplementedError(str(last))
            self._arrive(end, group)
        elif last.opcode == "bra":
            self._branch(last, end, group)
        else:
            self._go(end, group.threads)

    def _go(self, where: int, threads: Array) -> None:
        self.ready.setdefault(where, []).append(threads)

    def _branch(self, branch: Instruction, end: int, group: Group) -> None:
        target = self.kernel.labels[str(branch.operands[-1])]
        if not branch.guard:
            self._go(target, group.threads)
            return
        predicate = self.program.reader(branch.guard, "pred", branch)(self, group)
        taken = predicate != branch.guard_negated
        for where, going in ((target, taken), (end, ~taken)):
            if going.any():
                self._go(where, group.threads[going])

    def _exit(self, group: Group) -> None:
        blocks, counts = np.unique(self.block_of_thread[group.threads], return_counts=True)
        self.live[blocks] -= counts
        self.num_live -= len(group.threads)
        self._release(blocks)

    def _arrive(self, end: int, group: Group) -> None:
        blocks, starts = np.unique(self.block_of_thread[group.threads], return_index=True)
        for block, threads in zip(blocks, np.split(group.threads, starts[1:]), strict=True):
            where, waiting = self.at_barrier.setdefault(block, (end, []))
            if where != end:
                raise KernelFault(f"{self.kernel.name}: threads of a block at different barriers")
            waiting.append(threads)
        self._release(blocks)

    def _release(self, blocks: Iterable[int]) -> None:
        """Lets blocks pass the barrier that all of their live threads have reached."""
        size = self.program.shared_size
        for block in blocks:
            where, waiting = self.at_barrier.get(block, (0, []))
            if waiting and sum(map(len, waiting)) == self.live[block]:
                del self.at_barrier[block]
                self.memories["shared"].forget_accesses(block * size, size)
                for threads in waiting:
                    self._go(where, threads)

    def _stall_incomplete(self, start: int, shuffle: Instruction, group: Group) -> Group | None:
        """The threads for which all lanes of the mask have reached the shuffle. Others wait."""
        read = self.program.reader(shuffle.operands[4], "u32", shuffle)
        mask = np.broadcast_to(read(self, group), group.threads.shape)
        if group.has_whole_warps and (mask == 0xFFFFFFFF).all():
            return group
        warps, lanes = group.threads // WARP_SIZE, group.threads % WARP_SIZE
        present = np.bincount(warps, weights=2.0**lanes).astype(np.uint64)[warps]
        if not (mask >> lanes.astype(np.uint32) & 1).all():
            raise KernelFault(f"{self.kernel.name}: a lane shuffles outside its mask: {shuffle}")
        whole = mask & ~present == 0
        if not whole.all():
            self.stalled[start] = group.threads[~whole]
        return Group(group.threads[whole], self) if whole.any() else None


def run(
    program: Program,
    grid: Size3,
    block: Size3,
    parameters: Sequence[bytes],
    memory: Memory,
    profile: Profile,
    blocks: range | None = None,
) -> None:
    """Executes a grid, or some of its blocks. All earlier kernels have ended."""
    memory.forget_accesses()
    blocks = blocks or range(grid[0] * grid[1] * grid[2])
    at_once = max(1, _THREADS_OF_A_BATCH // (block[0] * block[1] * block[2]))
    with np.errstate(all="ignore"):
        for first in range(blocks.start, blocks.stop, at_once):
            together = range(first, min(first + at_once, blocks.stop))
            Batch(program, grid, block, parameters, memory, together, profile).run()
