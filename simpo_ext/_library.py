"""Loads the compiled library, once: in one process, the ops of a second copy are not there."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path

import torch


def _refuse_second_copy() -> None:
    if not torch._C._jit_get_schemas_for_operator("simpo_ext::token_logps"):
        return
    spec = importlib.util.find_spec("simpo_ext._C")
    if spec is None or spec.origin is None:
        return
    library = Path(spec.origin).parent / "lib" / "libsimpo_ext.so"
    try:
        # A program that links this very file may embed Python.
        ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        raise ImportError(
            f"expected to load the only copy of simpo_ext's library from {library}, but its ops "
            "are registered already: another copy is loaded in this process"
        ) from None


_refuse_second_copy()

from . import _C  # noqa: E402

__all__ = ["_C"]
