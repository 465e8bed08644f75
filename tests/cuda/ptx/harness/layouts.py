"""How the argument structs of csrc/core/kernels.h lie in memory, as the compiler lays them out."""

from __future__ import annotations

import json
import re
import struct
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_HEADERS = ("views", "loss_math", "kernels")
_STRUCT = re.compile(r"^struct (\w+) \{\n(.*?)^\};", re.MULTILINE | re.DOTALL)
_MEMBERS = re.compile(
    r"^  (?:const )?([\w:]+)\s*(\*?)\s*(\w+(?:, \w+)*)(?: = ([^;]+))?;", re.MULTILINE
)
_LITERALS = {"nullptr": 0, "false": False, "true": True}

# Prints a member's offset, size, and code in Python's struct module.
_PRINT = r"""
#include <cstddef>
#include <cstdio>
#include <type_traits>

#include "core/kernels.h"

using namespace simpo_ext;

template <typename T>
constexpr const char* code() {
  if (std::is_pointer_v<T>) return "Q";
  if (std::is_same_v<T, bool>) return "?";
  if (std::is_floating_point_v<T>) return sizeof(T) == 8 ? "d" : "f";
  return sizeof(T) == 8 ? "q" : "i";
}

#define MEMBER(S, path)                                                             \
  std::printf("%s\"" #path "\": [%zu, %zu, \"%s\"]", comma, offsetof(S, path),      \
              sizeof(S{}.path), code<std::remove_cv_t<decltype(S{}.path)>>());      \
  comma = ", ";

int main() {
  const char* comma = "";
"""


class Member(NamedTuple):
    type: str
    name: str
    default: str  # its initializer in C++; empty: none


def _structs(csrc: Path) -> dict[str, list[Member]]:
    found: dict[str, list[Member]] = {}
    for header in _HEADERS:
        text = re.sub(r"//[^\n]*", "", (csrc / "core" / f"{header}.h").read_text())
        for name, body in _STRUCT.findall(text):
            found[name] = [
                Member(kind + star, each, default)
                for kind, star, names, default in _MEMBERS.findall(body)
                for each in names.split(", ")
            ]
    return found


def _leaves(structs: Mapping[str, list[Member]], name: str) -> Iterator[Member]:
    """The members of a struct and of those in it, each named by its path."""
    for member in structs[name]:
        if member.type not in structs:
            yield member
            continue
        for leaf in _leaves(structs, member.type):
            yield leaf._replace(name=f"{member.name}.{leaf.name}")


def write_layouts(csrc: Path, folder: Path) -> None:
    """Writes layouts.json: of each struct the size, the members, and initializers of members."""
    structs = _structs(csrc)
    names = [name for name in structs if name.endswith("Args")]
    lines = [_PRINT, 'std::printf("{");']
    for i, name in enumerate(names):
        begin = f'{", " if i else ""}\\"{name}\\": [%zu, {{'
        lines.append(f'std::printf("{begin}", sizeof({name})); comma = "";')
        lines += [f"MEMBER({name}, {leaf.name})" for leaf in _leaves(structs, name)]
        lines.append('std::printf("}]");')
    lines.append('std::printf("}"); }')
    source, program = folder / "layouts.cpp", folder / "layouts"
    source.write_text("\n".join(lines))
    flags = ("-std=c++20", "-Wno-invalid-offsetof", f"-I{csrc}")
    subprocess.run(["c++", *flags, source, "-o", program], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    defaults = {
        name: {leaf.name: leaf.default for leaf in _leaves(structs, name) if leaf.default}
        for name in names
    }
    layouts = {name: (*layout, defaults[name]) for name, layout in json.loads(printed).items()}
    (folder / "layouts.json").write_text(json.dumps(layouts))
    source.unlink()
    program.unlink()


class Layout:
    """One struct: its size, (offset, size, struct code) of each member, and defaults."""

    def __init__(
        self, size: int, members: dict[str, tuple[int, int, str]], defaults: dict[str, str]
    ) -> None:
        self._size, self._members, self._defaults = size, members, defaults
        covered = np.zeros(size, bool)
        for offset, length, _ in members.values():
            assert not covered[offset : offset + length].any()
            covered[offset : offset + length] = True
        # Padding is at most 7 bytes in a row. In a larger gap, a member was not parsed.
        gaps = "".join("01"[int(each)] for each in covered).split("1")
        assert max(map(len, gaps)) <= 7

    def pack(self, values: Mapping[str, Any]) -> bytes:
        """Packs these members, nested as in the struct. Fills padding with other bytes than 0."""
        given = dict(_flat(values))
        unknown = given.keys() - self._members.keys()
        missing = self._members.keys() - given.keys() - self._defaults.keys()
        if unknown or missing:
            raise ValueError(f"unknown members: {sorted(unknown)}, missing: {sorted(missing)}")
        packed = bytearray(b"\xcd" * self._size)
        for name, (offset, length, code) in self._members.items():
            value = given[name] if name in given else self._default(name, given)
            struct.pack_into(code, packed, offset, value)
            assert struct.calcsize(code) == length
        return bytes(packed)

    def _default(self, name: str, given: Mapping[str, Any]) -> Any:
        initializer = self._defaults[name]
        if initializer in _LITERALS:
            return _LITERALS[initializer]
        return given[initializer] if initializer in given else int(initializer)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def read_layouts(path: Path) -> dict[str, Layout]:
    printed = json.loads(path.read_text())
    return {
        name: Layout(size, {key: tuple(each) for key, each in members.items()}, defaults)
        for name, (size, members, defaults) in printed.items()
    }
