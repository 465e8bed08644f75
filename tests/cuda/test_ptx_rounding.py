"""The kernels' PTX with other roundings than test_ptx_logps.py and test_ptx_kernels.py assume.

PTX lets ptxas fuse products with sums, and a GPU round approximate instructions differently. Each
test uses one architecture, since the others have the same products and sums.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

from ptx.families import FAMILIES, LOGPS_FAMILIES
from ptx.harness.kernels import Kernels
from ptx.interpreter import Rounding

pytestmark = [
    pytest.mark.emulation,
    pytest.mark.exhaustive,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="built without nvcc"),
]

Load = Callable[..., Kernels]


# The preference loss is compiled without contraction: -fmad=false.
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "pairs"])
def test_products_fused_with_sums_stay_within_the_same_bounds(
    family: str, ptx_kernels: Load
) -> None:
    FAMILIES[family].require_right(ptx_kernels("100", Rounding(contracts=True)))


# For float64, only the toolkit's functions use approximate instructions.
@pytest.mark.parametrize("family", [name for name in LOGPS_FAMILIES if name != "logps float64"])
def test_approximate_instructions_may_be_off(family: str, ptx_kernels: Load) -> None:
    FAMILIES[family].require_right(ptx_kernels("90", Rounding(perturbs=True)))
