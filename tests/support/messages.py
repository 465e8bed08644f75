"""Patterns of error messages."""

from __future__ import annotations

import re


def message(*parts: object) -> str:
    """A pattern that matches the parts in this order."""
    return "(?s)" + ".*".join(re.escape(str(part)) for part in parts)
