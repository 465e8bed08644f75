"""The PTX of all kernels except those in test_ptx_logps.py, planted bugs, and runtime calls."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

from ptx import planted
from ptx.cases.token_rows import check_label_gradients
from ptx.families import FAMILIES, OTHER_FAMILIES
from ptx.harness.build import ARCHITECTURES
from ptx.harness.checks import Checks
from ptx.harness.kernels import CAPTURE_MODE_GLOBAL, CAPTURE_MODE_RELAXED, Kernels
from ptx.interpreter import Rounding

pytestmark = [
    pytest.mark.emulation,
    pytest.mark.exhaustive,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="built without nvcc"),
]

Load = Callable[..., Kernels]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_kernels_agree_with_float64(family: str, architecture: str, ptx_kernels: Load) -> None:
    OTHER_FAMILIES[family].require_right(ptx_kernels(architecture))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_in_one_family(architecture: str, ptx_kernels: Load) -> None:
    kernels = ptx_kernels(architecture)
    names = [name for family in FAMILIES.values() for name in family.names(kernels)]
    assert sorted(names) == sorted(kernels.entries)


# ---- planted bugs

CHECKS = {
    check.__name__.strip("_"): check
    for check in (
        *planted.BARRIERS.values(),
        *(bug.check for bug in (*planted.BUGS, planted.FUSED_BUG)),
    )
}


@pytest.mark.parametrize("check", CHECKS)
def test_the_checks_find_nothing_without_a_bug(check: str, ptx_kernels: Load) -> None:
    assert planted.found_by(ptx_kernels("100"), CHECKS[check]) == []


@pytest.mark.parametrize("bug", planted.BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_found(bug: planted.Bug, ptx_kernels: Load) -> None:
    kernels = ptx_kernels("100")
    planted.plant(kernels, bug)
    assert planted.found_by(kernels, bug.check)


@pytest.mark.parametrize("kernel", planted.BARRIERS)
def test_a_missing_barrier_is_found(kernel: str, ptx_kernels: Load) -> None:
    kernels, check = ptx_kernels("100"), planted.BARRIERS[kernel]
    found = [
        bool(planted.found_by(kernels, check))
        for _ in planted.without_each_barrier(kernels, kernel)
    ]
    assert found
    assert all(found), found


def test_a_bug_of_a_fused_product_is_found_if_products_are_fused(ptx_kernels: Load) -> None:
    found = {}
    for contracts in (False, True):
        kernels = ptx_kernels("100", Rounding(contracts=contracts))
        planted.plant(kernels, planted.FUSED_BUG)
        found[contracts] = planted.found_by(kernels, planted.FUSED_BUG.check)
    assert not found[False]
    assert found[True]


# ---- the first call of a process may be captured in a CUDA graph


def test_calls_that_may_initialize_the_runtime_use_the_relaxed_mode(ptx_kernels: Load) -> None:
    kernels = ptx_kernels("100")
    assert kernels.use_device(1) == 0
    checks = Checks()
    check_label_gradients(kernels, checks, "float32")
    assert kernels.use_device(1) == 0  # It is already the current device.
    assert kernels.use_device(0) == 0
    assert not checks.failures
    assert [call.function for call in kernels.runtime_calls] == [
        "cudaGetDevice",
        "cudaSetDevice",
        "cudaLaunchKernelExC",
        "cudaGetDevice",
        "cudaGetDevice",
        "cudaSetDevice",
    ]
    assert {call.capture_mode for call in kernels.runtime_calls} == {CAPTURE_MODE_RELAXED}
    assert kernels.capture_mode() == CAPTURE_MODE_GLOBAL


def test_the_stand_in_refuses_calls_in_another_mode(ptx_kernels: Load) -> None:
    kernels = ptx_kernels("100")
    unsupported = 900  # cudaErrorStreamCaptureUnsupported
    assert kernels.set_device_unguarded(1) == unsupported
    assert kernels.runtime_calls == [("cudaSetDevice", CAPTURE_MODE_GLOBAL)]
