"""Argument checks. Each error names the argument, the expectation and the value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import cast

import torch
from torch import Tensor

from .._ops.library import _C

LOGITS_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# "meta" tensors carry shapes only and run the fake kernels.
DEVICES = ("cpu", "cuda", "meta")
# At import, since Dynamo cannot trace a call into the compiled module.
_HAS_CUDA_KERNELS = bool(_C.build_info()["cuda_runtime_version"])


def names_of(dtypes: Iterable[torch.dtype]) -> str:
    """The dtypes as a list for messages."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(name: str, value: object) -> Tensor:
    """A dense tensor on a device that has kernels."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if is_dtensor(value):
        raise TypeError(
            f"{name}: expected a plain torch.Tensor, got a DTensor; use an FSDP-sharded weight in "
            "the forward of the module that gathers it; pass a weight sharded over the vocabulary "
            "to simpo_ext.distributed.vocab_parallel_linear_token_logps, and such logits to "
            "vocab_parallel_token_logps"
        )
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{name}: expected a dense tensor, got layout {layout}")
    check_device(name, value.device)
    return value


def is_dtensor(value: object) -> bool:
    """Whether ``value`` is a DTensor, without importing torch.distributed.tensor."""
    kind = type(value)
    return (
        kind is not Tensor
        and kind.__name__ == "DTensor"
        and kind.__module__.startswith("torch.distributed.")
    )


def check_same_device(name: str, tensor: Tensor, owner: str, other: Tensor) -> None:
    """Both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name}: expected device {other.device}, like {owner}, got {tensor.device}"
        )


def check_device(name: str, device: torch.device) -> None:
    """A device that this build has kernels for."""
    if device.type not in DEVICES:
        raise RuntimeError(
            f"{name}: simpo_ext has kernels for CPU and CUDA tensors, got a tensor on {device}; "
            "move it with .cpu()"
        )
    if device.type != "cuda":
        return
    if torch.version.hip is not None:  # ROCm calls its device "cuda", too
        raise RuntimeError(
            f"{name}: simpo_ext has kernels for NVIDIA GPUs and for CPUs, got a tensor on a GPU "
            "under ROCm; move it with .cpu()"
        )
    if not _HAS_CUDA_KERNELS:
        raise RuntimeError(
            f"{name}: this build of simpo_ext has kernels for CPU tensors only, got a tensor on "
            f"{device}; move it with .cpu(), or build simpo_ext from source with nvcc"
        )


def check_floating(name: str, value: object) -> Tensor:
    """A dense tensor of one of the dtypes the kernels take."""
    tensor = check_tensor(name, value)
    if tensor.dtype not in LOGITS_DTYPES:
        raise TypeError(f"{name}: expected dtype {names_of(LOGITS_DTYPES)}, got {tensor.dtype}")
    return tensor


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> float:
    """A finite real number within the stated bounds."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        number = float(cast(float, value))
    except OverflowError:  # an int too large for a float
        number = math.inf
    inside = (
        abs(number) < math.inf
        and (above is None or number > above)
        and (at_least is None or number >= at_least)
        and (at_most is None or number <= at_most)
    )
    if not inside:
        bounds = {">": above, ">=": at_least, "<=": at_most}
        parts = [f"{sign} {bound:g}" for sign, bound in bounds.items() if bound is not None]
        expected = " and ".join(["a finite number", *parts])
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number


def check_bool(name: str, value: object) -> bool:
    """True or False; not 0, 1 or a tensor."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


def check_ignore_index(name: str, value: object) -> int:
    """An int that fits a label."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected a 64-bit integer, got {value}")
    return value


def check_count(name: str, value: object) -> int:
    """A count. A compiler may represent it as a symbol."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 0 or value >= 2**63:
        raise ValueError(f"{name}: expected an int in [0, 2^63), got {value}")
    return cast(int, value)


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """One of a few strings."""
    choices = tuple(choices)
    expected = ", ".join(repr(choice) for choice in choices)
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {expected}, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {expected}, got {value!r}")
    return value
