"""``python -m simpo_ext``: demo, info and check."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__
from .cli import check, demo, info


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m simpo_ext", description="SimPO preference loss for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"simpo_ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo.add_arguments(
        commands.add_parser(
            "demo", help="train a small byte-level transformer with SimPO, in about a minute"
        )
    )
    commands.add_parser("info", help="describe this build, its torch and this machine")
    commands.add_parser("check", help="compare the ops with float64; exit code 1 on failure")
    options = parser.parse_args(arguments)
    if options.command == "demo":
        return demo.run(options)
    return info.run() if options.command == "info" else check.run()


if __name__ == "__main__":
    sys.exit(main())
