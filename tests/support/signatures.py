"""Signatures of functions."""

from __future__ import annotations

import inspect
from typing import Any


def keywords(function: Any) -> dict[str, Any]:
    """The keyword-only parameters of a function, and their defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
