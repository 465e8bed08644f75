"""The PTX of the kernels of token log-probs, executed on the CPU and compared with float64.

The emulator in tests/cuda/emulation compiles the kernels' C++ for the CPU. These tests execute what
nvcc compiles for a GPU, launched by the project's host code. So they also cover

- the inline PTX in csrc/cuda/platform.h, and the toolkit's exp, log and tanh;
- nvcc's vector loads and stores, offsets, conversions, and reads of unwritten registers;
- the layout of the kernels' arguments, grids, blocks and `__launch_bounds__`.

They do not cover ptxas, caches and time. Of the memory model, they check only that a barrier
separates the accesses of two threads to one address.

Every test prints its comparisons and the coverage of each kernel. pytest shows them with -rP.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

from ptx.families import LOGPS_FAMILIES
from ptx.harness.build import ARCHITECTURES
from ptx.harness.kernels import Kernels

pytestmark = [
    pytest.mark.emulation,
    pytest.mark.exhaustive,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="built without nvcc"),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("family", LOGPS_FAMILIES)
def test_kernels_agree_with_float64(
    family: str, architecture: str, ptx_kernels: Callable[..., Kernels]
) -> None:
    LOGPS_FAMILIES[family].require_right(ptx_kernels(architecture))
