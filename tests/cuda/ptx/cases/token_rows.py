"""Checks the kernels around matrix products: valid tokens to rows of hidden states, and back."""

from __future__ import annotations

import itertools

import numpy as np

from ..harness.buffers import DTYPES, ROUNDING, SMALLEST, Buffer, Device, compute_of, rounded
from ..harness.checks import Checks
from ..harness.kernels import Kernels
from ..interpreter.module import Array
from .members import IGNORED, strides, targets


def check_token_rows(kernels: Kernels, checks: Checks) -> None:
    # One token, tokens for one iteration of the loop, and for more than two.
    shapes = ((1, 1), (3, 50), (2, 4500))
    for dtype, (B, T), shift in itertools.product(("bfloat16", "float64"), shapes, (False, True)):
        for spare, has_logps in ((0, True), (5, False), (-3, True), (20000, False)):
            check_select_tokens(kernels, checks, dtype, B, T, shift, spare, has_logps)
    for dtype in DTYPES:
        # Less than a vector, some vectors, several iterations of the loop; aligned and not.
        for H, offset in itertools.product((1, 2, 3, 4, 8, 40, 1001, 4099, 17008), (0, 1)):
            check_gather(kernels, checks, dtype, H, offset, offset == H % 2)
        check_label_gradients(kernels, checks, dtype)
        for count, offset, is_first in itertools.product((1, 1000, 20003), (0, 1), (True, False)):
            check_add_partial(kernels, checks, dtype, count, offset, is_first)
        for H, has_sum, transposed in itertools.product(
            (3, 64, 1001, 1600, 2112, 4160), (True, False), (True, False)
        ):
            offset = int(H == 64 and transposed)
            check_hidden_gradient(kernels, checks, dtype, H, has_sum, transposed, offset)


def check_select_tokens(
    kernels: Kernels,
    checks: Checks,
    dtype: str,
    B: int,
    T: int,
    shift: bool,
    spare: int,
    has_logps: bool,
) -> None:
    """Positions and labels of the valid tokens. R is their number plus spare rows."""
    rng, N = np.random.default_rng(B * T), B * T
    device = Device((1 << 16) + N * 64)
    labels = np.where(rng.random((B, T)) < 0.6, rng.integers(0, 99, (B, T)), IGNORED)
    of_tokens = np.full((B, T), IGNORED)
    of_tokens[:, : T - shift] = labels[:, int(shift) :]
    of_tokens = of_tokens.reshape(-1)
    valid = np.flatnonzero(of_tokens != IGNORED)
    R = max(len(valid) + spare, 0)
    positions, selected = device.out((R,), "int64"), device.out((R,), "int64")
    logps = device.out((N,), compute_of(dtype))
    kernels.call(
        "select_tokens",
        device.memory,
        targets=targets(device.put(labels, "int64"), B, T, shift=shift),
        num_labels=99,
        R=R,
        positions=positions,
        labels=selected,
        dtype=dtype,
        logps=logps if has_logps else None,
    )
    name = f"{dtype} {B}x{T} shift={shift} spare={spare}"
    want = np.full((2, R), [[-1], [IGNORED]])
    count = min(R, len(valid))
    want[0, :count], want[1, :count] = valid[:count], of_tokens[valid[:count]]
    checks.equal("select_tokens", name, [positions.get(), selected.get()], want)
    if has_logps:
        is_nan = np.isnan(logps.get())
        checks.equal("select_tokens logps", name, is_nan, of_tokens != IGNORED)


def put_positions(device: Device, rng: np.random.Generator, R: int, N: int) -> Buffer:
    """R of N positions in order; -1 for a few rows."""
    positions = np.sort(rng.permutation(N)[:R])
    positions[rng.random(R) < 0.2] = -1
    return device.put(positions, "int64")


def where_written(buffer: Buffer) -> Array:
    """The values that were written, and NaN elsewhere."""
    return np.where(buffer.written(), buffer.get(whole=False), np.nan)


def check_gather(
    kernels: Kernels, checks: Checks, dtype: str, H: int, offset: int, has_gradients: bool
) -> None:
    rng = np.random.default_rng(H)
    B, T, R, name = 3, 7, 12, f"{dtype} H={H} offset={offset}"
    device = Device((1 << 16) + 64 * 21 * (H + 8))
    of_rows = put_positions(device, rng, R, B * T)
    positions, stride = of_rows.get(), H + offset
    source = device.put(rng.standard_normal((B, T, stride)), dtype, offset)
    gradients = rng.standard_normal(R)
    gradients[rng.random(R) < 0.3] = 0.0
    rows = device.out((R, H), dtype)
    kernels.call(
        "gather_rows",
        device.memory,
        dtype=dtype,
        T=T,
        H=H,
        R=R,
        positions=of_rows,
        source=source,
        source_strides=strides(T * stride, stride),
        rows=rows,
        gradients=device.put(gradients, compute_of(dtype)) if has_gradients else None,
    )
    given = source.get()[:, :, :H].reshape(B * T, H)
    has_row = (positions >= 0) & ((gradients != 0.0) | (not has_gradients))
    want = np.where(has_row[:, None], given[positions], 0.0)
    checks.equal("gather_rows", name, rows.get(), want)


