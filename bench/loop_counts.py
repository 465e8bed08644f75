"""Counts instructions in each streaming kernel's main loop, and compares them with a record."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.machine_code import Instruction, Kernel, main_loop

RECORD = Path(__file__).resolve().parent / "data" / "loop_counts.json"

PASSES = ("forward", "report", "backward")
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}

# Which pipeline executes what, from "Pipelines" in the Kernel Profiling Guide of Nsight Compute.
# Other instructions cost an issue slot and are never the limit: float32 multiplies and adds have as
# many lanes as there are issue slots.
CONVERSIONS = ("F2F", "F2I", "I2F", "FRND")  # on the pipeline of the special functions
FLOAT64 = ("DADD", "DFMA", "DMNMX", "DMUL", "DSETP")
ALU = (
    *("BMSK", "F2FP", "FMNMX", "FMNMX3", "FSEL", "FSETP", "HMNMX2", "HSETP2", "IABS", "IADD"),
    *("IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "MOV", "PLOP3", "PRMT", "SEL", "SGXT", "SHF"),
    *("VHMNMX", "VIADD", "VIADDMNMX", "VIMNMX"),
)

# Shares of the recorded counts. A kernel below the first must be recorded again. Code of another
# compiler than the recorded one may reach the second.
STALE_BELOW = 0.95
OTHER_COMPILER_ABOVE = 1.25


@dataclass(frozen=True, order=True)
class Subject:
    """A streaming kernel, without its block size."""

    architecture: str  # such as sm_90
    pass_name: str
    dtype: str
    is_capped: bool

    @property
    def name(self) -> str:
        """The name in the record and in the table."""
        return f"{self.pass_name} {self.dtype}{' softcap' if self.is_capped else ''}"

    @property
    def bytes_per_logit(self) -> int:
        """Bytes moved: the forward reads a logit, the backward also writes its gradient."""
        return ITEM_BYTES[self.dtype] * (2 if self.pass_name == "backward" else 1)


@dataclass(frozen=True)
class Counts:
    """Instructions of one iteration of a main loop.

    Both sides of a branch count. So where a loop has a rare path, they are an upper bound.
    """

    logits: int
    issued: int
    special: int  # special functions
    xu: int  # special functions, and conversions on the same pipeline
    alu: int
    fp64: int

    @property
    def issued_per_logit(self) -> float:
        """Instructions per logit."""
        return self.issued / self.logits

    @property
    def special_per_logit(self) -> float:
        """Special functions per logit."""
        return self.special / self.logits


def all_subjects(architectures: Iterable[str]) -> list[Subject]:
    """Every kernel that a library for these architectures has, in the order of the table."""
    return [
        Subject(architecture, pass_name, dtype, is_capped)
        for architecture in architectures
        for pass_name in PASSES
        for dtype in ITEM_BYTES
        for is_capped in (False, True)
    ]


def subject_of(kernel: Kernel) -> Subject | None:
    """The streaming kernel that this is, or None if it is another kernel."""
    found = re.search(r"\dtoken_logps(_backward)?_kernelI(f|d|\w*?Float16)", kernel.name)
    if not found:
        return None
    is_backward, scalar = bool(found[1]), found[2]
    dtype = {"f": "float32", "d": "float64"}.get(scalar) or (
        "bfloat16" if scalar.endswith("BFloat16") else "float16"
    )
    # The last argument of the forward's template says whether it reports.
    reports = "ELb1EEEv" in kernel.name
    pass_name = "backward" if is_backward else "report" if reports else "forward"
    return Subject(kernel.architecture, pass_name, dtype, "CappedLogits" in kernel.name)


def count(body: Sequence[Instruction], item_bytes: int) -> Counts:
    """Counts the instructions of a loop that reads elements of this size."""
    names = Counter(i.name for i in body)

    def total(those: Iterable[str]) -> int:
        return sum(names[name] for name in those)

    return Counts(
        logits=sum(i.is_wide_load() for i in body) * 16 // item_bytes,
        issued=len(body),
        special=names["MUFU"],
        xu=names["MUFU"] + total(CONVERSIONS),
        alu=total(ALU),
        fp64=total(FLOAT64),
    )


def count_all(kernels: Iterable[Kernel]) -> dict[Subject, Counts]:
    """Counts the main loop of every streaming kernel, for the block size that needs the most."""

    def instructions_per_load(body: list[Instruction]) -> float:
        return len(body) / sum(i.is_wide_load() for i in body)

    found: dict[Subject, list[Instruction]] = {}
    for kernel in kernels:
        subject = subject_of(kernel)
        if subject is not None:
            body = main_loop(kernel)
            found[subject] = max(body, found.get(subject, body), key=instructions_per_load)
    return {subject: count(body, ITEM_BYTES[subject.dtype]) for subject, body in found.items()}


# ---- the record -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """The counts of kernels, and the version of ptxas that compiled them."""

    compiler: str
    counts: Mapping[Subject, Counts]


def read_record(path: Path = RECORD) -> Record:
    """Reads what ``write_record`` wrote."""
    content = json.loads(path.read_text())
    by_name = {(s.architecture, s.name): s for s in all_subjects(content["kernels"])}
    return Record(
        compiler=content["compiler"],
        counts={
            by_name[architecture, name]: Counts(**numbers)
            for architecture, of_architecture in content["kernels"].items()
            for name, numbers in of_architecture.items()
        },
    )


def write_record(record: Record, path: Path = RECORD) -> None:
    """Writes a line for each kernel."""
    lines = [f'  "compiler": {json.dumps(record.compiler)},', '  "kernels": {']
    architectures = sorted({s.architecture for s in record.counts}, key=lambda name: int(name[3:]))
    for architecture in architectures:
        lines.append(f"    {json.dumps(architecture)}: {{")
        lines += [
            f"      {json.dumps(subject.name)}: {json.dumps(asdict(record.counts[subject]))},"
            for subject in all_subjects([architecture])
        ]
        lines[-1] = lines[-1].removesuffix(",")
        lines.append("    },")
    lines[-1] = lines[-1].removesuffix(",")
    path.write_text("\n".join(["{", *lines, "  }", "}", ""]))


def faults(found: Counts, recorded: Counts, is_recorded_compiler: bool) -> list[str]:
    """Messages about counts that the record does not allow.

    With the recorded compiler, a kernel has at most the recorded instructions and special
    functions, and not so many fewer that the record no longer describes it. Another compiler may
    need more.
    """
    most = 1.0 if is_recorded_compiler else OTHER_COMPILER_ABOVE
    said = []
    for what, is_now, was in (
        ("instructions", found.issued_per_logit, recorded.issued_per_logit),
        ("special functions", found.special_per_logit, recorded.special_per_logit),
    ):
        if is_now > most * was:
            said.append(f"expected at most {most * was:.3f} {what} per logit, got {is_now:.3f}")
        elif is_recorded_compiler and is_now < STALE_BELOW * was:
            said.append(f"recorded {was:.3f} {what} per logit, got {is_now:.3f}: record them again")
    return said
