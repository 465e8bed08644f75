"""Plants the bugs of this package in the emulated kernels."""

from __future__ import annotations

import signal

from mutants import Mutant
from mutants.logps import LOGPS_MUTANTS
from mutants.pairs import PAIRS_MUTANTS
from mutants.report import REPORT_MUTANTS
from mutants.rows import ROWS_MUTANTS
from mutants.shards import SHARDS_MUTANTS
from support.emulation import ChangeableKernels

# Sorted by build and file, so that less is compiled.
MUTANTS = sorted(
    (*LOGPS_MUTANTS, *REPORT_MUTANTS, *ROWS_MUTANTS, *PAIRS_MUTANTS, *SHARDS_MUTANTS),
    key=lambda mutant: (mutant.build, mutant.file),
)


def require_found(mutant: Mutant, kernels: ChangeableKernels) -> None:
    """Checks that the mutant's section fails in one of its checks."""
    with kernels.mutated(mutant.file, mutant.original, mutant.mutated):
        done = kernels.run("--reduced", mutant.section)
    assert done.returncode != 0, "survived"
    # A check or an access to unmapped memory must have failed, not the program itself.
    found_by = ("failed: ", "cuda emulation: ", "Sanitizer", "runtime error")
    was_found = any(words in done.stderr for words in found_by)
    assert was_found or done.returncode == -signal.SIGSEGV, done.stderr
