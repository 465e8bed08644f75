"""Runs the CUDA kernels in the emulator, and plants races. test_mutants.py plants other bugs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mutants import Mutant
from mutants.planted import MUTANTS, require_found
from support.emulation import ChangeableKernels, EmulatedKernels

pytestmark = pytest.mark.emulation

Build = Callable[..., EmulatedKernels]
Builds = Callable[[str], ChangeableKernels]

SECTIONS = [
    "values",
    "parts",
    "report",
    "token_rows",
    "sequences",
    "preference",
    "bytes",
    "schedules",
    "offsets",
    "vocab_shards",
]


@pytest.mark.parametrize("section", SECTIONS)
def test_the_kernels_meet_their_contracts(section: str, emulated: Build) -> None:
    done = emulated().run(section)
    assert (done.returncode, done.stdout.strip()) == (0, "ok"), done.stderr


# The sections with rounded results.
@pytest.mark.exhaustive
@pytest.mark.parametrize("section", ["values", "parts", "report", "token_rows", "vocab_shards"])
def test_fused_products_meet_the_contracts(section: str, emulated: Build) -> None:
    done = emulated(contract=True).run(section)
    assert (done.returncode, done.stdout.strip()) == (0, "ok"), done.stderr


# All builds count the same bytes, and a sanitizer's shadow would fill the sparse mappings of the
# section offsets. The section schedules runs the same kernels again, in other orders. Accesses
# depend on every size and alignment, but races on few of them.
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        ("asan", ("values", "token_rows", "vocab_shards")),
        ("asan", ("--reduced", "parts", "report", "sequences", "preference")),
        ("tsan", ("--reduced", "values")),
        ("tsan", ("--reduced", "parts", "report", "token_rows", "vocab_shards")),
        ("tsan", ("--reduced", "sequences", "preference")),
    ],
)
def test_sanitizers_find_no_fault_in_the_kernels(
    build: str, arguments: tuple[str, ...], changeable: Builds
) -> None:
    done = changeable(build).run(*arguments)
    assert (done.returncode, done.stdout.strip()) == (0, "ok"), done.stderr


# These tests use the build of the test above. Without optimization, it would take minutes.
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "mutant",
    [mutant for mutant in MUTANTS if mutant.build == "tsan"],
    ids=lambda mutant: mutant.name,
)
def test_a_planted_race_is_found(mutant: Mutant, changeable: Builds) -> None:
    require_found(mutant, changeable("tsan"))
