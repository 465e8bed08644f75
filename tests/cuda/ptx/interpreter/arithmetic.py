"""What instructions compute from their sources, as functions of arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from . import floats
from .module import TYPES, Instruction, KernelFault


class Operation(NamedTuple):
    """An instruction with one result."""

    result: str  # types
    sources: tuple[str, ...]
    function: Callable[..., Any]


Modifiers: TypeAlias = tuple[str, ...]
Maker: TypeAlias = Callable[[str, Modifiers], "Operation | None"]
_MAKERS: dict[str, Callable[[Modifiers], Operation | None]] = {}


def _operation(*opcodes: str) -> Callable[[Maker], Maker]:
    def register(make: Maker) -> Maker:
        for opcode in opcodes:
            _MAKERS[opcode] = functools.partial(make, opcode)
        return make

    return register


def operation_of(instruction: Instruction) -> Operation:
    make = _MAKERS.get(instruction.opcode)
    operation = make(instruction.modifiers) if make else None
    if operation is None:
        raise NotImplementedError(str(instruction))
    return operation


def is_float(kind: str) -> bool:
    return kind in ("f32", "f64")


@_operation("add", "sub")
def _sum(opcode: str, modifiers: Modifiers) -> Operation | None:
    *rounding, kind = modifiers
    if rounding not in ([], ["rn"] if is_float(kind) else []):
        return None
    return Operation(kind, (kind, kind), np.add if opcode == "add" else np.subtract)


@_operation("min", "max")
def _extremum(opcode: str, modifiers: Modifiers) -> Operation | None:
    *flags, kind = modifiers
    if flags:
        return None
    of_floats = floats.larger if opcode == "max" else floats.smaller
    if kind in floats.NARROW:
        return Operation("b32", ("b32", "b32"), floats.in_halves(of_floats, kind))
    of_integers = np.maximum if opcode == "max" else np.minimum
    return Operation(kind, (kind, kind), of_floats if is_float(kind) else of_integers)


def _wide(kind: str) -> str:
    return f"{kind[0]}{2 * int(kind[1:])}"


def _full_product(kind: str) -> Callable[[Any, Any], Any]:
    wide = TYPES[_wide(kind)]
    return lambda a, b: a.astype(wide) * b.astype(wide)


@_operation("mul", "mad")
def _product(opcode: str, modifiers: Modifiers) -> Operation | None:
    *how, kind = modifiers
    sources = (kind, kind)
    if how == ["wide"] and kind in ("u16", "s16", "u32", "s32"):
        result, multiply = _wide(kind), _full_product(kind)
    elif how == ["hi"] and kind in ("u32", "s32"):
        product = _full_product(kind)
        result, multiply = kind, lambda a, b: (product(a, b) >> 32).astype(TYPES[kind])
    elif how == ["lo"] or (is_float(kind) and how in ([], ["rn"]) and opcode == "mul"):
        result, multiply = kind, np.multiply
    else:
        return None
    if opcode == "mul":
        return Operation(result, sources, multiply)
    return Operation(result, (*sources, result), lambda a, b, c: multiply(a, b) + c)


@_operation("fma")
def _fused(opcode: str, modifiers: Modifiers) -> Operation | None:
    if modifiers not in (("rn", "f32"), ("rn", "f64")):
        return None
    kind = modifiers[1]
    return Operation(kind, (kind,) * 3, floats.fused_multiply_add)


def _truncating_division(a: Any, b: Any) -> Any:
    if not np.all(b):
        raise KernelFault("integer division by zero")
    quotient = a // b
    return quotient + ((a % b != 0) & ((a < 0) != (b < 0))).astype(a.dtype)


def _remainder(a: Any, b: Any) -> Any:
    return a - _truncating_division(a, b) * b


@_operation("div", "rem")
def _division(opcode: str, modifiers: Modifiers) -> Operation | None:
    *rounding, kind = modifiers
    if rounding == ["rn"] and is_float(kind) and opcode == "div":
        return Operation(kind, (kind, kind), np.divide)
    if rounding or kind[0] not in "us":
        return None
    return Operation(kind, (kind, kind), _truncating_division if opcode == "div" else _remainder)


_UNARY: dict[str, tuple[str, Callable[[Any], Any]]] = {
    **{f"abs.{kind}": (kind, np.abs) for kind in ("s32", "s64", "f32", "f64")},
    **{f"neg.{kind}": (kind, np.negative) for kind in ("s16", "s32", "s64", "f32", "f64")},
    **{f"not.{kind}": (kind, np.invert) for kind in ("b16", "b32", "b64", "pred")},
    "cvta.to.global.u64": ("u64", lambda x: x),
    **{f"sqrt.rn.{kind}": (kind, np.sqrt) for kind in ("f32", "f64")},
    **{f"rcp.rn.{kind}": (kind, np.reciprocal) for kind in ("f32", "f64")},
    "ex2.approx.ftz.f32": ("f32", floats.exp2_approx),
    "rcp.approx.ftz.f32": ("f32", floats.reciprocal_approx_f32),
    "rcp.approx.ftz.f64": ("f64", floats.reciprocal_approx_f64),
}


@_operation("abs", "neg", "not", "cvta", "sqrt", "rcp", "ex2")
def _unary(opcode: str, modifiers: Modifiers) -> Operation | None:
    found = _UNARY.get(".".join((opcode, *modifiers)))
    return found and Operation(found[0], found[:1], found[1])


@_operation("and", "or", "xor")
def _bitwise(opcode: str, modifiers: Modifiers) -> Operation | None:
    (kind,) = modifiers
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[opcode]
    return Operation(kind, (kind, kind), function) if kind[0] in "bp" else None


@_operation("shl", "shr")
def _shift(opcode: str, modifiers: Modifiers) -> Operation | None:
    """A shift by the width of the type or more shifts everything out."""
    (kind,) = modifiers
    dtype = TYPES[kind]
    bits = dtype.itemsize * 8

    def function(a: Any, distance: Any) -> Any:
        far = distance >= bits
        near = np.where(far, bits - 1, distance).astype(dtype)
        if opcode == "shr" and kind[0] == "s":
            return a >> near
        return np.where(far, dtype.type(0), a << near if opcode == "shl" else a >> near)

    return Operation(kind, (kind, "u32"), function)


@_operation("bfe")
def _bit_field(opcode: str, modifiers: Modifiers) -> Operation | None:
    if modifiers != ("u32",):
        return None

    def function(a: Any, position: Any, length: Any) -> Any:
        position = position.astype(np.uint64) & np.uint64(255)
        length = length.astype(np.uint64) & np.uint64(255)
        shifted = a.astype(np.uint64) >> np.minimum(position, np.uint64(63))
        mask = (np.uint64(1) << np.minimum(length, np.uint64(32))) - np.uint64(1)
        return (shifted & mask).astype(np.uint32)

    return Operation("u32", ("u32",) * 3, function)


@_operation("copysign")
def _copysign(opcode: str, modifiers: Modifiers) -> Operation | None:
    """The sign is that of the first source."""
    (kind,) = modifiers
    return Operation(kind, (kind, kind), lambda sign, magnitude: np.copysign(magnitude, sign))


@_operation("selp")
def _select(opcode: str, modifiers: Modifiers) -> Operation | None:
    (kind,) = modifiers
    return Operation(kind, (kind, kind, "pred"), lambda a, b, p: np.where(p, a, b))


_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _is_unordered(a: Any, b: Any) -> Any:
    return np.isnan(a) | np.isnan(b)


def _comparison(name: str, kind: str) -> Callable[[Any, Any], Any] | None:
    compare = _COMPARISONS.get(name)
    if not is_float(kind):
        return compare
    if name == "ne":  # false with a NaN, unlike NumPy's
        return lambda a, b: (a != b) & ~_is_unordered(a, b)
    if name in ("num", "nan"):
        return lambda a, b: _is_unordered(a, b) == (name == "nan")
    if compare is None and name.endswith("u") and (ordered := _COMPARISONS.get(name[:2])):
        return lambda a, b: ordered(a, b) | _is_unordered(a, b)
    return compare


@_operation("setp")
def _set_predicate(opcode: str, modifiers: Modifiers) -> Operation | None:
    if len(modifiers) != 2:
        return None
    name, kind = modifiers
    compare = _comparison(name, kind)
    return compare and Operation("pred", (kind, kind), compare)


@_operation("cvt")
def _convert(opcode: str, modifiers: Modifiers) -> Operation | None:
    *rounding, to, source = modifiers
    if rounding == ["rn"] and to in floats.NARROW and source == "f32":
        narrow = floats.NARROW[to]
        return Operation(
            "b32",
            ("f32", "f32"),
            lambda upper, lower: floats.pack_halves(narrow(lower), narrow(upper)),
        )
    if (to, source, rounding) == ("f32", "f16", []):
        return Operation("f32", ("b16",), floats.widen_float16)
    if (to, source, rounding) == ("f32", "bf16", []):
        return Operation("f32", ("b16",), floats.widen_bfloat16)
    if to == source and is_float(to) and rounding == ["rni"]:
        return Operation(to, (source,), np.rint)
    to_float, from_float = is_float(to), is_float(source)
    is_exact = (to_float and from_float and to > source) or (not to_float and not from_float)
    if to not in TYPES or source not in TYPES or (not to_float and from_float):
        return None
    if rounding != ([] if is_exact else ["rn"]):
        return None
    return Operation(to, (source,), lambda x: x.astype(TYPES[to]))
