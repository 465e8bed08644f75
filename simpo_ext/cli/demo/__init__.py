"""`python -m simpo_ext demo`: train a small byte-level model by SimPO, then time the loss.

Importing this package is cheap; what the demo needs is imported when it runs.
"""

from __future__ import annotations

from .options import add_arguments, run

__all__ = ["add_arguments", "run"]
