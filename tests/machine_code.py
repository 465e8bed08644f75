"""Reads compiled CUDA kernels: what ptxas recorded of each, and its instructions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    address: int
    opcode: str  # with its modifiers, as in LDG.E.NA.128
    operands: str

    def branch_target(self) -> int | None:
        target = re.search(r"0x([0-9a-f]+)", self.operands) if self.opcode == "BRA" else None
        return int(target[1], 16) if target else None


class Kernel(NamedTuple):
    architecture: str  # such as sm_90
    name: str  # mangled
    registers: int
    stack_bytes: int  # what spills go to
    local_bytes: int
    shared_bytes: int
    instructions: list[Instruction]

    def uses_local_memory(self) -> bool:
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
    program = tool("nvidia-cuda-cuobjdump", "cuobjdump")
    # It calls nvdisasm.
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


def sections(text: str) -> list[tuple[str, str]]:
    """Architecture and text of each piece of machine code in an output of cuobjdump."""
    parts = re.split(r"^Fatbin (elf|ptx) code:$", text, flags=re.MULTILINE)
    elf = [body for kind, body in zip(parts[1::2], parts[2::2], strict=True) if kind == "elf"]
    return [(re.search(r"arch = (\w+)", body)[1], body) for body in elf]


def kernels(binary: Path) -> list[Kernel]:
    """Every kernel in a library or object file, once for each architecture."""
    code: dict[tuple[str, str], list[Instruction]] = {}
    for architecture, body in sections(cuobjdump("--dump-sass", binary)):
        for function in body.split("Function : ")[1:]:
            name = function.split(maxsplit=1)[0]
            code[architecture, name] = [
                Instruction(int(address, 16), opcode, operands.strip())
                for address, opcode, operands in INSTRUCTION.findall(function)
            ]
    found = []
    for architecture, body in sections(cuobjdump("--dump-resource-usage", binary)):
        for name, registers, stack, shared, local in RESOURCES.findall(body):
            instructions = code.pop((architecture, name))
            numbers = int(registers), int(stack), int(local), int(shared)
            found.append(Kernel(architecture, name, *numbers, instructions))
    assert not code, f"no resources recorded of {list(code)}"
    return found


def loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """The instructions from each backward branch's target to the branch."""
    bodies = []
    for branch in instructions:
        target = branch.branch_target()
        if target is not None and target < branch.address:
            bodies.append([i for i in instructions if target <= i.address <= branch.address])
    return bodies


def loads_in_flight(body: list[Instruction]) -> int:
    """Most 16-byte loads from global memory that are issued before one of their results is used."""
    most = in_flight = 0
    loaded: set[str] = set()
    for instruction in body:
        registers = [int(n) for n in re.findall(r"\bR(\d+)", instruction.operands)]
        if instruction.opcode.startswith("LDG") and ".128" in instruction.opcode:
            first = registers[0]
            if loaded & {f"R{n}" for n in registers[1:]}:  # an address that was itself loaded
                loaded, in_flight = set(), 0
            loaded |= {f"R{n}" for n in range(first, first + 4)}
            in_flight += 1
            most = max(most, in_flight)
        elif loaded & {f"R{n}" for n in registers}:
            loaded, in_flight = set(), 0
    return most
