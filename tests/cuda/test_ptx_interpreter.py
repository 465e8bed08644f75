"""The PTX interpreter: exact arithmetic, control flow, and faults that it must find."""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import pytest

from ptx.interpreter import (
    WRITTEN,
    Instruction,
    KernelFault,
    Memory,
    Profile,
    Program,
    Rounding,
    entries,
    parse,
)
from ptx.interpreter import run as run_grid
from ptx.interpreter.arithmetic import operation_of
from ptx.interpreter.floats import perturbed

pytestmark = pytest.mark.emulation

KERNEL = """
.version 9.0
.target sm_90
.address_size 64

.entry k(
	.param .u64 k_param_0
)
{{
	.reg .pred %p<9>;
	.reg .b32 %r<40>;
	.reg .f32 %f<9>;
	.reg .b64 %rd<9>;
	.reg .f64 %fd<9>;
	{shared}
	ld.param.u64 %rd1, [k_param_0];
	mov.u32 %r1, %tid.x;
	{body}
	ret;
}}
"""


def run(
    body: str, threads: int = 64, blocks: int = 1, shared: int = 0, rounding: Rounding | None = None
) -> np.ndarray:
    """Executes statements, and returns the 32-bit words stored at [%rd1]. %r1 is %tid.x."""
    declaration = f".shared .align 4 .b8 s[{shared}];" if shared else ""
    kernel = parse(entries(KERNEL.format(body=body, shared=declaration))["k"])
    memory, size = Memory("global", 1 << 16, base=1 << 32), 1024
    address = memory.allocate(size)
    memory.bytes_at(address, size)[:] = 0
    memory.state_at(address, size)[:] |= WRITTEN
    profile, parameters = Profile(kernel), [address.to_bytes(8, "little")]
    program = Program(kernel, rounding)
    run_grid(program, (blocks, 1, 1), (threads, 1, 1), parameters, memory, profile)
    if profile.reports:
        raise KernelFault("; ".join(sorted(profile.reports)))
    return memory.bytes_at(address, size).view(np.uint32)


STORE = "mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; st.global.b32 [%rd3], {};"


def compute(text: str, *sources: np.ndarray) -> np.ndarray:
    opcode, *modifiers = text.split(".")
    operation = operation_of(Instruction(0, text, opcode, tuple(modifiers), ()))
    with np.errstate(all="ignore"):
        return operation.function(*sources)


# ---- arithmetic


def nearest(exact: Fraction, dtype: type) -> float:
    """The nearest normal float. Ties go to the even one."""
    precision = {np.float32: 24, np.float64: 53}[dtype]
    if exact == 0:
        return 0.0
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    exponent += abs(exact) >= Fraction(2) ** exponent
    unit = Fraction(2) ** (exponent - precision)
    return float(round(exact / unit) * unit)  # Fraction rounds ties to even


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fma_is_rounded_once(dtype: type) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3000)).astype(dtype)
    some_ulp = rng.integers(-4, 5, 3000) * np.finfo(dtype).eps
    cancels = (-(a * b)).astype(dtype) * (1 + some_ulp).astype(dtype)
    c = np.where(rng.random(3000) < 0.5, cancels, rng.standard_normal(3000)).astype(dtype)
    got = compute(f"fma.rn.f{dtype(0).nbytes * 8}", a, b, c)
    for each, *terms in zip(got, a, b, c, strict=True):
        x, y, z = (Fraction(float(term)) for term in terms)
        assert float(each) == nearest(x * y + z, dtype)


def test_integers() -> None:
    a = np.array([7, -7, 7, -7, -(2**31)], np.int32)
    b = np.array([2, 2, -2, -2, 3], np.int32)
    assert compute("div.s32", a, b).tolist() == [3, -3, -3, 3, -715827882]
    assert compute("rem.s32", a, b).tolist() == [1, -1, 1, -1, -2]
    big = np.array([2**32 - 1, 2**31, 12345], np.uint32)
    assert compute("mul.hi.u32", big, big).tolist() == [int(x) ** 2 >> 32 for x in big]
    assert compute("mul.wide.u32", big, big).tolist() == [int(x) ** 2 for x in big]
    far = np.array([31, 32, 200], np.uint32)
    assert compute("shl.b32", big, far).tolist() == [2**31, 0, 0]
    far = np.array([1, 31, 32, 40, 40], np.uint32)
    assert compute("shr.s32", a, far).tolist() == [3, -1, 0, -1, -1]
    position, length = np.uint32([4, 31, 3]), np.uint32([8, 4, 0])
    assert compute("bfe.u32", big, position, length).tolist() == [255, 1, 0]


