"""How many logits the ops hold at a time: the budget, the chunks, the number of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .fast_path import is_plain_call
from .records import Validity

# A compiler may represent a number as a symbol. On these, max and min would guard on the order.
_sym_max: Callable[[int, int], int] = torch.sym_max
_sym_min: Callable[[int, int], int] = torch.sym_min

# kChunkColumns and the alignment of a chunk's width in csrc/ops.
CHUNK_COLUMNS = {"cpu": 4096, "cuda": 8192}
CHUNK_ALIGNMENT = 64

# The default budget: a GPU's memory divided by the share. On a CPU, and for fake tensors on a GPU
# that this machine lacks, a number of bytes.
DEFAULT_LOGITS_BUDGET_SHARE = 16
DEFAULT_LOGITS_BUDGET_BYTES = 1 << 30


def kept_logits_shape(
    rows: int, vocabulary: int, element_size: int, budget_bytes: int, device_type: str
) -> tuple[int, int, int]:
    """The shape of the logits kept for the backward, as LogitsPlan in csrc/ops computes it."""
    columns = CHUNK_COLUMNS.get(device_type, CHUNK_COLUMNS["cpu"])
    chunks = -(-vocabulary // columns)
    width = 0 if chunks == 0 else -(-vocabulary // chunks)
    width = -(-width // CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT
    chunk_bytes = _sym_max(rows * width * element_size, 1)
    kept = _sym_min(_sym_max(budget_bytes // chunk_bytes - 1, 0), chunks)
    return kept, rows, width


def _gpu_memory(device: torch.device) -> int | None:
    """The GPU's memory in bytes; None for fake tensors on a GPU that this machine lacks."""
    if not torch.cuda.is_available():
        return None
    memory: int = torch.cuda.get_device_properties(device).total_memory
    return memory


def default_logits_budget(device: torch.device) -> int:
    """The default of ``logits_budget_bytes``. Under ``torch.compile`` it is a constant."""
    memory = _gpu_memory(device) if device.type == "cuda" else None
    return DEFAULT_LOGITS_BUDGET_BYTES if memory is None else memory // DEFAULT_LOGITS_BUDGET_SHARE


def budget_of_call(given: int | None, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """The op's ``logits_budget_bytes``: 0 if no backward can follow."""
    inputs = (tensor for tensor in (hidden, weight, bias) if tensor is not None)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)):
        return 0
    return default_logits_budget(hidden.device) if given is None else given


def bound_of_valid_tokens(labels: Tensor, validity: Validity, given: int | None) -> int:
    """The number of valid tokens; an upper bound where the host cannot count them."""
    scored = labels[:, 1:] if validity.shift else labels
    most = scored.numel()
    if given is not None:
        return min(given, most)
    if labels.is_meta or not is_plain_call(labels):
        return most
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return most
    return int(torch.count_nonzero(scored != validity.ignore_index))
