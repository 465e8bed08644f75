"""CPU ops that run the CUDA kernels, so that tests with CPU tensors test the CUDA kernels.

Each op copies its tensors to the GPU, runs there, and copies the results back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from simpo_ext._ops import logits_plan

FORWARD_AND_BACKWARD = (
    "token_logps",
    "token_logps_report",
    "token_logps_backward",
    "token_logps_backward_",
    "linear_token_logps",
    "linear_token_logps_report",
    "linear_token_logps_backward",
    "sequence_targets",
    "sequence_logps",
    "sequence_logps_backward",
    "preference_loss",
    "preference_loss_backward",
    "token_logps_shard",
    "token_logps_merge",
    "token_logps_shard_backward",
    "token_logps_shard_backward_",
    "linear_token_logps_shard",
    "linear_token_logps_merge",
    "linear_token_logps_shard_backward",
    "linear_token_logps_dhidden",
)


def moved(tensor: Tensor, device: str) -> Tensor:
    """A copy with the same strides and the same alignment within 16 bytes."""
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    first = tensor.data_ptr() % 16 // tensor.element_size()
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    memory = torch.empty(first + span, dtype=tensor.dtype, device=device)
    copy = memory.as_strided(tensor.shape, tensor.stride(), first)
    if span <= 4 * tensor.numel():  # Rows may overlap.
        memory[first:] = tensor.as_strided((span,), (1,), tensor.storage_offset())
    else:
        copy.copy_(tensor)
    return copy


def route_cpu_ops_to_cuda(device: str = "cuda") -> torch.library.Library:
    """Replaces the CPU kernels of all ops until the returned library is deleted."""
    library = torch.library.Library("simpo_ext", "IMPL")
    # The fake kernels must use the GPU's chunks for CPU tensors.
    logits_plan.CHUNK_COLUMNS["cpu"] = logits_plan.CHUNK_COLUMNS["cuda"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The dispatcher warns about replaced kernels.
        for name in FORWARD_AND_BACKWARD:
            library.impl(name, _routed(name, device), "CPU", allow_override=True)
    return library


def _routed(name: str, device: str) -> Callable[..., Any]:
    op = getattr(torch.ops.simpo_ext, name).default

    def route(*args: Any) -> Any:
        sent = [moved(arg, device) if isinstance(arg, Tensor) else arg for arg in args]
        results = op(*sent)
        if name.endswith("_"):  # The op overwrites its second argument.
            args[1].copy_(sent[1])
        if isinstance(results, Tensor):
            return results.cpu()
        return tuple(result.cpu() for result in results) if results is not None else None

    return route
