"""What the demo tells its user: errors, packages that are missing, counts."""

from __future__ import annotations

import importlib
from types import ModuleType


class DemoError(Exception):
    """A problem the user can act on: printed as `error: ...`, never as a traceback."""

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
    """Number and noun: 1 pair, 2 pairs."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
