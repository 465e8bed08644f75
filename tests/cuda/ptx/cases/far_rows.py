"""The last rows of a batch of more than 2^32 rows, where offsets need 64 bits.

Only these rows are allocated.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from ..harness.buffers import ROUNDING, SMALLEST, Buffer, Device, compute_of
from ..harness.checks import Checks
from ..harness.kernels import Kernels
from .logps_cases import Case
from .logps_reference import reference
from .members import IGNORED, strides, targets

_B, _T = 3, 2**32 + 4
_PRESENT = 5  # rows at the end
_IN_EXCESS = 4  # blocks at the end of the grid that have no row


def check_far_logps(kernels: Kernels, checks: Checks, dtype: str) -> None:
    for cap, report, V in itertools.product((0.0, 3.0), (False, True), (100, 8200)):
        _check(kernels, checks, Case(dtype, V, cap=cap, B=1, T=_PRESENT), report)


@np.errstate(all="ignore")
def _check(kernels: Kernels, checks: Checks, case: Case, has_report: bool) -> None:
    V, dtype, compute = case.V, case.dtype, compute_of(case.dtype)
    rng, device = np.random.default_rng(V), Device((1 << 16) + 128 * V)
    logits = device.put(rng.standard_normal((_PRESENT, V)), dtype)
    labels_of_rows = rng.integers(0, V, _PRESENT)
    labels_of_rows[1] = IGNORED
    rows = reference(case, logits.get(), labels_of_rows)
    grads = device.put(rng.standard_normal(_PRESENT), compute)
    logps, maxima = device.out((_PRESENT,), compute), device.out((_PRESENT,), compute)
    sum_exp, mean_logit, entropy = (device.out((_PRESENT,), "float64") for _ in range(3))
    dlogits = device.out((_PRESENT, V), dtype)

    def moved(buffer: Buffer) -> int:
        """The address that row 0 would have, given that of the present rows."""
        row_size = int(np.prod(buffer.shape[1:])) * buffer.itemsize
        return (buffer.address - (_B * _T - _PRESENT) * row_size) % 2**64

    common: dict[str, Any] = {
        "dtype": dtype,
        "V": V,
        "logits": moved(logits),
        "logits_strides": strides(_T * V, V),
        "targets": targets(moved(device.put(labels_of_rows, "int64")), _B, _T),
        "transform": {"logit_scale": 1.0, "softcap": case.cap},
        "max": moved(maxima),
        "sum_exp": moved(sum_exp),
        "first_label": 0,
        "num_labels": V,
    }
    kernels.last_blocks = _PRESENT + _IN_EXCESS
    kernels.call(
        "token_logps",
        device.memory,
        **common,
        logps=moved(logps),
        mean_logit=moved(mean_logit) if has_report else None,
        entropy=moved(entropy) if has_report else None,
    )
    kernels.call(
        "token_logps_backward",
        device.memory,
        **common,
        grad_logps=moved(grads),
        grad_strides=strides(_T, 1),
        dlogits=moved(dlogits),
        dlogits_strides=strides(_T * V, V),
    )
    kernels.last_blocks = None

    name = f"{dtype} V={V} cap={case.cap}"
    allowed = rows.logps_error + 2.0 * rows.eps * np.abs(rows.logps)
    checks.close("logps of far rows", name, logps.get(), rows.logps, allowed)
    max_of_rows, sum_of_rows = rows.where_scored(rows.max), rows.where_scored(rows.sum_exp)
    checks.close("max of far rows", name, maxima.get(), max_of_rows, rows.z_error)
    checks.close("sum_exp of far rows", name, sum_exp.get(), sum_of_rows, rows.sum_error)
    if has_report:
        means = rows.where_scored(rows.z.mean(axis=1))
        allowed = 4.0 * rows.eps * np.abs(rows.z).mean(axis=1) + rows.z_error
        checks.close("mean_logit of far rows", name, mean_logit.get(), means, allowed)
        softmax = rows.shares / rows.sum_exp[:, None]
        entropies = rows.where_scored(-(softmax * np.log(softmax)).sum(axis=1))
        allowed = rows.z_error * (1.0 + entropies) + 8.0 * rows.eps
        checks.close("entropy of far rows", name, entropy.get(), entropies, allowed)
    want = rows.gradient(grads.get())
    error = 1.01 * ROUNDING[dtype] + rows.gradient_error
    allowed = np.abs(want) * error + SMALLEST[dtype]
    checks.close("dlogits of far rows", name, dlogits.get(), want, allowed)


def check_far_gathers(kernels: Kernels, checks: Checks, dtype: str) -> None:
    """Positions whose division by T needs 64 bits."""
    for H in (2, 40):
        rng, device, T = np.random.default_rng(H), Device(1 << 16), 2**33 + 7
        source = device.put(rng.standard_normal((3, H)), dtype)
        stride_b, stride_t = -5 * 2**30, 2
        rows = device.out((1, H), dtype)
        for position in (5 * T + 3, 2**32, 6 * T - 1):
            # Makes this position's row the second one of the source.
            b, t = divmod(position, T)
            offset = H - (b * stride_b + t * stride_t)
            kernels.call(
                "gather_rows",
                device.memory,
                dtype=dtype,
                T=T,
                H=H,
                R=1,
                positions=device.put([position], "int64"),
                source=(source.address + offset * source.itemsize) % 2**64,
                source_strides=strides(stride_b, stride_t),
                rows=rows,
                gradients=None,
            )
            name = f"{dtype} H={H} position={position}"
            checks.equal("gather_rows of far positions", name, rows.get()[0], source.get()[1])
