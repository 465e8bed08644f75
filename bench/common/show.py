"""Prints the tables of a recorded run as Markdown, and draws its plot."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from bench.common import tables


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m bench show", description=__doc__)
    parser.add_argument("results", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    options = parser.parse_args(arguments)
    results = json.loads(options.results.read_text(encoding="utf-8"))
    print(tables.markdown(results))
    if options.plot is not None:
        tables.plot(results, options.plot)
    return 0