def test_halves_of_a_word() -> None:
    values = np.float32([1.0, 1.00390625, np.nan, 3.4e38, 1e-40])  # the second one is a tie
    words = [0x3F803F80, 0x3F803F80, 0x7FFF7FFF, 0x7F807F80, 0x00010001]
    assert compute("cvt.rn.bf16x2.f32", values, values).tolist() == words
    a = np.uint32([0x7FC03F80, 0x3F807FC0, 0xFF803F80, 0x80000000])
    b = np.uint32([0xBF80BF80, 0xBF80BF80, 0xBF80BF80, 0x00008000])
    larger = [0xBF803F80, 0x3F80BF80, 0xBF803F80, 0x00000000]
    assert compute("max.bf16x2", a, b).tolist() == larger


def test_comparisons_with_nan() -> None:
    a, b = np.float32([1, 1, np.nan]), np.float32([1, 2, 1])
    for name, want in {
        "eq": [1, 0, 0],
        "ne": [0, 1, 0],
        "lt": [0, 1, 0],
        "equ": [1, 0, 1],
        "neu": [0, 1, 1],
        "ltu": [0, 1, 1],
        "geu": [1, 0, 1],
        "nan": [0, 0, 1],
        "num": [1, 1, 0],
    }.items():
        assert compute(f"setp.{name}.f32", a, b).tolist() == want


def test_approximations_flush_subnormal_numbers() -> None:
    x = np.float32([0.0, -150.0, -126.0, 1e-40, np.inf, -np.inf, np.nan, -126.5])
    got = compute("ex2.approx.ftz.f32", x)
    assert got[:6].tolist() == [1.0, 0.0, 2.0**-126, 1.0, np.inf, 0.0]
    assert np.isnan(got[6])
    assert got[7] == 0.0


def test_perturbed_results_are_off_by_at_most_the_given_ulp() -> None:
    exact = np.float32(1.0) + np.arange(1, 4000, dtype=np.float32) * np.float32(2.0**-12)
    steps = perturbed(exact, 2, keeps_powers=False).view(np.int32) - exact.view(np.int32)
    assert set(steps.tolist()) == {-2, -1, 0, 1, 2}
    special = np.float32([0.0, np.inf, -np.inf, 0.25, 1.0, 2.0**-126])
    assert perturbed(special, 2, keeps_powers=True).tolist() == special.tolist()


# ---- products fused with sums

