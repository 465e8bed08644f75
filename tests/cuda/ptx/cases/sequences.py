"""Checks sequence_targets, sequence_logps and its backward."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np

from support import oracle

from ..harness.buffers import ROUNDING, Buffer, Device
from ..harness.checks import Checks
from ..harness.kernels import Kernels
from ..interpreter.module import Array
from .members import IGNORED, strides, targets


class Layout(NamedTuple):
    """What a batch looks like: rows [B, T], or sequences of these lengths in the flat layout."""

    shape: tuple[int, int] = (0, 0)
    lengths: tuple[int, ...] = ()
    seed: int = 0
    shift: bool = False
    density: float = 0.7  # of valid tokens
    amplitude: float = 2.0  # of token log-probs
    empties: tuple[int, ...] = ()  # sequences without a valid token


class Batch(NamedTuple):
    """Token log-probs [B, T] on a device, and the labels that say which are valid."""

    device: Device
    values: Array
    valid: Array
    edges: Array  # [S + 1]: where sequences begin and end among all tokens
    is_flat: bool
    members: dict[str, Any]  # of targets and sequences
    token_members: dict[str, Any]

    @property
    def S(self) -> int:
        return len(self.edges) - 1

    @property
    def cu_seqlens(self) -> Array | None:
        return self.edges if self.is_flat else None

    def spans(self) -> list[slice]:
        return [slice(*each) for each in itertools.pairwise(self.edges.tolist())]

    def gradient_out(self, dtype: str) -> Buffer:
        """Allocates a gradient of token log-probs. In the flat layout, it starts as zeros."""
        if not self.is_flat:
            return self.device.out(self.valid.shape, dtype)
        return self.device.put(np.zeros(self.valid.shape), dtype, writable=True)


def make_batch(dtype: str, layout: Layout) -> Batch:
    """The first and the last position of the flat layout belong to no sequence."""
    rng = np.random.default_rng(layout.seed)
    B, T = layout.shape
    edges = np.arange(B + 1) * T
    if layout.lengths:
        edges = np.concatenate([[1], 1 + np.cumsum(layout.lengths)])
        B, T = 1, int(edges[-1]) + 1
    valid = rng.random((B, T)) < layout.density
    if layout.shift:
        valid[:, -1] = False
    for s in layout.empties:
        valid.reshape(-1)[edges[s] : edges[s + 1]] = False
    labels = np.where(valid, rng.integers(0, 1000, (B, T)), IGNORED)
    if layout.shift:
        labels = np.concatenate([np.full((B, 1), 7), labels[:, :-1]], axis=1)
    device = Device((1 << 19) + B * T * 64)

    # Values are every other element. Kernels must not read others, nor those of masked tokens.
    stride = 2 * T + 3
    values = -np.abs(rng.standard_normal((B, T))) * layout.amplitude - 0.01
    spread = np.full((B, stride), np.nan)
    spread[:, 0 : 2 * T : 2] = values
    tokens = device.put(spread, dtype)
    unread = np.ones((B, stride), bool)
    unread[:, 0 : 2 * T : 2] = ~valid
    tokens.hide(unread)
    members = {
        "targets": targets(device.put(labels, "int64"), B, T, shift=layout.shift),
        "sequences": {
            "cu_seqlens": device.put(edges, "int64") if layout.lengths else None,
            "S": len(edges) - 1,
        },
    }
    return Batch(
        device=device,
        values=tokens.get(whole=False)[:, 0 : 2 * T : 2],
        valid=valid,
        edges=edges,
        is_flat=bool(layout.lengths),
        members=members,
        token_members={"token_logps": tokens, "token_strides": strides(stride, 2)},
    )


def check_sequences(kernels: Kernels, checks: Checks) -> None:
    for dtype, average in itertools.product(("float32", "float64"), (True, False)):
        for layout in (
            Layout((5, 37), empties=(2,)),
            Layout((2, 2600), seed=1, shift=True),
            Layout(lengths=(0, 3, 1200, 40, 1), seed=2),
        ):
            check_sequence_logps(kernels, checks, dtype, average, layout)
    for shift, lengths in itertools.product((False, True), ((3, 0, 1, 40), (700, 2500), (2, 4086))):
        check_sequence_targets(kernels, checks, lengths, shift)
    for dtype in ("float32", "float64"):
        check_absent_sequences(kernels, checks, dtype)


def check_sequence_logps(
    kernels: Kernels, checks: Checks, dtype: str, average: bool, layout: Layout
) -> None:
    batch, eps = make_batch(dtype, layout), ROUNDING[dtype]
    name, device = f"{dtype} average={average} {layout}", batch.device
    logps, counts = device.out((batch.S,), dtype), device.out((batch.S,), "int64")
    members = {"dtype": dtype, **batch.members, "average": average}
    kernels.call(
        "sequence_logps",
        device.memory,
        **members,
        **batch.token_members,
        logps=logps,
        counts=counts,
    )
    want, want_counts = oracle.sequence_logps(
        batch.values, batch.valid, average_log_prob=average, cu_seqlens=batch.cu_seqlens
    )
    checks.equal("sequence counts", name, counts.get(), want_counts)
    allowed = 2.0 * eps * np.abs(np.nan_to_num(want)) + 1e-300
    checks.close("sequence logps", name, logps.get(), want, allowed)

    grads = np.random.default_rng(1).standard_normal(batch.S)
    grad_logps = device.put(np.stack([grads, np.zeros(batch.S)], axis=1), dtype)
    out = batch.gradient_out(dtype)
    kernels.call(
        "sequence_logps_backward",
        device.memory,
        **members,
        grad_logps=grad_logps,
        grad_stride=2,
        counts=counts,
        grad_token_logps=out,
    )
    of_tokens = grad_logps.get()[:, 0] / (np.maximum(want_counts, 1) if average else 1)
    want, valid = np.zeros(batch.valid.shape), batch.valid.reshape(-1)
    for s, span in enumerate(batch.spans()):
        want.reshape(-1)[span] = np.where(valid[span], of_tokens[s], 0.0)
    allowed = 2.0 * eps * np.abs(want) + 1e-300
    checks.close("sequence gradient", name, out.get(), want, allowed)


def check_sequence_targets(
    kernels: Kernels, checks: Checks, lengths: tuple[int, ...], shift: bool
) -> None:
    """No label is taken across the end of a sequence. Positions outside sequences are masked."""
    rng, device = np.random.default_rng(len(lengths)), Device()
    edges = np.concatenate([[2], 2 + np.cumsum(lengths)])
    N = int(edges[-1]) + 3
    labels = rng.integers(0, 50, N)
    out = device.out((N,), "int64")
    every_other = device.put(np.stack([labels, labels * 0], axis=1), "int64")
    kernels.call(
        "sequence_targets",
        device.memory,
        labels=targets(every_other, 1, N, shift=shift, stride_t=2),
        num_labels=50,
        sequences={"cu_seqlens": device.put(edges, "int64"), "S": len(lengths)},
        targets=out,
    )
    want = np.full(N, IGNORED)
    for first, end in itertools.pairwise(edges):
        want[first : max(end - shift, first)] = labels[min(first + shift, end) : end]
    checks.equal("sequence targets", f"{lengths} shift={shift}", out.get(), want)


def check_absent_sequences(kernels: Kernels, checks: Checks, dtype: str) -> None:
    """The log-prob of a sequence that cu_seqlens puts out of range is NaN."""
    for edges in ([-1, 3, 5], [0, 6, 5], [0, 3, 999]):
        batch = make_batch(dtype, Layout(lengths=(3, 4), seed=1))
        device, T = batch.device, batch.valid.shape[1]
        logps, counts = device.out((2,), dtype), device.out((2,), "int64")
        kernels.call(
            "sequence_logps",
            device.memory,
            dtype=dtype,
            targets=batch.members["targets"],
            sequences={"cu_seqlens": device.put(edges, "int64"), "S": 2},
            average=True,
            **batch.token_members,
            logps=logps,
            counts=counts,
        )
        want = [not 0 <= first <= end <= T for first, end in itertools.pairwise(edges)]
        checks.equal("absent sequences", f"{dtype} {edges}", np.isnan(logps.get()), want)
