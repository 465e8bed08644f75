"""Arithmetic on floats that NumPy has no function for."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .module import Array

_SMALLEST_NORMAL = np.finfo(np.float32).tiny


@functools.cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_name("fused.c")
    with tempfile.TemporaryDirectory(prefix="ptx-") as folder:
        library = Path(folder) / "fused.so"
        flags = ("-O2", "-march=native", "-shared", "-fPIC")
        subprocess.run(["cc", *flags, source, "-o", library, "-lm"], check=True)
        return ctypes.CDLL(str(library))  # which stays loaded when the file is gone


def fused_multiply_add(*factors_and_term: Any) -> Array:
    """a * b + c, rounded once."""
    operands = [np.asarray(each) for each in factors_and_term]
    result = np.empty(max(each.size for each in operands), operands[0].dtype)
    arguments: list[ctypes.c_void_p | ctypes.c_long] = []
    for operand in operands:
        arguments.append(ctypes.c_void_p(operand.__array_interface__["data"][0]))
        stride = operand.strides[0] // operand.itemsize if operand.ndim else 0
        arguments.append(ctypes.c_long(stride))
    function = getattr(_library(), "fma_f32" if result.dtype == np.float32 else "fma_f64")
    out = ctypes.c_void_p(result.__array_interface__["data"][0])
    function(*arguments, out, ctypes.c_long(result.size))
    return result


def larger(a: Any, b: Any) -> Any:
    """The larger of two numbers, with +0 above -0. If one is NaN, the other."""
    bits = f"u{np.asarray(a).dtype.itemsize}"
    of_equals = (np.asarray(a).view(bits) & np.asarray(b).view(bits)).view(np.asarray(a).dtype)
    return np.where(a == b, of_equals, np.fmax(a, b))


def smaller(a: Any, b: Any) -> Any:
    return -larger(-a, -b)


# ---- approximate instructions


def flush(x: Any) -> Any:
    """Subnormal numbers become zeros of their sign."""
    return np.where(np.abs(x) < _SMALLEST_NORMAL, np.copysign(np.zeros_like(x), x), x)


def exp2_approx(x: Any) -> Any:
    return flush(np.exp2(flush(x).astype(np.float64)).astype(np.float32))


def reciprocal_approx_f32(x: Any) -> Any:
    return flush(np.float32(1) / flush(x))


def reciprocal_approx_f64(x: Any) -> Any:
    """Reads and writes the upper words only: 20 bits of the fraction."""
    upper, smallest = np.uint64(0xFFFFFFFF00000000), np.finfo(np.float64).tiny
    x = np.asarray((x.view(np.uint64) & upper).view(np.float64))
    result = 1.0 / np.where(np.abs(x) < smallest, np.copysign(0.0, x), x)
    result = np.where(np.abs(result) < smallest, np.copysign(0.0, result), result)
    return (result.view(np.uint64) & upper).view(np.float64)


def perturbed(exact: Any, ulp: int, keeps_powers: bool) -> Any:
    """Shifts results of an approximate instruction, each by at most so many ulp.

    The shifts look random, but equal results have equal shifts. Infinities, NaN, zeros and the
    smallest normal numbers stay as they are; so do powers of two with ``keeps_powers``.
    """
    hashed = (exact.view(np.uint32) * np.uint32(0x9E3779B1)) >> np.uint32(16)
    steps = (hashed % np.uint32(2 * ulp + 1)).astype(np.int32) - np.int32(ulp)
    result = (exact.view(np.int32) + steps).view(np.float32)
    stays = ~np.isfinite(exact) | ~np.isfinite(result) | (np.abs(exact) < 2 * _SMALLEST_NORMAL)
    if keeps_powers:
        stays |= np.frexp(exact)[0] == 0.5
    return np.where(stays, exact, result)


# ---- 16-bit floats, as bits


def narrow_bfloat16(x: Any) -> Any:
    """Rounded to nearest, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    tie = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + tie) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded)


def narrow_float16(x: Any) -> Any:
    bits = np.asarray(x, np.float32).astype(np.float16).view(np.uint16).astype(np.uint32)
    return np.where(np.isnan(x), np.uint32(0x7FFF), bits)


def widen_bfloat16(bits: Any) -> Any:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def widen_float16(bits: Any) -> Any:
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


NARROW: dict[str, Callable[[Any], Any]] = {"bf16x2": narrow_bfloat16, "f16x2": narrow_float16}
WIDEN: dict[str, Callable[[Any], Any]] = {"bf16x2": widen_bfloat16, "f16x2": widen_float16}


def pack_halves(low: Any, high: Any) -> Any:
    return (high << np.uint32(16)) | low


def in_halves(combine: Callable[[Any, Any], Any], kind: str) -> Callable[[Any, Any], Any]:
    """Applies an operation to both halves of a word."""
    narrow, widen = NARROW[kind], WIDEN[kind]
    low, sixteen = np.uint32(0xFFFF), np.uint32(16)

    def function(a: Any, b: Any) -> Any:
        lower = narrow(combine(widen(a & low), widen(b & low)))
        upper = narrow(combine(widen(a >> sixteen), widen(b >> sixteen)))
        return pack_halves(lower, upper)

    return function
