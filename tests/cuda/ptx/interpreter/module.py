"""PTX text as data: the entries of a module, their registers and instructions."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]


def _types() -> dict[str, np.dtype[Any]]:
    """How a value of each PTX type is held. bfloat16 and packed pairs are bits."""
    types = {
        f"{letter}{bits}": np.dtype(f"{code}{bits // 8}")
        for letter, code in (("u", "u"), ("s", "i"), ("b", "u"))
        for bits in (8, 16, 32, 64)
    }
    floats = {"f16": np.float16, "f32": np.float32, "f64": np.float64, "pred": np.bool_}
    return types | {name: np.dtype(kind) for name, kind in floats.items()}


TYPES = _types()


class KernelFault(Exception):
    """Something that a kernel must not do."""


class Vector(NamedTuple):
    """Operands in braces."""

    elements: tuple[Operand, ...]


class Address(NamedTuple):
    base: str  # a register or a symbol
    offset: int


# A str is the name of a register, a symbol or a label.
Operand: TypeAlias = "str | int | float | Vector | Address"


@dataclass(frozen=True)
class Instruction:
    line: int
    text: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str = ""  # the predicate register that decides whether it is executed
    guard_negated: bool = False

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


class Variable(NamedTuple):
    """A parameter, or an array in shared memory."""

    name: str
    size: int
    alignment: int


@dataclass
class Kernel:
    name: str
    parameters: list[Variable]
    registers: dict[str, str] = field(default_factory=dict)  # their types
    shared: list[Variable] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    max_threads: int = 0  # of a block; 0: no limit is given

    @functools.cached_property
    def block_starts(self) -> set[int]:
        """Where basic blocks begin: at labels, after branches, around barriers and shuffles."""
        starts = {0, *self.labels.values()}
        for i, instruction in enumerate(self.instructions):
            if instruction.opcode in ("bra", "ret", "exit"):
                starts.add(i + 1)
            if instruction.opcode in ("bar", "shfl"):
                starts.update((i, i + 1))
        return starts


_VARIABLE = re.compile(
    r"(?:\.align\s+(?P<alignment>\d+)\s+)?\.[bufs](?P<bits>\d+)\s+(?P<name>[\w$]+)"
    r"(?:\[(?P<count>\d+)\])?"
)
_STATEMENT = re.compile(r"\s*(?:([{}])|([\w$]+):(?!:)|([^;]*);)")
_INSTRUCTION = re.compile(r"(?:@(!?)(%[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")
_UNSUPPORTED = re.compile(r"^\s*\.(func|global|const|extern|alias)\b.*", re.MULTILINE)


def _variable(text: str) -> Variable:
    match = _VARIABLE.search(text)
    if match is None:
        raise NotImplementedError(f"unknown variable: {text}")
    element = int(match["bits"]) // 8
    alignment = int(match["alignment"] or element)
    return Variable(match["name"], element * int(match["count"] or 1), alignment)


def _operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return Vector(tuple(_operand(each) for each in text[1:-1].split(",")))
    if text.startswith("["):
        base, plus, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(base, int(offset, 0) if plus else 0)
    if re.fullmatch(r"0[fF][0-9A-Fa-f]{8}", text):
        return float(np.uint32(int(text[2:], 16)).view(np.float32))
    if re.fullmatch(r"0[dD][0-9A-Fa-f]{16}", text):
        return float(np.uint64(int(text[2:], 16)).view(np.float64))
    if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    return text


def _operands(text: str) -> tuple[Operand, ...]:
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text)
    return tuple(_operand(part) for part in parts)


class _Body:
    """Reads the statements of one entry."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        # For each open pair of braces: the names that it declares, and their names in the kernel.
        self._scopes: list[dict[str, str]] = [{}]
        self._num_scopes = 0

    def read(self, text: str, line: int) -> None:
        at = counted = 0
        while match := _STATEMENT.match(text, at):
            brace, label, statement = match.groups()
            start = match.start(match.lastindex or 0)
            line, counted = line + text.count("\n", counted, start), start
            if brace == "{":
                self._num_scopes += 1
                self._scopes.append({})
            elif brace:
                self._scopes.pop()
            elif label:
                self._kernel.labels[label] = len(self._kernel.instructions)
            else:
                self._statement(" ".join(statement.split()), line)
            at = match.end()
        if text[at:].strip():
            raise NotImplementedError(f"{self._kernel.name}: {text[at:]!r}")

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self._declare(text)
        elif text.startswith(".shared"):
            self._kernel.shared.append(_variable(text))
        elif text.startswith(".pragma"):
            pass
        elif (match := _INSTRUCTION.fullmatch(text)) is not None:
            negated, guard, opcode, operands = match.groups()
            opcode, *modifiers = opcode.split(".")
            names = tuple(self._renamed(operand) for operand in _operands(operands))
            self._kernel.instructions.append(
                Instruction(line, text, opcode, tuple(modifiers), names, guard or "", bool(negated))
            )
        else:
            raise NotImplementedError(f"line {line}: {text}")

    def _declare(self, text: str) -> None:
        _, kind, names = text.split(maxsplit=2)
        inner = f"#{self._num_scopes}" if len(self._scopes) > 1 else ""
        for name in names.split(","):
            match = re.fullmatch(r"(%?[\w$]+)(?:<(\d+)>)?", name.strip())
            if match is None or kind[1:] not in TYPES:
                raise NotImplementedError(text)
            stem, count = match.groups()
            for each in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
                if inner:
                    self._scopes[-1][each] = each + inner
                self._kernel.registers[each + inner] = kind[1:]

    def _renamed(self, operand: Operand) -> Operand:
        if isinstance(operand, Vector):
            return Vector(tuple(self._renamed(each) for each in operand.elements))
        if isinstance(operand, Address):
            return Address(str(self._renamed(operand.base)), operand.offset)
        if isinstance(operand, str):
            for scope in reversed(self._scopes):
                operand = scope.get(operand, operand)
        return operand


class Entry(NamedTuple):
    """The text of a kernel in a module, which `parse` reads."""

    name: str
    parameters: str
    directives: str
    body: str
    line: int  # on which the body begins
    shared: tuple[Variable, ...]  # arrays in shared memory that the module declares


def entries(text: str) -> dict[str, Entry]:
    """The entries of a module by name."""
    text = re.sub(r"//[^\n]*", "", text)
    if found := _UNSUPPORTED.search(text):
        raise NotImplementedError(found[0])
    shared = tuple(map(_variable, re.findall(r"^\.shared[^;]*;", text, re.MULTILINE)))
    found_entries, at, line = {}, 0, 1
    while match := _ENTRY.search(text, at):
        name, parameters, directives = match.groups()
        line += text.count("\n", at, match.end())
        at = text.index("\n}", match.end())
        body = text[match.end() : at]
        found_entries[name] = Entry(name, parameters, directives, body, line, shared)
        line += body.count("\n")
    return found_entries


def parse(entry: Entry) -> Kernel:
    parameters = [_variable(each) for each in entry.parameters.split(",") if each.strip()]
    kernel = Kernel(entry.name, parameters)
    if found := re.search(r"\.maxntid\s+(\d+)", entry.directives):
        kernel.max_threads = int(found[1])
    _Body(kernel).read(entry.body, entry.line)
    kernel.shared += [each for each in entry.shared if each.name in entry.body]
    return kernel
