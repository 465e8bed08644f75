"""Checks token_logps and its backward, for a vocabulary whole or in parts, and write_logps."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..harness.buffers import ROUNDING, SMALLEST, Buffer, Device, compute_of
from ..harness.checks import Checks
from ..harness.kernels import Kernels
from ..interpreter.module import Array
from .logps_cases import (
    Case,
    RowsBuffer,
    make_logits,
    make_targets,
    put_labels,
    put_rows,
    rows_out,
)
from .logps_reference import Rows, reference
from .members import strides, targets


class Outputs(NamedTuple):
    """What the forward writes, [N] each."""

    logps: Buffer
    max: Buffer
    sum_exp: Buffer
    label_z: Buffer
    mean_logit: Buffer
    entropy: Buffer


class _Run(NamedTuple):
    kernels: Kernels
    checks: Checks
    device: Device
    rows: Rows
    labels: Buffer
    parts: list[RowsBuffer]  # of the logits
    outputs: Outputs

    @property
    def case(self) -> Case:
        return self.rows.case

    def members(self, part: int) -> dict[str, Any]:
        """The members that the arguments of forward and backward share."""
        columns, logits = self.case.ranges()[part], self.parts[part]
        return {
            "dtype": self.case.dtype,
            "V": len(columns),
            "logits": logits.buffer,
            "logits_strides": strides(self.case.T * logits.stride, logits.stride),
            "targets": targets(self.labels, self.case.B, self.case.T, shift=self.case.shift),
            "transform": {"logit_scale": self.case.scale, "softcap": self.case.cap},
            "max": self.outputs.max,
            "sum_exp": self.outputs.sum_exp,
            "first_label": columns.start,
            "num_labels": self.case.V,
        }

    def close(self, what: str, got: Array, want: Array, allowed: Any, where: Any = ...) -> None:
        allowed = np.broadcast_to(allowed, got.shape)
        self.checks.close(what, str(self.case), got[where], want[where], allowed[where])


@np.errstate(all="ignore")
def check_logps(kernels: Kernels, checks: Checks, case: Case) -> None:
    rng = np.random.default_rng(case.seed + case.V)
    device = Device((1 << 16) + case.N * (case.V + case.padding) * 32)
    x = make_logits(case, rng)
    labels_of_rows = make_targets(case, rng, x)
    labels = put_labels(device, case, labels_of_rows)
    parts = [put_rows(device, x[:, each.start : each.stop], case) for each in case.ranges()]
    stored = np.concatenate([part.get() for part in parts], axis=1)
    rows = reference(case, stored, labels_of_rows)
    compute = compute_of(case.dtype)
    outputs = Outputs(
        *(device.out((case.N,), each) for each in (compute, compute, "float64", compute)),
        *(device.out((case.N,), "float64") for _ in range(2)),
    )
    run = _Run(kernels, checks, device, rows, labels, parts, outputs)
    _forward(run)
    _check_forward(run)
    if case.report:
        _check_report(run)
    _check_backward(run, rng)


def _forward(run: _Run) -> None:
    case, outputs = run.case, run.outputs
    is_plain = not case.report and not case.is_split
    num_segments = run.kernels.shared_segments(case.dtype, case.N, case.V) if is_plain else 0
    segments = run.device.out((num_segments, 3, case.N), "float64") if num_segments else None
    for i, part in enumerate(run.parts):
        if case.report != "all":  # kernels must not read the logits of other rows
            unread = np.zeros(part.buffer.shape, bool)
            unread[~run.rows.scored] = True
            part.buffer.hide(unread)
        run.kernels.call(
            "token_logps",
            run.device.memory,
            **run.members(i),
            logps=None if case.is_split else outputs.logps,
            continues=i > 0,
            label_z=outputs.label_z if case.is_split else None,
            mean_logit=outputs.mean_logit if case.report else None,
            entropy=outputs.entropy if case.report else None,
            all_positions=case.report == "all",
            segments=segments,
        )


def _check_forward(run: _Run) -> None:
    case, rows, outputs = run.case, run.rows, run.outputs
    error, eps = rows.z_error, rows.eps
    run.close("max", outputs.max.get(), rows.where_scored(rows.max), error)
    has_sum = ~rows.scored | (~np.isneginf(rows.max) & ~np.isnan(rows.z).any(axis=1))
    want = rows.where_scored(rows.sum_exp)
    run.close("sum_exp", outputs.sum_exp.get(), want, rows.sum_error, has_sum)
    allowed = rows.logps_error + 2.0 * eps * np.abs(np.nan_to_num(rows.logps, neginf=0.0))
    if not case.is_split:
        run.close("logps", outputs.logps.get(), rows.logps, allowed)
        return
    finite = np.where(rows.scored, np.nan_to_num(rows.label_z, neginf=0.0, posinf=0.0), 0.0)
    of_label = error + 4.0 * eps * np.abs(finite)
    run.close("label_z", outputs.label_z.get(), rows.where_scored(rows.label_z), of_label)
    written = _write_logps(run)
    run.close("write_logps", written.get(whole=False), rows.logps, allowed, rows.scored)


def _write_logps(run: _Run) -> Buffer:
    """Runs write_logps on the results of all parts, with a row for each token."""
    case, device, outputs = run.case, run.device, run.outputs
    positions = np.where(np.isnan(outputs.label_z.get()), -1, np.arange(case.N))
    written = device.out((case.N,), compute_of(case.dtype))
    mean_logit, entropy = (device.out((case.N,), "float64") for _ in range(2))
    has_report = case.report != ""
    run.kernels.call(
        "write_logps",
        device.memory,
        dtype=case.dtype,
        R=case.N,
        positions=device.put(positions, "int64"),
        max=outputs.max,
        sum_exp=outputs.sum_exp,
        label_z=outputs.label_z,
        logps=written,
        num_labels=case.V,
        sum_z=outputs.mean_logit if has_report else None,
        sum_exp_z=outputs.entropy if has_report else None,
        mean_logit=mean_logit if has_report else None,
        entropy=entropy if has_report else None,
    )
    return written


def _check_report(run: _Run) -> None:
    """Checks mean and entropy or, for parts, the two sums that these are computed from."""
    case, rows = run.case, run.rows
    eps = rows.eps
    scored, masked = rows.scored, rows.masked
    distances = rows.z - rows.max[:, None]
    products = np.where(np.isneginf(distances), 0.0, rows.shares * distances)
    sizes = np.where(np.isfinite(rows.z), np.abs(rows.z), 0.0)
    if case.is_split:
        means, entropies = rows.z.sum(axis=1), products.sum(axis=1)
        of_mean = 4.0 * eps * sizes.sum(axis=1) + case.V * rows.z_error
        of_entropy = np.abs(products).sum(axis=1) + rows.sum_exp
    else:
        means = rows.z.mean(axis=1)
        entropies = np.log(rows.sum_exp) - products.sum(axis=1) / rows.sum_exp
        of_mean = 4.0 * eps * sizes.mean(axis=1) + rows.z_error
        of_entropy = (np.abs(products).sum(axis=1) + rows.sum_exp) / rows.sum_exp
    of_entropy = 0.4 * rows.z_error * of_entropy + 8.0 * eps

    has_mean = scored | (masked & (case.report == "all"))
    want = np.where(has_mean, means, np.where(masked, 0.0, np.nan))
    mean_logit = run.outputs.mean_logit.get()
    # A row with NaN or +inf among its z has no mean: the result is NaN or infinite.
    no_mean = scored & (np.isnan(rows.z) | np.isposinf(rows.z)).any(axis=1)
    run.checks.equal(
        "mean_logit", str(case), np.isfinite(mean_logit[no_mean]), np.zeros(no_mean.sum())
    )
    run.close("mean_logit", mean_logit, want, of_mean, ~no_mean)
    want = rows.where_scored(np.where(rows.is_distribution, entropies, np.nan))
    has_entropy = ~scored | rows.is_distribution
    run.close("entropy", run.outputs.entropy.get(), want, of_entropy, has_entropy)


# ---- backward


def _check_backward(run: _Run, rng: np.random.Generator) -> None:
    case, rows, device = run.case, run.rows, run.device
    compute = compute_of(case.dtype)
    grads = rng.standard_normal(case.N)
    grads[rng.integers(case.N)] = 0.0
    grad_logps = device.put(grads, compute)
    grads = grad_logps.get()
    label_gradients = device.out((case.N,), compute)
    wanted, relative = rows.gradient(grads), rows.gradient_error
    # ex2 flushes subnormal results to 0, and the exp of a double is 0 below -745.
    smallest_share = 2.0**-126 if compute == "float32" else 2.0**-1073
    flushed = (np.abs(grads) * abs(case.scale) * smallest_share)[:, None]

    for i, columns in enumerate(case.ranges()):
        dlogits = _backward(run, i, grad_logps, label_gradients)
        want = wanted[:, columns.start : columns.stop].copy()
        if case.is_split:  # label_gradients has the label's element
            here = rows.scored & (rows.targets >= columns.start) & (rows.targets < columns.stop)
            want[here, rows.targets[here] - columns.start] = 0.0
        error = 1.01 * ROUNDING[case.dtype] + relative[:, columns.start : columns.stop]
        allowed = np.abs(want) * error + SMALLEST[case.dtype] + flushed
        run.close(f"dlogits {case.dtype}", dlogits, want, allowed)
    if case.is_split:
        want = np.where(rows.scored, rows.at_labels(wanted), 0.0)
        error = rows.at_labels(relative) + 4.0 * ROUNDING[compute]
        allowed = np.abs(want) * error + SMALLEST[compute] + flushed[:, 0]
        got = label_gradients.get(whole=False)
        run.close("label_gradients", got, want, allowed, rows.scored)


def _backward(run: _Run, part: int, grad_logps: Buffer, label_gradients: Buffer) -> Array:
    """The gradient of a part's logits [N, V]."""
    case, logits = run.case, run.parts[part]
    if case.dlogits_offset is None:
        dlogits = logits
        inside = np.zeros(logits.buffer.shape, bool)
        inside[:, : logits.V] = True
        dlogits.buffer.allow_writes(inside)  # also of the rows that were hidden from the forward
    else:
        dlogits = rows_out(run.device, logits, case)
    run.kernels.call(
        "token_logps_backward",
        run.device.memory,
        **run.members(part),
        grad_logps=grad_logps,
        grad_strides=strides(case.T, 1),
        dlogits=dlogits.buffer,
        dlogits_strides=strides(case.T * dlogits.stride, dlogits.stride),
        label_gradients=label_gradients if case.is_split else None,
    )
    assert dlogits.buffer.written()[:, : logits.V].all()
    return dlogits.get()
