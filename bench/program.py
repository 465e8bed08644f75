"""What the CPU benchmarks share as programs: command line, results file, and what ran."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.machine import slug
from bench.report import RESULTS
from bench.workers import ROOT


def commit() -> str | None:
    """HEAD's, and whether there were changes; None outside of a checkout."""

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(ROOT), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def default_output(prefix: str, kind: str, machine: dict[str, Any]) -> Path:
    """bench/results/PREFIX-MACHINE.json; a temporary file for a quick or a partial run."""
    if kind != "full":
        with tempfile.NamedTemporaryFile(prefix=f"{prefix}-", suffix=".json", delete=False) as file:
            return Path(file.name)
    words = [machine["name"], "family", machine["family"], "model", machine["model"]]
    known = [str(word) for word in words if word]
    return RESULTS / f"{prefix}-{slug(' '.join([*known, str(machine['cores']), 'cores']))}.json"


def make_parser(
    program: str, description: str, *, has_plot: bool = True
) -> argparse.ArgumentParser:
    """Of the options that all have."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes: whether the program works"
    )
    parser.add_argument("--samples", type=int)
    parser.add_argument(
        "--cases", nargs="+", metavar="TEXT", help="only shapes whose name has one of these in it"
    )
    beside = "the plot goes beside it" if has_plot else None
    parser.add_argument("--output", type=Path, metavar="FILE.json", help=beside)
    parser.add_argument(
        "--readme", type=Path, metavar="FILE.json", help="prints README's tables of a run, only"
    )
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked, and the kind of run that they make."""
    options = parser.parse_args(arguments)
    if options.samples is not None and options.samples < 1:
        parser.error(f"--samples: expected at least 1, got {options.samples}")
    options.kind = "quick" if options.quick else "partial" if options.cases else "full"
    return options


def check_cases(
    parser: argparse.ArgumentParser, options: argparse.Namespace, names: Sequence[str]
) -> list[bool]:
    """Which of the shapes, by name, ``--cases`` asks for: all, where it was not given."""
    chosen = [
        options.cases is None or any(text in name for text in options.cases) for name in names
    ]
    if not any(chosen):
        parser.error(f"--cases: expected parts of {list(names)}, got {options.cases}")
    return chosen
