"""Reads compiled CUDA kernels: their resources, which ptxas recorded, and their instructions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    """A line of a disassembly."""

    address: int
    opcode: str  # with its modifiers, as in LDG.E.NA.128
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    def is_wide_load(self) -> bool:
        """Whether it loads 16 bytes from global memory."""
        return self.name == "LDG" and ".128" in self.opcode

    def branch_target(self) -> int | None:
        """The address that a branch goes to; None for other instructions."""
        target = re.search(r"0x([0-9a-f]+)", self.operands) if self.name == "BRA" else None
        return int(target[1], 16) if target else None


class Kernel(NamedTuple):
    """A kernel's machine code for one architecture."""

    architecture: str  # such as sm_90
    name: str  # mangled
    registers: int
    stack_bytes: int  # where spills go
    local_bytes: int
    shared_bytes: int
    instructions: list[Instruction]

    def uses_local_memory(self) -> bool:
        """Whether an instruction reads or writes local memory."""
        return any(i.opcode.startswith(("LDL", "STL")) for i in self.instructions)


def tool(package: str, name: str) -> Path:
    """A program from one of NVIDIA's packages on PyPI, or from a CUDA toolkit."""
    try:
        for file in metadata.files(package) or ():
            if file.name == name and file.parent.name == "bin":
                return Path(str(file.locate())).resolve()
    except metadata.PackageNotFoundError:
        pass
    found = shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}/usr/local/cuda/bin")
    if found is None:
        raise FileNotFoundError(f"expected {name} from {package} or a CUDA toolkit, found none")
    return Path(found)


def cuobjdump(*arguments: str | Path) -> str:
    """What cuobjdump prints."""
    program = tool("nvidia-cuda-cuobjdump", "cuobjdump")
    # cuobjdump calls nvdisasm.
    path = f"{tool('nvidia-cuda-nvdisasm', 'nvdisasm').parent}{os.pathsep}{os.environ['PATH']}"
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE
)
RESOURCES = re.compile(
    r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", re.MULTILINE
)


def sections(text: str) -> list[tuple[str | None, str]]:
    """Architecture and text of each piece of machine code in an output of cuobjdump.

    A cubin is one piece, and cuobjdump does not name its architecture in every output.
    """
    parts = re.split(r"^Fatbin (elf|ptx) code:$", text, flags=re.MULTILINE)
    if len(parts) == 1:
        return [(None, text)]
    elf = [body for kind, body in zip(parts[1::2], parts[2::2], strict=True) if kind == "elf"]
    return [(re.search(r"arch = (\w+)", body)[1], body) for body in elf]


def kernels(binary: Path) -> list[Kernel]:
    """Every kernel in a library, object file or cubin, once for each architecture."""
    code: dict[tuple[str | None, str], tuple[str, list[Instruction]]] = {}
    for section, body in sections(cuobjdump("--dump-sass", binary)):
        for function in body.split("Function : ")[1:]:
            name = function.split(maxsplit=1)[0]
            architecture = section or re.search(r"code for (\w+)", body)[1]
            instructions = [
                Instruction(int(address, 16), opcode, operands.strip())
                for address, opcode, operands in INSTRUCTION.findall(function)
            ]
            code[section, name] = architecture, instructions
    found = []
    for section, body in sections(cuobjdump("--dump-resource-usage", binary)):
        for name, registers, stack, shared, local in RESOURCES.findall(body):
            architecture, instructions = code.pop((section, name))
            numbers = int(registers), int(stack), int(local), int(shared)
            found.append(Kernel(architecture, name, *numbers, instructions))
    assert not code, f"no resources recorded for {list(code)}"
    return found


def compilers(binary: Path) -> set[str]:
    """Versions of ptxas, such as 13.0.88, that made the machine code in a file."""
    return set(re.findall(r"Tool Version:.* V([\d.]+)", cuobjdump("--dump-elf", binary)))


def loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """The instructions from each backward branch's target to the branch."""
    bodies = []
    for branch in instructions:
        target = branch.branch_target()
        if target is not None and target < branch.address:
            bodies.append([i for i in instructions if target <= i.address <= branch.address])
    return bodies


def main_loop(kernel: Kernel) -> list[Instruction]:
    """The longest loop that has no loop inside it and reads vectors of 16 bytes.

    A report's kernel also has a shorter one, which adds up the logits of masked rows.
    """
    bodies = loops(kernel.instructions)
    spans = [(body[0].address, body[-1].address) for body in bodies]

    def is_innermost(span: tuple[int, int]) -> bool:
        return not any(
            span[0] <= first and last <= span[1] for first, last in spans if (first, last) != span
        )

    found = [
        body
        for body, span in zip(bodies, spans, strict=True)
        if is_innermost(span) and any(i.is_wide_load() for i in body)
    ]
    if not found:
        raise ValueError(f"{kernel.architecture} {kernel.name}: no loop reads 16-byte vectors")
    return max(found, key=len)


def loads_in_flight(body: list[Instruction]) -> int:
    """Most 16-byte loads from global memory that are issued before one of their results is used."""
    most = in_flight = 0
    loaded: set[str] = set()
    for instruction in body:
        registers = [int(n) for n in re.findall(r"\bR(\d+)", instruction.operands)]
        if instruction.is_wide_load():
            first = registers[0]
            if loaded & {f"R{n}" for n in registers[1:]}:  # an address that was itself loaded
                loaded, in_flight = set(), 0
            loaded |= {f"R{n}" for n in range(first, first + 4)}
            in_flight += 1
            most = max(most, in_flight)
        elif loaded & {f"R{n}" for n in registers}:
            loaded, in_flight = set(), 0
    return most
