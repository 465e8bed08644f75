"""The CUDA kernels, run on the CPU by the emulator: emulation/kernels, section by section; and
the races that ThreadSanitizer finds. Of other bugs, test_mutants.py."""

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
def test_the_kernels_compute_what_their_contracts_say(section: str, emulated: Build) -> None:
    done = emulated().run(section)
    assert (done.returncode, done.stdout.strip()) == (0, "ok"), done.stderr


# The sections whose results are rounded.
@pytest.mark.exhaustive
@pytest.mark.parametrize("section", ["values", "parts", "report", "token_rows", "vocab_shards"])
def test_fusing_products_and_sums_breaks_no_contract(section: str, emulated: Build) -> None:
    done = emulated(contract=True).run(section)
    assert (done.returncode, done.stdout.strip()) == (0, "ok"), done.stderr


# Bytes are counted alike in every build, and the sparse mappings of offsets are not for a shadow.
# Which bytes are touched depends on every size and alignment; races on few of them.
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        ("asan", ("values", "token_rows", "vocab_shards")),
        ("asan", ("--reduced", "parts", "report", "sequences", "preference", "schedules")),
        ("tsan", ("--reduced", "values")),
        ("tsan", ("--reduced", "parts", "report", "token_rows", "vocab_shards")),
        ("tsan", ("--reduced", "sequences", "preference", "schedules")),
    ],
)
def test_the_kernels_run_clean_under_a_sanitizer(
    build: str, arguments: tuple[str, ...], changeable: Builds
) -> None:
    done = changeable(build).run(*arguments)
    assert (done.returncode, done.stdout.strip()) == (0, "ok"), done.stderr


# Here, for the build that has just run clean: without optimization it would take minutes to.
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "mutant",
    [mutant for mutant in MUTANTS if mutant.build == "tsan"],
    ids=lambda mutant: mutant.name,
)
def test_a_planted_race_is_found(mutant: Mutant, changeable: Builds) -> None:
    require_found(mutant, changeable("tsan"))