FACTORS = """
    cvt.rn.f32.u32 %f1, %r1; add.f32 %f1, %f1, 0f3F8CCCCD; mov.f32 %f2, 0f3F99999A;
    mov.f32 %f3, 0fC2C80000;
"""
PRODUCTS = {
    "a sum": ("mul.f32 %f4, %f1, %f2; add.f32 %f5, %f4, %f3;", "fma.rn.f32 %f5, %f1, %f2, %f3;"),
    "a sum the other way round": (
        "mul.f32 %f4, %f1, %f2; add.f32 %f5, %f3, %f4;",
        "fma.rn.f32 %f5, %f1, %f2, %f3;",
    ),
    "subtracted from": (
        "mul.f32 %f4, %f1, %f2; sub.f32 %f5, %f4, %f3;",
        "neg.f32 %f4, %f3; fma.rn.f32 %f5, %f1, %f2, %f4;",
    ),
    "subtracted": (
        "mul.f32 %f4, %f1, %f2; sub.f32 %f5, %f3, %f4;",
        "neg.f32 %f4, %f1; fma.rn.f32 %f5, %f4, %f2, %f3;",
    ),
    "a rounded product": (
        "mul.rn.f32 %f4, %f1, %f2; add.f32 %f5, %f4, %f3;",
        "mul.rn.f32 %f4, %f1, %f2; add.rn.f32 %f5, %f4, %f3;",
    ),
    "a rounded sum": (
        "mul.f32 %f4, %f1, %f2; add.rn.f32 %f5, %f4, %f3;",
        "mul.rn.f32 %f4, %f1, %f2; add.rn.f32 %f5, %f4, %f3;",
    ),
    "a factor that has changed": (
        "mul.f32 %f4, %f1, %f2; mov.f32 %f1, 0f00000000; add.f32 %f5, %f4, %f3;",
        "mul.rn.f32 %f4, %f1, %f2; add.rn.f32 %f5, %f4, %f3;",
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_fused_with_sums_where_ptx_allows_it(name: str) -> None:
    statements, meant = PRODUCTS[name]
    rounding = Rounding(contracts=True)
    got = run(FACTORS + statements + STORE.format("%f5"), rounding=rounding)
    assert got.tolist() == run(FACTORS + meant + STORE.format("%f5")).tolist()


def test_fusing_changes_bits() -> None:
    fused, rounded = (run(FACTORS + each + STORE.format("%f5")) for each in PRODUCTS["a sum"])
    assert fused.tolist() != rounded.tolist()


# ---- control flow


def test_divergence_and_loops() -> None:
    body = """
    mov.u32 %r2, 0; mov.u32 %r3, 0;
$L1:
    setp.ge.u32 %p1, %r3, %r1; @%p1 bra $L2;
    add.s32 %r2, %r2, %r3; add.s32 %r3, %r3, 1; bra.uni $L1;
$L2:
    """
    got = run(body + STORE.format("%r2"))
    assert got[:64].tolist() == [n * (n - 1) // 2 for n in range(64)]


def test_shuffles() -> None:
    got = run("shfl.sync.bfly.b32 %r2|%p1, %r1, 5, 31, -1; " + STORE.format("%r2"))
    assert got[:64].tolist() == [n ^ 5 for n in range(64)]
    got = run("shfl.sync.up.b32 %r2|%p1, %r1, 1, 0, -1; " + STORE.format("%r2"))
    assert got[:64].tolist() == [max(n - 1, n // 32 * 32) for n in range(64)]


SWAP = """
    mov.u32 %r4, s; shl.b32 %r5, %r1, 2; add.s32 %r6, %r4, %r5;
    st.shared.u32 [%r6], %r1; {}
    xor.b32 %r7, %r1, 63; shl.b32 %r8, %r7, 2; add.s32 %r9, %r4, %r8; ld.shared.u32 %r2, [%r9];
"""


def test_each_block_has_its_own_shared_memory() -> None:
    body = SWAP.format("bar.sync 0;") + "mov.u32 %r20, %ctaid.x; mad.lo.s32 %r1, %r20, 64, %r1;"
    got = run(body + STORE.format("%r2"), blocks=3, shared=256)
    assert got[:192].tolist() == [63 - n % 64 for n in range(192)]


# ---- faults: statements, bytes of shared memory, and the message

FEW = "setp.lt.u32 %p1, %r1, 7; @%p1 bra $L1;"
FAULTS = {
    "no barrier": (SWAP.format("") + STORE.format("%r2"), 256, "another thread has"),
    "too small an array": (SWAP.format("bar.sync 0;") + STORE.format("%r2"), 252, "out of bounds"),
    "one address": ("st.global.u32 [%rd1], %r1;", 0, "another thread stores"),
    "beyond the end": ("add.s32 %r1, %r1, 200;" + STORE.format("%r1"), 0, "out of bounds"),
    "misaligned": ("add.s64 %rd1, %rd1, 2;" + STORE.format("%r1"), 0, "misaligned"),
    "memory that nobody wrote": (
        "mov.u32 %r4, s; ld.shared.u32 %r2, [%r4];" + STORE.format("%r2"),
        4,
        "uninitialised",
    ),
    "a register that nobody wrote": (
        "add.s32 %r2, %r3, 1;" + STORE.format("%r2"),
        0,
        "read before it is written",
    ),
    "a register that some threads wrote": (
        f"{FEW} mov.u32 %r2, 1;\n$L1:\n" + STORE.format("%r2"),
        0,
        "read before it is written",
    ),
    "division by zero": ("div.u32 %r2, 7, %r1;" + STORE.format("%r2"), 0, "division by zero"),
    "half a barrier": (f"{FEW} bar.sync 0;\n$L1:\n bar.sync 0;", 0, "barrier"),
    "half a shuffle": (
        f"{FEW} shfl.sync.bfly.b32 %r2|%p2, %r1, 1, 31, -1;\n$L1:\n",
        0,
        "do not reach",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str) -> None:
    body, shared, message = FAULTS[name]
    with pytest.raises(KernelFault, match=re.escape(message)):
        run(body, shared=shared)


@pytest.mark.parametrize(
    "statement",
    [
        "add.rz.f32 %f1, %f2, %f3;",
        "vote.sync.any.pred %p1, %p2, -1;",
        "ld.local.u32 %r2, [%rd1];",
        "@%p1 ret;",
    ],
)
def test_unknown_instructions_are_errors(statement: str) -> None:
    with pytest.raises(NotImplementedError):
        run(statement)
