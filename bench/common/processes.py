"""Functions that run in a process of their own, and answer in JSON.

A process chooses its allocator's pages once, keeps what was compiled in it, and knows one peak of
its memory. So each case and each peak has a process of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

PAGES = {"default": {}, "huge": {"THP_MEM_ALLOC_ENABLE": "1"}}  # read by torch's CPU allocator


class ApartError(Exception):
    """What the other process says went wrong, or how it ended."""


def first_line(error: Exception) -> str:
    """Type and first line of an error of a foreign package."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def apart(function: str, pages: str = "default", **request: Any) -> Any:
    """Calls ``"module:function"`` in a new process.

    Args:
        function: What to call.
        pages: How that process's allocator asks for memory.
        request: Its arguments, as JSON carries them.

    Raises:
        ApartError: If it raised, or if the process ended without an answer.
    """
    chosen: Mapping[str, str] = PAGES[pages]
    cleared = PAGES["huge"]
    inherited = {name: value for name, value in os.environ.items() if name not in cleared}
    result = subprocess.run(
        [sys.executable, "-m", "bench.common.processes", function],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        env={**inherited, **chosen},
        cwd=ROOT,
    )
    if result.returncode != 0 or not result.stdout:
        words = result.stderr.strip().splitlines()
        said = words[-1] if words else "no output"
        raise ApartError(f"{function} ended with status {result.returncode}: {said}")
    answer = json.loads(result.stdout)
    if "error" in answer:
        raise ApartError(answer["error"])
    return answer["result"]


def _serve() -> None:
    """Answers one request from standard input."""
    # Foreign packages print. Only the answer goes to standard output.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    module, _, name = sys.argv[1].partition(":")
    request = json.load(sys.stdin)
    try:
        answer = {"result": getattr(importlib.import_module(module), name)(**request)}
    except Exception as error:  # of a foreign package, whatever it is
        answer = {"error": first_line(error)}
    answers.write(json.dumps(answer, allow_nan=False))
    answers.flush()


if __name__ == "__main__":
    _serve()
