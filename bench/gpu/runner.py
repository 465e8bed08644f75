"""Runs steps one after another, each within its budget, and records how each went.

A step is a function that starts programs through :class:`Run`. If it fails, the next step still
runs. Every program has its own process group, which is killed when the program ends or the step's
time is up.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench import records

STEPS, CASES, LOG = "steps.jsonl", "cases.jsonl", "log.txt"
GRACE = 2.0  # seconds between SIGTERM and SIGKILL


class FailedError(Exception):
    """A step failed."""


class SkippedError(Exception):
    """A step cannot run on this machine. This is not a failure."""


@dataclass
class Run:
    """The folder of results, and settings for the programs of all steps."""

    output: Path
    work: Path  # for files that are deleted after the run
    is_dry: bool
    deadline: float  # on the clock of time.monotonic()
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    step_deadline: float = 0.0
    is_installed: bool = False  # the package has been imported from where it should be

    @property
    def cases(self) -> Path:
        """The file to which programs add their cases."""
        return self.output / CASES

    @property
    def device(self) -> str:
        """The value of the programs' ``--device``."""
        return "cpu" if self.is_dry else "cuda"

    def module(
        self,
        name: str,
        *arguments: str | Path,
        under: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Runs a Python module, under another program if one is given; see :meth:`program`."""
        command = (*under, sys.executable, "-m", name, *arguments)
        return self.program(*command, environment=environment)

    def program(self, *command: str | Path, environment: Mapping[str, str] | None = None) -> str:
        """Runs a program in the time that the step has left, and returns what it printed.

        Raises:
            FailedError: The program could not start, ran out of time, or exited with a status other
                than 0.
        """
        words = [str(word) for word in command]
        log = self.output / LOG
        with log.open("ab") as file:
            file.write(f"$ {' '.join(words)}\n".encode())
            file.flush()
            began = file.tell()
            try:
                status = self._run(
                    words, file.fileno(), {**self.environment, **(environment or {})}
                )
            except OSError as error:
                raise FailedError(f"{words[0]}: {error}") from None
        if status is None:
            raise FailedError("out of time")
        with log.open("rb") as file:
            file.seek(began)
            printed = file.read().decode(errors="replace")
        if status != 0:
            tail = "\n".join(line[:300] for line in printed.splitlines()[-8:])
            raise FailedError(f"exit status {status}: {Path(words[0]).name}\n{tail}")
        return printed

    def _run(self, words: list[str], output: int, environment: dict[str, str]) -> int | None:
        """The exit status, or None if the program ran out of time."""
        left = self.step_deadline - time.monotonic()
        if left <= 0.0:
            return None
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=self.work,
            start_new_session=True,
        )
        try:
            return process.wait(left)
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            return None
        finally:
            _signal_group(process, signal.SIGKILL)
            process.wait()

    def find_tool(self, name: str) -> str:
        """The path of a tool, such as nvcc or ncu.

        Raises:
            SkippedError: The tool is not installed.
        """
        found = shutil.which(name, path=self.environment["PATH"])
        if found is None:
            raise SkippedError(f"there is no {name}")
        return found


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Sends a signal to all processes of the program that still run."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@dataclass(frozen=True)
class Step:
    """A function to run, and the seconds that it may take."""

    name: str
    budget: float
    function: Callable[[Run], None]


def perform(step: Step, run: Run) -> bool:
    """Runs a step and records it. Returns whether it did not fail."""
    began = time.monotonic()
    run.step_deadline = min(began + step.budget, run.deadline)
    status, reason = "ok", ""
    try:
        if run.step_deadline - began < 1.0:
            raise FailedError("no time left")
        step.function(run)
    except SkippedError as error:
        status, reason = "skipped", str(error)
    except FailedError as error:
        status, reason = "failed", str(error)
    except Exception as error:  # a bug in the step must not stop the next one
        status, reason = "failed", f"{type(error).__name__}: {error}"
    except (KeyboardInterrupt, SystemExit):
        status, reason = "failed", "interrupted"
        raise
    finally:
        seconds = round(time.monotonic() - began, 1)
        record = {
            "step": step.name,
            "status": status,
            "reason": reason,
            "seconds": seconds,
            "budget": step.budget,
        }
        records.append(run.output / STEPS, record)
        print(f"{step.name}: {status}, {seconds} s{': ' + reason if reason else ''}", flush=True)
    return status != "failed"
