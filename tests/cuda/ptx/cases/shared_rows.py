"""Rows that several blocks share: the forward merges their segments, the backward needs no merge.

All sequences read the same logits, with a stride of 0 for B, and differ only in their labels. So
there can be so many rows that a block gets more than one segment.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from ..harness.buffers import Buffer, Device, compute_of
from ..harness.checks import Checks
from ..harness.kernels import Kernels
from ..interpreter.module import Array
from .logps_cases import SEGMENT, Case
from .logps_reference import reference
from .members import IGNORED, strides, targets

_T = 3


def check_shared_rows(kernels: Kernels, checks: Checks, dtype: str) -> None:
    # As many blocks as segments, and fewer.
    for B, cap in itertools.product((1, 130), (0.0, 8.0)):
        V = 3 * SEGMENT[dtype] + 1001
        _check(kernels, checks, Case(dtype, V, B=B, T=_T, cap=cap, scale=0.9, offset=1))


@np.errstate(all="ignore")
def _check(kernels: Kernels, checks: Checks, case: Case) -> None:
    V, compute, rng = case.V, compute_of(case.dtype), np.random.default_rng(case.B)
    device = Device((1 << 17) + V * _T * 32 + case.N * 400)
    x = rng.standard_normal((_T, V)) * case.amplitude
    x[0, : SEGMENT[case.dtype]] = -np.inf  # a segment that adds nothing
    x[1, V // 2] += 30.0
    logits = device.put(x, case.dtype, case.offset)
    labels = np.full((case.B, case.T), IGNORED)
    # The first sequence has labels in different segments. A few later ones have labels, too.
    labels[0] = (2 * SEGMENT[case.dtype], V - 1, 5)
    if case.B > 1:
        labels[17, 1], labels[60, 2], labels[-1, 0], labels[-2, 0] = 0, V, V - 2, 3
    of_labels = device.put(labels, "int64")
    num_segments = kernels.shared_segments(case.dtype, case.N, V)
    assert num_segments == 4, num_segments
    common: dict[str, Any] = {
        "dtype": case.dtype,
        "V": V,
        "logits": logits,
        "logits_strides": strides(0, V),
        "targets": targets(of_labels, case.B, case.T),
        "transform": {"logit_scale": case.scale, "softcap": case.cap},
    }

    def forward(segments: Buffer | None) -> list[Buffer]:
        dtypes = (compute, compute, "float64")
        logps, maxima, sum_exp = (device.out((case.N,), each) for each in dtypes)
        kernels.call(
            "token_logps",
            device.memory,
            **common,
            logps=logps,
            max=maxima,
            sum_exp=sum_exp,
            segments=segments,
        )
        return [logps, maxima, sum_exp]

    shared = forward(device.out((num_segments, 3, case.N), "float64"))
    alone = forward(None)
    got = np.stack([buffer.get() for buffer in shared])
    checks.equal("shared rows", str(case), got, np.stack([buffer.get() for buffer in alone]))

    of_rows = labels.reshape(-1)
    scored = np.flatnonzero(of_rows != IGNORED)
    rows = reference(case, logits.get()[scored % _T], of_rows[scored])
    allowed = rows.logps_error + 2.0 * rows.eps * np.abs(np.nan_to_num(rows.logps, neginf=0.0))
    want = np.zeros(case.N)
    want[scored] = rows.logps
    of_all = np.ones(case.N)
    of_all[scored] = allowed
    checks.close("logps of shared rows", str(case), got[0], want, of_all)
    if case.B == 1:
        _check_gradient(kernels, checks, case, device, common, shared, rows.gradient)


def _check_gradient(
    kernels: Kernels,
    checks: Checks,
    case: Case,
    device: Device,
    common: dict[str, Any],
    saved: list[Buffer],
    gradient: Any,
) -> None:
    """Checks the gradient of few rows, loosely: other checks establish its accuracy."""
    grads: Array = np.array([0.5, -2.0, 1.25])
    dlogits = device.out((case.N, case.V), case.dtype, case.offset)
    kernels.call(
        "token_logps_backward",
        device.memory,
        **common,
        grad_logps=device.put(grads, compute_of(case.dtype)),
        grad_strides=strides(case.T, 1),
        max=saved[1],
        sum_exp=saved[2],
        dlogits=dlogits,
        dlogits_strides=strides(case.T * case.V, case.V),
    )
    want = gradient(grads)
    allowed = 0.01 * np.abs(want) + 1e-6
    checks.close("dlogits of shared rows", str(case), dlogits.get(), want, allowed)
