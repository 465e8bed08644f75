"""Loads the compiled library. Refuses a torch that is too old, and a second copy of the library."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import re
import sys
from pathlib import Path

import torch

_PACKAGE = __package__.partition(".")[0]

# The version of the stable ABI that the library is built for, as in CMakeLists.txt.
OLDEST_TORCH = (2, 10)


def _check_torch_version() -> None:
    """An older torch lacks symbols that the library needs and functions that the package calls."""
    # Two numbers only: 2.10.0a0+git, a build before 2.10.0, has the stable ABI of 2.10.
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version and (int(version[1]), int(version[2])) < OLDEST_TORCH:
        raise ImportError(
            f"simpo_ext: expected torch >= {'.'.join(map(str, OLDEST_TORCH))}, got torch "
            f"{torch.__version__} from {Path(torch.__file__).parent}"
        )


def _find_module() -> Path:
    """The path of the compiled module that this Python would import."""
    spec = importlib.util.find_spec(f"{_PACKAGE}._C")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin)
    folders = list(sys.modules[_PACKAGE].__path__)
    others = sorted(str(path) for folder in folders for path in Path(folder).glob("_C.*.so"))
    found = f"found {', '.join(others)}, for another Python or machine" if others else "found none"
    raise ImportError(
        f"simpo_ext: expected its compiled module _C{importlib.machinery.EXTENSION_SUFFIXES[0]} "
        f"in {' or '.join(folders)}, {found}; install it with this Python, by `pip install .` in "
        "its source directory"
    )


def _refuse_second_copy(library: Path) -> None:
    if not torch._C._jit_get_schemas_for_operator("simpo_ext::token_logps"):
        return
    try:
        # Succeeds if this file itself is loaded: a program that links it may embed Python.
        ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        raise ImportError(
            f"expected to load the only copy of simpo_ext's library from {library}, but its ops "
            "are registered already: another copy is loaded in this process"
        ) from None


_check_torch_version()
_module = _find_module()
_refuse_second_copy(_module.parent / "lib" / "libsimpo_ext.so")

try:
    from .. import _C
except ImportError as error:
    # The dynamic linker's text names the missing file or symbol.
    raise ImportError(
        f"simpo_ext: the compiled module {_module} does not load with torch {torch.__version__}: "
        f"{error}; install simpo_ext again with this Python and torch"
    ) from error

__all__ = ["_C"]
