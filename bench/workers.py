"""Processes that hold a batch and run a lap when told to, while all others sleep.

An instruction set and an allocator are chosen once in a process, so each choice has a process of
its own. They are driven over pipes: a request is one line of JSON, and so is its answer.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

LEVEL_VARIABLE = "SIMPO_CPU_CAPABILITY"  # read by simpo_ext when it is loaded
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}  # read by torch's CPU allocator


class WorkerError(Exception):
    """What a worker says went wrong, or that it is gone."""


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    """This process's, without choices of instruction set and pages, and with ``changes``."""
    cleared = (LEVEL_VARIABLE, *HUGE_PAGES)
    return {
        **{name: value for name, value in os.environ.items() if name not in cleared},
        **changes,
    }


class Worker:
    """The other end of a worker process, which is started when it is first needed."""

    def __init__(self, changes: Mapping[str, str]) -> None:
        self._changes = changes
        self._process: subprocess.Popen[str] | None = None
        self._errors: Any = None

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            WorkerError: With what the worker said, or how it ended.
        """
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"request": request, **arguments}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise WorkerError(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    @property
    def is_running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._reap()

    def _start(self) -> subprocess.Popen[str]:
        # Open for as long as the process runs.
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment(self._changes),
            cwd=ROOT,
        )
        return self._process

    def _last_words(self) -> str:
        status, said = self._reap()
        lines = said.strip().splitlines()
        return f"the process ended with status {status}: {lines[-1] if lines else 'no output'}"

    def _reap(self) -> tuple[int, str]:
        """Closes the pipes and waits; the exit status, and what came on stderr."""
        process, self._process = self._process, None
        assert process is not None
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what could not be written
                pipe.close()
        status = process.wait()
        with self._errors as file:
            file.seek(0)
            return status, file.read()


def first_line(error: Exception) -> str:
    """Type and first line of a foreign error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


# ---- in the worker ---------------------------------------------------------------------------


class _Handler:
    """Answers the requests of one process."""

    def __init__(self) -> None:
        import torch

        import simpo_ext

        self._torch = torch
        self._level = simpo_ext.cpu_capability()
        self._laps: Any = None
        self._candidates: dict[str, Any] = {}

    def describe(self) -> dict[str, Any]:
        """Level and threads."""
        return {"level": self._level, "threads": self._torch.get_num_threads()}

    def open(self, batch: dict[str, Any], candidates: list[str]) -> dict[str, Any]:
        """Makes a batch, and says of each candidate whether it can run here."""
        from bench.cases import Batch
        from bench.laps import Laps
        from bench.trainers import loss_candidates

        self.release()
        self._candidates = {each.name: each for each in loss_candidates()}
        device = self._torch.device("cpu")
        reasons = {name: self._candidates[name].available(device) for name in candidates}
        self._laps = Laps(Batch.from_json(batch))
        return {"unavailable": {name: why for name, (can, why) in reasons.items() if not can}}

    def mask(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Changes what is scored."""
        from bench.cases import Batch

        self._laps.set_mask(Batch.from_json(batch))
        return {}

    def check(self, candidate: str) -> dict[str, Any]:
        """Verifies, and says about how many milliseconds a lap takes."""
        result = self._laps.check(self._candidates[candidate])
        gc.collect()
        return result

    def prepare(self, candidate: str) -> dict[str, Any]:
        """What a lap needs and does not time."""
        self._laps.prepare(self._candidates[candidate])
        return {}

    def run(self, candidate: str, phase: str) -> dict[str, Any]:
        """One lap."""
        return {"ms": self._laps.run(self._candidates[candidate], phase)}

    def release(self) -> dict[str, Any]:
        """Frees the batch, and what was compiled for it."""
        self._laps = None
        if "torch._dynamo" in sys.modules:
            self._torch._dynamo.reset()
        self._candidates = {}
        gc.collect()
        return {}


def serve() -> None:
    """Answers until the pipe is closed."""
    # Foreign packages print; the pipe is ours alone.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    handler = _Handler()
    for line in sys.stdin:
        request = json.loads(line)
        method: Callable[..., dict[str, Any]] = getattr(handler, request.pop("request"))
        try:
            answer = method(**request)
        except Exception as error:  # of a foreign package, whatever it is
            answer = {"error": first_line(error)}
            gc.collect()
        answers.write(json.dumps(answer, allow_nan=False) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
