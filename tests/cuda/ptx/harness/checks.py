"""Comparisons that continue after a failure, and a summary of them."""

from __future__ import annotations

from typing import Any

import numpy as np


class Checks:
    """Errors are in units of the error that is allowed: above 1 is a failure."""

    def __init__(self) -> None:
        self.worst: dict[str, tuple[float, str]] = {}  # by what was compared: error and case
        self.failures: list[str] = []
        self.num_values = 0

    def close(self, what: str, case: str, got: Any, want: Any, allowed: Any) -> None:
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert got.shape == want.shape, (got.shape, want.shape)
        self.num_values += got.size
        if not got.size:
            return
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        with np.errstate(all="ignore"):
            error = np.where(same, 0.0, np.abs(got - want) / np.broadcast_to(allowed, got.shape))
        error = np.where(np.isnan(error), np.inf, error)
        at = np.unravel_index(np.argmax(error), error.shape)
        if error[at] > self.worst.get(what, (-1.0, ""))[0]:
            self.worst[what] = (float(error[at]), case)
        if error[at] > 1.0:
            self.failures.append(
                f"{what}, {case}: expected {want[at]!r} at {tuple(map(int, at))}, got {got[at]!r}"
                f" ({error[at]:.3g} of the allowed error; {int((error > 1.0).sum())} such values)"
            )

    def equal(self, what: str, case: str, got: Any, want: Any) -> None:
        self.close(what, case, got, want, np.finfo(np.float64).tiny)

    def summary(self) -> str:
        lines = [f"{self.num_values} values compared"]
        for what, (error, case) in sorted(self.worst.items()):
            lines.append(f"  {what}: at most {error:.3f} of the allowed error, in {case[:150]}")
        return "\n".join(lines)
