"""Predicts from machine code how fast the streaming kernels could be on GPUs.

    python -m bench predicted [FILE ...] [--record]

FILE is a library, an object file or a cubin; the default is the installed library. The program
prints the table of csrc/README.md: instructions and special functions per logit of each main loop,
and the share of a GPU's copy bandwidth that they allow. ``--record`` writes the counts to
bench/data/loop_counts.json, with which tests/cuda/test_machine_code.py compares the kernels, and
the table to csrc/README.md.

The model considers only throughput: a loop takes as long as its busiest unit. Latency, costs per
row and the end of a launch come on top. Two simplifications err the other way: both sides of a
branch count, and the assumed clock is low.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.common.tables import in_markdown
from bench.loop_counts import Counts, Record, Subject, all_subjects, count_all, write_record
from bench.machine_code import compilers, kernels

README = Path(__file__).resolve().parent.parent / "csrc" / "README.md"
BEGIN = "<!-- from here: python -m bench predicted --record -->"
END = "<!-- to here -->"

# Threads per clock and multiprocessor, for compute capability 9.0 and 10.0: "Throughput of Native
# Arithmetic Instructions" in NVIDIA's CUDA C++ Best Practices Guide 13. There are four issue slots,
# one for each warp scheduler, and a warp has 32 threads.
RATES = {"issue slots": 128, "special functions": 16, "ALU": 64, "float64": 64}

# 11 % below the boost clock of 1.98 GHz, which an H200 shows after matrix products, so that the
# prediction errs on the slow side. The B200, whose boost clock is 1.965 GHz, is assumed to run at
# the same clock.
CLOCK_HZ = 1.755e9

# A copy in PyTorch moves 4.3 TB/s on an H200, reads plus writes; the datasheet says 4.8 TB/s.
# The B200 is assumed to reach the same share of its datasheet's 8 TB/s.
COPY_SHARE = 4.3 / 4.8


@dataclass(frozen=True)
class GPU:
    """What a prediction needs to know of a GPU."""

    name: str
    architecture: str  # of the machine code that it runs
    multiprocessors: int
    copy_bytes_per_second: float


GPUS = (
    GPU("H200", "sm_90", 132, COPY_SHARE * 4.8e12),
    GPU("B200", "sm_100", 148, COPY_SHARE * 8e12),
)


def predict(counts: Counts, bytes_per_logit: int, gpu: GPU) -> tuple[str, float]:
    """The busiest unit of a loop, and how busy it is at copy bandwidth; above 1, memory waits."""
    bytes_per_clock = gpu.copy_bytes_per_second / (gpu.multiprocessors * CLOCK_HZ)
    logits_per_clock = bytes_per_clock / bytes_per_logit
    executed = {
        "issue slots": counts.issued,
        "special functions": counts.xu,
        "ALU": counts.alu,
        "float64": counts.fp64,
    }
    busy = {
        unit: executed[unit] / counts.logits * logits_per_clock / rate
        for unit, rate in RATES.items()
    }
    return max(busy.items(), key=lambda item: item[1])


def make_table(counts: Mapping[Subject, Counts]) -> str:
    """The table in Markdown, for the GPUs whose machine code was counted."""
    gpus = [gpu for gpu in GPUS if any(s.architecture == gpu.architecture for s in counts)]
    heads = ["kernel"]
    for gpu in gpus:
        heads += [f"instructions, {gpu.architecture}", "special", f"{gpu.name}, predicted"]
    rows = [heads]
    for subject in all_subjects([gpus[0].architecture] if gpus else []):
        cells = [subject.name]
        for gpu in gpus:
            found = counts.get(replace(subject, architecture=gpu.architecture))
            if found is None:
                cells += ["", "", ""]
                continue
            unit, busy = predict(found, subject.bytes_per_logit, gpu)
            cells += [
                f"{found.issued_per_logit:.2f}",
                f"{found.special_per_logit:.2f}",
                f"{100 * min(1.0, 1.0 / busy):.0f} % ({unit} {100 * busy:.0f} %)",
            ]
        if any(cells[1:]):
            rows.append(cells)
    return in_markdown(rows)


def table_in(text: str) -> str:
    """The table in a README that ``--record`` replaces."""
    (table,) = re.findall(f"^{re.escape(BEGIN)}\n(.*?)\n{re.escape(END)}$", text, re.M | re.S)
    return table


def installed_library() -> Path:
    """The library of the installed package."""
    from simpo_ext import _C

    return Path(_C.__file__).parent / "lib" / "libsimpo_ext.so"


def record(files: Sequence[Path], counts: Mapping[Subject, Counts]) -> None:
    """Writes the record and csrc/README.md's table."""
    architectures = {subject.architecture for subject in counts}
    missing = set(all_subjects(architectures | {gpu.architecture for gpu in GPUS})) - set(counts)
    if missing:
        raise SystemExit(f"--record: expected every kernel, found no {min(missing)}")
    versions = set().union(*map(compilers, files))
    if len(versions) != 1:
        raise SystemExit(f"--record: expected code of one compiler, got {sorted(versions)}")
    write_record(Record(versions.pop(), counts))
    text = README.read_text(encoding="utf-8")
    README.write_text(text.replace(table_in(text), make_table(counts)), "utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table for the given files."""
    parser = argparse.ArgumentParser(
        prog="python -m bench predicted", description="Predicted share of copy bandwidth."
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument(
        "--record", action="store_true", help="write the record and csrc/README.md's table"
    )
    options = parser.parse_args(arguments)
    files = options.files or [installed_library()]
    for file in files:
        if not file.is_file():
            parser.error(f"FILE: expected a library, object file or cubin, got {file}")
    counts = count_all(kernel for file in files for kernel in kernels(file))
    print(make_table(counts))
    if options.record:
        record(files, counts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
