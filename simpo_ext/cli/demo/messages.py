"""The demo's errors, including missing packages, and the wording of counts."""

from __future__ import annotations

import importlib
from types import ModuleType


class DemoError(Exception):
    """An error that the user can fix. The demo prints it as `error: ...` without a traceback."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def require(module: str) -> ModuleType:
    """Import an optional dependency of the demo, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DemoError(
            f"the demo needs {module.partition('.')[0]} ({error}); "
            'install it with: pip install "simpo_ext[demo]"'
        ) from error


def count(number: int, noun: str) -> str:
    """Format a number with its noun: 1 pair, 2 pairs."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
