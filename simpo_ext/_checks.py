"""Argument checks: each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import cast

import torch
from torch import Tensor

from ._library import _C

LOGITS_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
INDEX_DTYPES = LABEL_DTYPES
# "meta" tensors carry shapes only and run the fake kernels.
DEVICES = ("cpu", "cuda", "meta")
# Asked once: Dynamo cannot trace a call into the compiled module.
_HAS_CUDA_KERNELS = bool(_C.build_info()["cuda_runtime_version"])


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(name: str, value: object) -> Tensor:
    """A dense tensor on a device there are kernels for."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if is_dtensor(value):
        raise TypeError(
            f"{name}: expected a plain torch.Tensor, got a DTensor; a weight that FSDP has sharded "
            "is whole within the forward of the module that gathers it; one that is sharded over "
            "the vocabulary for tensor parallelism goes to simpo_ext.distributed."
            "vocab_parallel_linear_token_logps, and such logits to vocab_parallel_token_logps"
        )
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{name}: expected a dense tensor, got layout {layout}")
    check_device(name, value.device)
    return value


def is_dtensor(value: object) -> bool:
    """Whether it is one of torch.distributed.tensor, which is not imported for the answer."""
    kind = type(value)
    return (
        kind is not Tensor
        and kind.__name__ == "DTensor"
        and kind.__module__.startswith("torch.distributed.")
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
    if torch.version.hip is not None:  # whose tensors say "cuda"
        raise RuntimeError(
            f"{name}: simpo_ext has kernels for NVIDIA GPUs and for CPUs, got a tensor on a GPU "
            "under ROCm; move it with .cpu()"
        )
    if not _HAS_CUDA_KERNELS:
        raise RuntimeError(
            f"{name}: this build of simpo_ext has kernels for CPU tensors only, got a tensor on "
            f"{device}; move it with .cpu(), or build simpo_ext from source where nvcc is"
        )


def check_floating(name: str, value: object) -> Tensor:
    """A dense tensor of one of the dtypes the kernels take."""
    tensor = check_tensor(name, value)
    if tensor.dtype not in LOGITS_DTYPES:
        raise TypeError(f"{name}: expected dtype {_names(LOGITS_DTYPES)}, got {tensor.dtype}")
    return tensor


def check_index_tensor(
    name: str, value: object, dtypes: tuple[torch.dtype, ...], owner: str, tokens: Tensor
) -> Tensor:
    """Indices of one of the dtypes, on the device of the tokens or on the CPU."""
    tensor = check_tensor(name, value)
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {_names(dtypes)}, got {tensor.dtype}")
    if tensor.device != tokens.device and tensor.device.type != "cpu":
        raise ValueError(
            f"{name}: expected device {tokens.device} as of {owner}, or cpu, got {tensor.device}"
        )
    return tensor


def check_logits_and_labels(logits: object, labels: object) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] and labels [B, T] that belong together; labels come back as int64."""
    logits = check_floating("logits", logits)
    labels = check_tensor("labels", labels)
    if logits.dim() != 3:
        raise ValueError(f"logits: expected shape [B, T, V], got {list(logits.shape)}")
    return logits, _check_labels(labels, "logits", logits)


def check_labels(labels: object) -> Tensor:
    """Labels [B, T] of an integer dtype, as int64."""
    labels = check_tensor("labels", labels)
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(
            f"labels: expected an integer dtype ({_names(LABEL_DTYPES)}), got {labels.dtype}"
        )
    if labels.dim() != 2:
        raise ValueError(f"labels: expected shape [B, T], got {list(labels.shape)}")
    return labels if labels.dtype == torch.int64 else labels.to(torch.int64)


def _check_labels(labels: Tensor, owner: str, tokens: Tensor) -> Tensor:
    """Labels [B, T] for tokens [B, T, ...], as int64."""
    if labels.dim() != 2 or labels.shape != tokens.shape[:2]:
        raise ValueError(
            f"labels: expected shape {list(tokens.shape[:2])} as of {owner} {list(tokens.shape)}, "
            f"got {list(labels.shape)}"
        )
    _check_same_device("labels", labels, owner, tokens)
    return check_labels(labels)


def _check_same_device(name: str, tensor: Tensor, owner: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name}: expected device {other.device} as of {owner}, got {tensor.device}"
        )


def check_token_logps(token_logps: object, labels: object) -> tuple[Tensor, Tensor]:
    """Token log-probs [B, T] and labels [B, T] that belong together; labels come back as int64."""
    token_logps = check_tensor("token_logps", token_logps)
    labels = check_tensor("labels", labels)
    if token_logps.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"token_logps: expected dtype float32, float64, got {token_logps.dtype}")
    if token_logps.dim() != 2:
        raise ValueError(f"token_logps: expected shape [B, T], got {list(token_logps.shape)}")
    return token_logps, _check_labels(labels, "token_logps", token_logps)


def check_linear_arguments(
    hidden: object, weight: object, bias: object, labels: object
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Hidden [B, T, H], weight [V, H], bias [V] and labels [B, T], but for their dtypes."""
    hidden = check_floating("hidden", hidden)
    weight = check_floating("weight", weight)
    labels = check_tensor("labels", labels)
    if hidden.dim() != 3:
        raise ValueError(f"hidden: expected shape [B, T, H], got {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[2]:
        raise ValueError(
            f"weight: expected shape [V, {hidden.shape[2]}], H as of hidden "
            f"{list(hidden.shape)}, got {list(weight.shape)}"
        )
    _check_same_device("weight", weight, "hidden", hidden)
    if bias is not None:
        bias = check_floating("bias", bias)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"bias: expected shape [{weight.shape[0]}], V as of weight "
                f"{list(weight.shape)}, got {list(bias.shape)}"
            )
        _check_same_device("bias", bias, "hidden", hidden)
    return hidden, weight, bias, _check_labels(labels, "hidden", hidden)


