"""Reference results of rows in float64, and bounds on errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from support import oracle

from ..harness.buffers import ROUNDING, compute_of
from ..interpreter.module import Array
from .logps_cases import Case
from .members import IGNORED


@dataclass(frozen=True)
class Rows:
    """Rows [N, V] of logits as they are stored, with their targets [N]."""

    case: Case
    x: Array
    z: Array
    targets: Array
    max: Array  # [N], like the next two; ignores NaN
    sum_exp: Array
    logps: Array  # 0 at masked rows, NaN at labels out of range
    shares: Array  # exp(z - max) [N, V]

    @property
    def masked(self) -> Array:
        return self.targets == IGNORED

    @property
    def scored(self) -> Array:
        return (self.targets >= 0) & (self.targets < self.case.V)

    @property
    def labels(self) -> Array:
        """Targets as columns; 0 where a row is not scored."""
        return np.where(self.scored, self.targets, 0)

    @property
    def label_z(self) -> Array:
        return self.at_labels(self.z)

    @property
    def is_distribution(self) -> Array:
        """Whether softmax is defined."""
        return np.isfinite(self.max) & ~np.isnan(self.z).any(axis=1)

    def at_labels(self, values: Array) -> Array:
        """values[row, label of the row]."""
        return values[np.arange(len(values)), self.labels]

    def where_scored(self, values: Array) -> Array:
        """The values of scored rows; 0 at masked rows, NaN at labels out of range."""
        return np.where(self.masked, 0.0, np.where(self.scored, values, np.nan))

    def gradient(self, grads: Array) -> Array:
        """dlogits [N, V] of incoming gradients [N]."""
        labels = np.where(self.scored, self.targets, IGNORED)
        dlogits = oracle.token_logps_grad(
            grads[None],
            self.x[None],
            labels[None],
            shift=False,
            logit_scale=self.case.scale,
            softcap=self.case.cap,
        )[0]
        dlogits[~self.masked & ~self.scored] = np.nan
        return dlogits

    # ---- bounds on errors

    @property
    def eps(self) -> float:
        return ROUNDING[compute_of(self.case.dtype)]

    @property
    def z_error(self) -> Array:
        """Of z - max: roundings of both, of their difference, and of the softcap's tanh."""

        def largest(values: Array) -> Array:
            return np.where(np.isfinite(values), np.abs(values), 0.0).max(axis=1)

        size, spread = largest(self.z), largest(self.z - self.max[:, None])
        return self.eps * (2.0 * size + 2.0 * spread + 6.0 * self.case.cap + 8.0)

    @property
    def sum_error(self) -> Array:
        """Of sum_exp. Its largest term is exactly 1, however large z is.

        A few terms are added up with it in the dtype of z, which rounds each sum.
        """
        return (self.sum_exp - 1.0) * self.z_error + 16.0 * self.eps * self.sum_exp

    @property
    def logps_error(self) -> Array:
        """Of logps before they are rounded. The largest z has exactly the distance 0 to max."""
        of_distance = np.where(self.label_z == self.max, 0.0, self.z_error)
        return of_distance + self.sum_error / self.sum_exp

    @property
    def gradient_error(self) -> Array:
        """Of an element of the gradient before it is rounded, relative to it [N, V]."""
        relative = (2.0 * self.z_error + 8.0 * self.eps)[:, None] + np.zeros_like(self.z)
        if self.case.cap:
            # The error of 1 - tanh^2 is that of its terms, however small the difference is.
            slope = 1.0 / np.cosh(np.where(np.isfinite(self.z), self.cap_argument, 0.0)) ** 2
            relative += 8.0 * self.eps / np.maximum(slope, self.eps)
        # The label's element is 1 - exp(logp).
        of_label = 2.0 * self.logps_error / np.maximum(-self.logps, 1e-300)
        rows = np.flatnonzero(self.scored & self.is_distribution)
        relative[rows, self.labels[rows]] += of_label[rows]
        return relative

    @property
    def cap_argument(self) -> Array:
        """The argument of tanh."""
        return self.case.scale * self.x / self.case.cap


@np.errstate(all="ignore")
def reference(case: Case, x: Array, targets: Array) -> Rows:
    z = case.scale * x
    if case.cap:
        z = case.cap * np.tanh(z / case.cap)
    top = np.fmax.reduce(z, axis=1)
    shares = np.exp(z - np.where(np.isneginf(top), 0.0, top)[:, None])
    scored = (targets >= 0) & (targets < case.V)
    logps, _, _ = oracle.token_logps(
        x[None],
        np.where(scored, targets, IGNORED)[None],
        shift=False,
        logit_scale=case.scale,
        softcap=case.cap,
    )
    logps = np.where((targets == IGNORED) | scored, logps[0], np.nan)
    return Rows(case, x, z, targets, top, shares.sum(axis=1), logps, shares)
