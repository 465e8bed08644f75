"""`python -m simpo_ext demo`: train a small byte-level model with SimPO, then time the loss.

The package is cheap to import: the demo imports torch and its other dependencies when it runs.
"""

from __future__ import annotations

from .options import add_arguments, run

__all__ = ["add_arguments", "run"]