def check_one_dtype(hidden: Tensor, **others: Tensor | None) -> None:
    """A product's factors are of one dtype, as F.linear's have to be."""
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{name}: expected dtype {hidden.dtype} as of hidden, got {tensor.dtype}"
            )


def check_inplace_backward(inplace_backward: object, logits: Tensor) -> None:
    """A bool, and where it is True logits whose memory may be overwritten with their gradient."""
    if not check_bool("inplace_backward", inplace_backward):
        return
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return
    # A leaf that is itself a view (of a flat parameter buffer, say) has a base without gradient.
    if logits.is_leaf or (logits._base is not None and logits._base.is_leaf):
        raise ValueError(
            "inplace_backward: expected logits computed from other tensors, got a leaf that "
            "requires grad (or a view of one), whose values the backward would overwrite"
        )
    batch, time, vocabulary = logits.shape
    if logits.numel() == 0:
        return
    stride_b, stride_t, stride_v = logits.stride()
    # Two rows that share memory cannot both be overwritten.
    apart = (
        (time == 1 or stride_t >= vocabulary)
        and (batch == 1 or stride_b >= vocabulary)
        and (
            batch == 1
            or time == 1
            or stride_b >= (time - 1) * stride_t + vocabulary
            or stride_t >= (batch - 1) * stride_b + vocabulary
        )
    )
    if not apart or (vocabulary > 1 and stride_v != 1):
        raise ValueError(
            "inplace_backward: expected logits with stride 1 in the vocabulary and rows apart in "
            f"memory, got strides {list(logits.stride())} for shape {list(logits.shape)}"
        )


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
    except OverflowError:  # an int past every float
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
    """True or False, and nothing that merely counts as one."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


def check_ignore_index(value: object) -> int:
    """An int that fits a label."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"ignore_index: expected an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"ignore_index: expected a 64-bit integer, got {value}")
    return value


def check_count(name: str, value: object) -> int:
    """A number of things, which a compiler may hold as a symbol."""
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
