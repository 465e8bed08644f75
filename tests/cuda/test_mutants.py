"""The bugs of mutants/, each planted alone in the emulated CUDA kernels, and found.
Those that only ThreadSanitizer finds are in test_emulation.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mutants import Mutant
from mutants.planted import MUTANTS, require_found
from support.emulation import CSRC, ChangeableKernels

pytestmark = pytest.mark.emulation

Builds = Callable[[str], ChangeableKernels]

PLANTED = [mutant for mutant in MUTANTS if mutant.build != "tsan"]


def test_every_barrier_is_among_those_removed() -> None:
    barriers = sum(path.read_text().count("__syncthreads();") for path in (CSRC / "cuda").iterdir())
    removed = [mutant for mutant in MUTANTS if mutant.name.startswith("no barrier")]
    assert len(removed) == barriers


@pytest.mark.exhaustive
@pytest.mark.parametrize("build", ["plain", "asan"])
def test_without_a_bug_nothing_is_found(build: str, changeable: Builds) -> None:
    sections = sorted({mutant.section for mutant in PLANTED if mutant.build == build})
    done = changeable(f"{build} -O0").run("--reduced", *sections)
    assert (done.returncode, done.stdout.strip()) == (0, "ok"), done.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("mutant", PLANTED, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_found(mutant: Mutant, changeable: Builds) -> None:
    require_found(mutant, changeable(f"{mutant.build} -O0"))
