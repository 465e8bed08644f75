"""SimPO preference loss for PyTorch, forward and backward, without copies of the logits.

Start with :func:`simpo_ext.simpo_loss` or :class:`simpo_ext.SimPOLoss`;
``python -m simpo_ext demo`` trains with it.
"""

import pkgutil
from pathlib import Path

# Imported first: the library's dependency on libtorch.so resolves to the torch that is loaded.
import torch  # noqa: F401

# In a source checkout, the current directory shadows the installed package. This finds the compiled
# modules of the installed one.
__path__ = pkgutil.extend_path(__path__, __name__)

# Before the modules that need a new enough torch and the library.
from ._ops.library import _C

# isort: split
from . import distributed
from .functional import (
    PairCounts,
    SimPOOutput,
    count_pairs,
    linear_simpo_loss,
    linear_token_logps,
    sequence_logps,
    simpo_loss,
    simpo_loss_from_logps,
    simpo_loss_from_token_logps,
    token_logps,
)
from .modules import LinearSimPOLoss, SimPOLoss

__all__ = [
    "LinearSimPOLoss",
    "PairCounts",
    "SimPOLoss",
    "SimPOOutput",
    "__version__",
    "build_info",
    "cmake_prefix_path",
    "count_pairs",
    "cpu_capability",
    "distributed",
    "linear_simpo_loss",
    "linear_token_logps",
    "sequence_logps",
    "simpo_loss",
    "simpo_loss_from_logps",
    "simpo_loss_from_token_logps",
    "token_logps",
]


def build_info() -> dict[str, str | int]:
    """Describes the compiled library.

    Returns:
        ``version``, ``compiler``, ``cpu_capability`` (see :func:`cpu_capability`),
        ``torch_target`` (the oldest torch that it supports), ``cuda_archs``
        (comma-separated, empty without nvcc), ``cuda_runtime_version`` (as CUDART_VERSION, 0
        without nvcc) and ``pybind11``.
    """
    return _C.build_info()


def cpu_capability() -> str:
    """The instruction set that the CPU kernels use.

    ``"DEFAULT"`` (the baseline of the architecture; ``"NEON"`` on aarch64), ``"AVX2"``,
    ``"AVX512"`` or ``"AVX512_BF16"``: the best that the machine has, or the one that the
    environment variable ``SIMPO_CPU_CAPABILITY`` named when the package was imported.
    """
    return str(build_info()["cpu_capability"])


def cmake_prefix_path() -> str:
    """The directory to put on ``CMAKE_PREFIX_PATH`` so that ``find_package(simpo_ext)`` works."""
    return str(Path(_C.__file__).parent / "share" / "cmake")


__version__ = str(build_info()["version"])
