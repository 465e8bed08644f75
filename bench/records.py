"""Records as lines of JSON, each written as soon as it is known.

Each line is a single write to a file that is open for appending. So a killed program leaves only
whole lines, and several programs can write to one file.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def number(value: float) -> float | str:
    """The value, or its name if it is NaN or infinite, which JSON cannot represent."""
    return value if math.isfinite(value) else str(value)


def append(path: Path, record: Record) -> None:
    """Adds one line to a file."""
    line = json.dumps(record, allow_nan=False) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def write(record: Record, path: Path | None) -> None:
    """Prints one line, and adds it to a file if one is given."""
    print(json.dumps(record, allow_nan=False), flush=True)
    if path is not None:
        append(path, record)


def read(path: Path) -> list[Record]:
    """Reads the records of a file, none if it is missing. Skips lines that are not JSON."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found
