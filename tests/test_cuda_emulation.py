"""The CUDA kernels, run on the CPU by the emulator: cuda_emulation/kernels, section by section; and
the bugs that its checks find, each of mutants.py and its like planted alone."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from emulation import CSRC, EmulatedKernels
from mutants import LOGPS_MUTANTS, Mutant
from mutants_pairs import PAIRS_MUTANTS
from mutants_report import REPORT_MUTANTS
from mutants_rows import ROWS_MUTANTS
from mutants_shards import SHARDS_MUTANTS

pytestmark = pytest.mark.emulation

Builds = Callable[[str], EmulatedKernels]

MUTANTS = (*LOGPS_MUTANTS, *REPORT_MUTANTS, *ROWS_MUTANTS, *PAIRS_MUTANTS, *SHARDS_MUTANTS)
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
def test_the_kernels_compute_what_their_contracts_say(section: str, emulated: Builds) -> None:
    done = emulated("plain").run(section)
    assert (done.returncode, done.stdout.strip()) == (0, "ok"), done.stderr


# Bytes are counted alike in every build, and the sparse mappings of offsets are not for a shadow.
# Which bytes are touched depends on every size and alignment; races on few of them.
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
    build: str, arguments: tuple[str, ...], emulated: Builds
) -> None:
    done = emulated(build).run(*arguments)
    assert (done.returncode, done.stdout.strip()) == (0, "ok"), done.stderr


def test_every_barrier_is_among_those_removed() -> None:
    barriers = sum(path.read_text().count("__syncthreads();") for path in (CSRC / "cuda").iterdir())
    removed = [mutant for mutant in MUTANTS if mutant.name.startswith("no barrier")]
    assert len(removed) == barriers


# Those of one build and file together: less is compiled.
@pytest.mark.parametrize(
    "mutant",
    sorted(MUTANTS, key=lambda mutant: (mutant.build, mutant.file)),
    ids=lambda mutant: mutant.name,
)
def test_a_planted_bug_is_found(mutant: Mutant, emulated: Builds) -> None:
    kernels = emulated(mutant.build)
    with kernels.mutated(mutant.file, mutant.original, mutant.mutated):
        done = kernels.run("--reduced", mutant.section)
    assert done.returncode != 0, "survived"
    # By a check, or by memory that is not there: not by a fault of the program that runs it.
    found_by = ("failed: ", "cuda emulation: ", "Sanitizer", "runtime error")
    was_found = any(words in done.stderr for words in found_by)
    assert was_found or done.returncode == -signal.SIGSEGV, done.stderr
