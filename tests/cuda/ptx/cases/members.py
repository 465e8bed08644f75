"""Members that the argument structs share."""

from __future__ import annotations

from typing import Any

from ..harness.buffers import Buffer

IGNORED = -100


def strides(b: int, t: int) -> dict[str, int]:
    return {"b": b, "t": t}


def targets(
    labels: Buffer | int, B: int, T: int, *, shift: bool = False, stride_t: int = 1
) -> dict[str, Any]:
    """Labels [B, T], in a buffer or at an address."""
    return {
        "labels": labels,
        "strides": strides(T * stride_t, stride_t),
        "B": B,
        "T": T,
        "ignore_index": IGNORED,
        "shift": shift,
    }
