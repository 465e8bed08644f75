"""The bugs of this package, planted in the emulated kernels alone."""

from __future__ import annotations

import signal

from mutants import Mutant
from mutants.logps import LOGPS_MUTANTS
from mutants.pairs import PAIRS_MUTANTS
from mutants.report import REPORT_MUTANTS
from mutants.rows import ROWS_MUTANTS
from mutants.shards import SHARDS_MUTANTS
from support.emulation import ChangeableKernels

# Those of one build and file together: less is compiled.
MUTANTS = sorted(
    (*LOGPS_MUTANTS, *REPORT_MUTANTS, *ROWS_MUTANTS, *PAIRS_MUTANTS, *SHARDS_MUTANTS),
    key=lambda mutant: (mutant.build, mutant.file),
)


def require_found(mutant: Mutant, kernels: ChangeableKernels) -> None:
    """Fails unless the mutant's section does, by one of its checks."""
    with kernels.mutated(mutant.file, mutant.original, mutant.mutated):
        done = kernels.run("--reduced", mutant.section)
    assert done.returncode != 0, "survived"
    # By a check, or by memory that is not there: not by a fault of the program that runs it.
    found_by = ("failed: ", "cuda emulation: ", "Sanitizer", "runtime error")
    was_found = any(words in done.stderr for words in found_by)
    assert was_found or done.returncode == -signal.SIGSEGV, done.stderr
