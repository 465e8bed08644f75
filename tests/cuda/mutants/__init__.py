"""Bugs to plant in the CUDA kernels, one at a time, and what has to find each of them.

A mutant replaces a piece of source that stands in its file once. ``build`` is the build of
tests/cuda/emulation/kernels that finds it, and ``section`` what the program has to run for that.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str  # in csrc
    original: str
    mutated: str
    section: str
    build: str = "plain"  # or asan or tsan


FORWARD = "cuda/token_logps_forward.cuh"
BACKWARD = "cuda/token_logps_backward.cuh"
ROWS = "cuda/rows.h"
WARP = "cuda/warp.h"