def check_label_gradients(kernels: Kernels, checks: Checks, dtype: str) -> None:
    rng = np.random.default_rng(1)
    device, R, V, first, stride = Device(), 300, 9, 20, 11
    labels = rng.integers(first - 8, first + V + 8, R)
    labels[::7] = IGNORED
    values = device.put(rng.standard_normal(R), compute_of(dtype))
    dlogits = device.out((R, stride), dtype)
    kernels.call(
        "put_label_gradients",
        device.memory,
        dtype=dtype,
        R=R,
        V=V,
        first_label=first,
        ignore_index=IGNORED,
        labels=device.put(labels, "int64"),
        label_gradients=values,
        dlogits=dlogits,
        dlogits_stride=stride,
    )
    want = np.full((R, stride), np.nan)
    here = np.flatnonzero((labels >= first) & (labels < first + V))
    want[here, labels[here] - first] = rounded(values.get()[here], dtype)
    checks.equal("put_label_gradients", dtype, where_written(dlogits), want)


def check_add_partial(
    kernels: Kernels, checks: Checks, dtype: str, count: int, offset: int, is_first: bool
) -> None:
    rng = np.random.default_rng(count)
    device, compute = Device((1 << 16) + 32 * count), compute_of(dtype)
    partial = device.put(rng.standard_normal(count), dtype, offset)
    if is_first:
        sums, before = device.out((count,), compute, offset), np.zeros(count)
    else:
        sums = device.put(rng.standard_normal(count), compute, offset, writable=True)
        before = sums.get()
    kernels.call(
        "add_partial",
        device.memory,
        dtype=dtype,
        count=count,
        partial=partial,
        sum=sums,
        is_first=is_first,
    )
    want = rounded(before + partial.get(), compute)
    name = f"{dtype} {count} offset={offset} first={is_first}"
    checks.equal("add_partial", name, sums.get(), want)


def check_hidden_gradient(
    kernels: Kernels,
    checks: Checks,
    dtype: str,
    H: int,
    has_sum: bool,
    transposed: bool,
    offset: int,
) -> None:
    """The weight is [V, H], or the transpose of [H, V]; offset elements behind a boundary."""
    rng = np.random.default_rng(H)
    B, T, R, V, compute = 2, 9, 12, 15, compute_of(dtype)
    device = Device((1 << 18) + 400 * (H + 8))
    of_rows = put_positions(device, rng, R, B * T)
    positions = of_rows.get()
    labels = rng.integers(0, V, R)
    labels[np.flatnonzero(positions >= 0)[0]] = V + 3
    gradients = device.put(rng.standard_normal(R), compute)
    weight = device.put(rng.standard_normal((H, V) if transposed else (V, H)), dtype, offset)
    partial = device.put(rng.standard_normal((R, H)), dtype)
    sums = device.put(rng.standard_normal((R, H)), compute)
    dhidden = device.out((B * T, H), dtype)
    kernels.call(
        "hidden_gradient",
        device.memory,
        dtype=dtype,
        T=T,
        H=H,
        R=R,
        num_labels=V,
        positions=of_rows,
        labels=device.put(labels, "int64"),
        label_gradients=gradients,
        weight=weight,
        weight_stride_v=1 if transposed else H,
        weight_stride_h=V if transposed else 1,
        partial=partial,
        sum=sums if has_sum else None,
        dhidden=dhidden,
    )
    name = f"{dtype} H={H} sum={has_sum} transposed={transposed} offset={offset}"
    of_labels = (weight.get().T if transposed else weight.get())[np.minimum(labels, V - 1)]
    terms = [partial.get(), gradients.get()[:, None] * of_labels]
    terms += [sums.get()] if has_sum else []
    total, size = sum(terms), sum(np.abs(term) for term in terms)
    allowed = 3.0 * ROUNDING[compute] * size + 1.01 * ROUNDING[dtype] * np.abs(total)
    total[labels >= V] = np.nan
    here = positions >= 0
    want, found = np.full((B * T, H), np.nan), where_written(dhidden)
    want[positions[here]] = total[here]
    is_written = dhidden.written().all(axis=1)
    checks.equal("hidden_gradient rows", name, is_written, np.isin(range(B * T), positions))
    rows = positions[here]
    error = allowed[here] + SMALLEST[dtype]
    checks.close("hidden_gradient", name, found[rows], want[rows], error)
