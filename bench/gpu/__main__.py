"""The program behind bench/gpu.sh, which describes its use."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from bench.gpu import pack, report, runner, steps

LIMIT = 480.0  # seconds for all steps together


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/gpu.sh",
        description="Tests and measures this project on a machine with an NVIDIA GPU.",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder for the results")
    parser.add_argument("--dry-run", action="store_true", help="run every step without a GPU")
    parser.add_argument(
        "--steps", nargs="+", metavar="TEXT", help="run only steps whose names contain one of these"
    )
    parser.add_argument(
        "--carried", type=Path, default=steps.CARRIED, metavar="FOLDER", help="what --pack filled"
    )
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="only report on this folder")
    parser.add_argument("--pack", action="store_true", help="only pack what the GPU machine needs")
    parser.add_argument("--python", default="python3.12", help="for --pack: that machine's version")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="for --pack: use this wheel")
    options = parser.parse_args(arguments)
    names = [step.name for step in steps.all_steps(options.carried)]
    if options.steps and not any(text in name for text in options.steps for name in names):
        parser.error(f"--steps: expected parts of {names}, got {options.steps}")
    if not (options.output or options.dry_run or options.report or options.pack):
        parser.error("--output: expected a folder for the results")
    return options


def _is_chosen(step: runner.Step, texts: Sequence[str] | None) -> bool:
    return texts is None or step.name == steps.INSTALL or any(text in step.name for text in texts)


def run(options: argparse.Namespace, output: Path, work: Path) -> bool:
    """Runs the steps and returns whether none failed. Updates the report after each step.

    Results of an earlier run in the folder are kept, and the report includes them.
    """
    output.mkdir(parents=True, exist_ok=True)
    output = output.resolve()
    deadline = time.monotonic() + LIMIT
    here = runner.Run(output, work, options.dry_run, deadline)
    if options.dry_run:
        here.environment["OMP_NUM_THREADS"] = "1"  # starting threads costs more
    all_right, text = True, ""
    for step in steps.all_steps(options.carried.resolve()):
        if not _is_chosen(step, options.steps):
            continue
        is_right = runner.perform(step, here)
        if step.name == steps.INSTALL and not is_right and not here.is_installed:
            is_right = runner.perform(steps.build_step(options.carried.resolve()), here)
        all_right &= is_right
        text = _report(output)
    print(text, flush=True)
    return all_right


def _report(output: Path) -> str:
    """Writes the report so far. An error must not end the run: --report can write it later."""
    try:
        return report.write(output)
    except Exception:
        return f"no report:\n{traceback.format_exc()}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        0 if no step failed, else 1.
    """
    options = _parse(arguments)
    if options.pack:
        pack.pack(options.carried, options.python, options.wheel)
        return 0
    if options.report:
        print(report.write(options.report))
        return 0
    # SIGTERM acts like Ctrl-C: it ends the running program, and its step is recorded.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as work:
        output = options.output or Path(work) / "output"
        return 0 if run(options, output, Path(work)) else 1


if __name__ == "__main__":
    sys.exit(main())
