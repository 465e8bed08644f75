"""Checks the kernels for vocabulary shards: merged rows, labels' shares of dhidden, dhidden."""

from __future__ import annotations

import itertools

import numpy as np

from ..harness.buffers import DTYPES, ROUNDING, Device, compute_of, rounded
from ..harness.checks import Checks
from ..harness.kernels import Kernels
from .members import IGNORED, targets
from .token_rows import put_positions, where_written


def check_shards(kernels: Kernels, checks: Checks) -> None:
    for dtype, K, has_positions in itertools.product(
        ("float32", "float64"), (1, 3, 9), (True, False)
    ):
        check_merge_shards(kernels, checks, dtype, K, has_positions)
    for dtype, H in itertools.product(DTYPES, (300, 1400)):
        check_label_shares(kernels, checks, dtype, H)
    for dtype, H, offset in itertools.product(DTYPES, (1, 4, 40, 1001), (0, 1)):
        check_scatter(kernels, checks, dtype, H, offset)


@np.errstate(all="ignore")
def check_merge_shards(
    kernels: Kernels, checks: Checks, dtype: str, K: int, has_positions: bool
) -> None:
    rng = np.random.default_rng(K)
    device, B, T, V = Device(), 3, 61, 5  # V labels on each shard
    N, eps = B * T, ROUNDING[dtype]
    z = rng.standard_normal((K, N, V)) * 5.0
    z[:, 1] += 2000.0
    # Some shards lie so far below others that exp of the distance is subnormal.
    z[:, 100:] -= 720.0 * rng.integers(0, 2, (K, N - 100, 1))
    z = rounded(z, dtype)
    z[0, 2] = -np.inf
    z[:, 3] = -np.inf
    z[-1, 4, 0] = np.nan
    labels = rng.integers(0, K * V, N)
    labels[::5] = IGNORED
    masked = labels == IGNORED
    top = np.fmax.reduce(z, axis=2)
    sums = np.exp(z - np.where(np.isneginf(top), 0.0, top)[..., None]).sum(axis=2)
    label_z = np.full((K, N), np.nan)
    scored = np.flatnonzero(~masked)
    shard, column = labels[scored] // V, labels[scored] % V
    label_z[shard, scored] = z[shard, scored, column]
    if K > 1:
        label_z[:2, 6] = 1.0  # on two shards
        label_z[:, 7] = np.nan  # on none
    positions = rng.permutation(N)
    logps, maxima = device.out((N,), dtype), device.out((N,), dtype)
    sum_exp = device.out((N,), "float64")
    kernels.call(
        "merge_shards",
        device.memory,
        dtype=dtype,
        targets=targets(device.put(labels.reshape(B, T), "int64"), B, T),
        K=K,
        shards=device.put(np.stack([top, sums, label_z], axis=1), "float64"),
        positions=device.put(positions, "int64") if has_positions else None,
        logps=logps,
        max=maxima,
        sum_exp=sum_exp,
    )

    name = f"{dtype} K={K} positions={has_positions}"
    whole = np.concatenate(list(z), axis=1)
    want_max = np.fmax.reduce(whole, axis=1)
    reference = np.where(np.isneginf(want_max), 0.0, want_max)
    want_sum = np.exp(whole - reference[:, None]).sum(axis=1)
    want = np.fmax.reduce(label_z, axis=0) - want_max - np.log(want_sum)
    if K > 1:
        want[6] = np.nan
    allowed = eps * np.abs(want_max) + 1e-300
    checks.close("merged max", name, maxima.get(), np.where(masked, 0.0, want_max), allowed)
    has_sum = masked | np.isfinite(want_max)
    of_sums = (K + 2) * 2.0**-51  # each shard's sum and exp are rounded
    got, expected = sum_exp.get(), np.where(masked, 0.0, want_sum)
    allowed = want_sum * of_sums
    checks.close("merged sum_exp", name, got[has_sum], expected[has_sum], allowed[has_sum])
    if has_positions:  # then masked rows are not written
        checks.equal("merged rows", name, logps.written()[positions], ~masked)
        got, expected = logps.get(whole=False)[positions][~masked], want[~masked]
    else:
        got, expected = logps.get(), np.where(masked, 0.0, want)
    allowed = 2.0 * eps * np.abs(np.nan_to_num(expected, neginf=0.0)) + of_sums
    checks.close("merged logps", name, got, expected, allowed)


def check_label_shares(kernels: Kernels, checks: Checks, dtype: str, H: int) -> None:
    rng = np.random.default_rng(H)
    device, R, V, first, compute = Device(), 13, 6, 30, compute_of(dtype)
    labels = rng.integers(first - 3, first + V + 3, R)
    labels[2] = IGNORED
    gradients = device.put(rng.standard_normal(R), compute)
    weight = device.put(rng.standard_normal((V, H)), dtype, 1)
    sums = device.put(rng.standard_normal((R, H)), compute, writable=True)
    before = sums.get()
    kernels.call(
        "add_label_shares",
        device.memory,
        dtype=dtype,
        H=H,
        R=R,
        first_label=first,
        V=V,
        ignore_index=IGNORED,
        labels=device.put(labels, "int64"),
        label_gradients=gradients,
        weight=weight,
        weight_stride_v=H,
        weight_stride_h=1,
        sum=sums,
    )
    here = (labels >= first) & (labels < first + V)
    of_labels = weight.get()[np.where(here, labels - first, 0)]
    shares = np.where(here, gradients.get(), 0.0)[:, None] * of_labels
    allowed = 2.0 * ROUNDING[compute] * (np.abs(before) + np.abs(shares)) + 1e-300
    checks.close("add_label_shares", f"{dtype} H={H}", sums.get(), before + shares, allowed)


def check_scatter(kernels: Kernels, checks: Checks, dtype: str, H: int, offset: int) -> None:
    rng, R, N = np.random.default_rng(H), 12, 21
    device = Device((1 << 16) + 64 * N * (H + 8))
    of_rows = put_positions(device, rng, R, N)
    values = device.put(rng.standard_normal((R, H)), compute_of(dtype))
    to = device.out((N, H), dtype, offset)
    kernels.call(
        "scatter_rows", device.memory, dtype=dtype, H=H, R=R, positions=of_rows, rows=values, to=to
    )
    want, here = np.full((N, H), np.nan), of_rows.get() >= 0
    want[of_rows.get()[here]] = rounded(values.get()[here], dtype)
    checks.equal("scatter_rows", f"{dtype} H={H} offset={offset}", where_written(to), want)
