"""Bugs to plant in the CUDA kernels, one at a time.

A mutant replaces a piece of source that its file contains once. The build ``build`` of
tests/cuda/emulation/kernels must find it in the section ``section``.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str  # in csrc
    original: str
    mutated: str
    section: str
    build: str = "plain"  # or "asan" or "tsan"


FORWARD = "cuda/token_logps_forward.cuh"
BACKWARD = "cuda/token_logps_backward.cuh"
ROWS = "cuda/rows.h"
WARP = "cuda/warp.h"
