"""Batches: tensors that belong together, in one of two layouts.

A batch has rows, [B, T, ...], or is packed: [N, ...] or [1, N, ...] with ``cu_seqlens``. Inside the
package a packed batch is a batch of one row.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .._ops.records import Layout
from .checks import check_floating, check_same_device, check_tensor, names_of

LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
INDEX_DTYPES = LABEL_DTYPES
LAST_DIMENSION = {"logits": ", V", "hidden": ", H"}


class Batch(NamedTuple):
    """Tokens and labels that belong together. The labels are int64."""

    name: str
    """The name of ``tokens`` in messages."""
    tokens: Tensor  # [B, T, ...]
    labels: Tensor  # [B, T]
    layout: Layout
    shape: torch.Size
    """The shape of the labels as given."""

    def as_given(self, by_token: Tensor) -> Tensor:  # [B, T]
        """Returns values of tokens in the shape that the labels were given in."""
        return by_token if by_token.shape == self.shape else by_token.view(self.shape)

    def paired(self, pairs: object, pair_weight: object) -> Batch:
        """The batch with its pairs and their weights."""
        return self._replace(layout=_pair_layout(self, pairs, pair_weight))


def _batch(name: str, tokens: Tensor, labels: object, cu_seqlens: object) -> Batch:
    """Converts tokens and labels to one layout, and checks that their shapes fit."""
    labels = check_tensor("labels", labels)
    shape, last = labels.shape, LAST_DIMENSION.get(name, "")
    dimensions = 2 + bool(last)
    boundaries = None
    if cu_seqlens is not None:
        labels_dim = 1 if labels.dim() == 1 else 2
        is_flat = tokens.dim() == labels_dim + bool(last) and (
            labels_dim == 1 or tokens.shape[0] == 1
        )
        if not is_flat or labels.shape != tokens.shape[:labels_dim]:
            raise ValueError(
                f"{name}, labels: expected shapes [N{last}] and [N], or [1, N{last}] and [1, N], "
                f"with cu_seqlens, got {list(tokens.shape)} and {list(labels.shape)}"
            )
        boundaries = _check_index_tensor(
            "cu_seqlens", cu_seqlens, (torch.int64, torch.int32), name, tokens
        )
        if boundaries.dim() != 1 or boundaries.shape[0] == 0:
            raise ValueError(f"cu_seqlens: expected shape [S + 1], got {list(boundaries.shape)}")
        if labels_dim == 1:
            tokens, labels = tokens.unsqueeze(0), labels.unsqueeze(0)
        if boundaries.device != tokens.device:
            _check_cu_seqlens(boundaries, tokens.shape[1])
        boundaries = boundaries.to(tokens.device, torch.int64, non_blocking=True)
    if tokens.dim() != dimensions:
        raise ValueError(f"{name}: expected shape [B, T{last}], got {list(tokens.shape)}")
    if labels.dim() != 2 or labels.shape != tokens.shape[:2]:
        raise ValueError(
            f"labels: expected shape {list(tokens.shape[:2])} to match {name} "
            f"{list(tokens.shape)}, got {list(labels.shape)}"
        )
    check_same_device("labels", labels, name, tokens)
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(
            f"labels: expected an integer dtype ({names_of(LABEL_DTYPES)}), got {labels.dtype}"
        )
    if labels.dtype != torch.int64:
        labels = labels.to(torch.int64)
    return Batch(name, tokens, labels, Layout(boundaries), shape)


def logits_batch(
    logits: object,  # [B, T, V]
    labels: object,  # [B, T]
    cu_seqlens: object,  # [S + 1], or None
    inplace_backward: bool,
) -> Batch:
    """A batch of logits. With ``inplace_backward``, checks that they may be overwritten."""
    batch = _batch("logits", check_floating("logits", logits), labels, cu_seqlens)
    if inplace_backward:
        _check_may_be_overwritten(batch.tokens)
    return batch


def token_logps_batch(token_logps: object, labels: object, cu_seqlens: object) -> Batch:
    """A batch of token log-probabilities."""
    tensor = check_tensor("token_logps", token_logps)
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"token_logps: expected dtype float32, float64, got {tensor.dtype}")
    return _batch("token_logps", tensor, labels, cu_seqlens)


def labels_batch(labels: object, cu_seqlens: object) -> Batch:
    """A batch of labels alone. They also take the place of the tokens."""
    return _batch("labels", check_tensor("labels", labels), labels, cu_seqlens)


class LinearBatch(NamedTuple):
    """A batch of hidden states and the parameters of lm_head, all of one dtype."""

    batch: Batch
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]


def linear_batch(
    hidden: object,  # [B, T, H]
    weight: object,  # [V, H]
    labels: object,  # [B, T]
    bias: object,  # [V], or None
    cu_seqlens: object,  # [S + 1], or None
) -> LinearBatch:
    """A batch of hidden states. Autocast casts it as it casts the arguments of F.linear."""
    hidden = check_floating("hidden", hidden)
    weight = check_floating("weight", weight)
    batch = _batch("hidden", hidden, labels, cu_seqlens)
    shape = list(batch.tokens.shape)
    if weight.dim() != 2 or weight.shape[1] != shape[2]:
        raise ValueError(
            f"weight: expected shape [V, {shape[2]}] to match hidden {shape}, got "
            f"{list(weight.shape)}"
        )
    check_same_device("weight", weight, "hidden", hidden)
    if bias is not None:
        bias = check_floating("bias", bias)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"bias: expected shape [{weight.shape[0]}] to match weight "
                f"{list(weight.shape)}, got {list(bias.shape)}"
            )
        check_same_device("bias", bias, "hidden", hidden)
    hidden, weight, bias = _autocast(batch.tokens, weight, bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{name}: expected dtype {hidden.dtype}, like hidden, got {tensor.dtype}"
            )
    return LinearBatch(batch._replace(tokens=hidden), weight, bias)


def _autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    device_type = hidden.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return cast(hidden), cast(weight), None if bias is None else cast(bias)


# ---- pairs ---------------------------------------------------------------------------------------


def _pair_layout(batch: Batch, pairs: object, pair_weight: object) -> Layout:
    tokens, cu_seqlens = batch.tokens, batch.layout.cu_seqlens
    sequences = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if pairs is None:
        if sequences % 2 != 0:
            what = (
                f"{batch.name}: expected an even B (P chosen rows, then P rejected rows)"
                if cu_seqlens is None
                else "cu_seqlens: expected an even number of sequences (P chosen, then P rejected)"
            )
            raise ValueError(f"{what}, or pairs, got {sequences}")
        num_pairs = sequences // 2
    else:
        pairs = _check_index_tensor("pairs", pairs, INDEX_DTYPES, batch.name, tokens)
        if pairs.dim() != 2 or pairs.shape[1] != 2:
            raise ValueError(
                f"pairs: expected shape [P, 2] (chosen, rejected), got {list(pairs.shape)}"
            )
        num_pairs = pairs.shape[0]
        if pairs.device != tokens.device:
            check_pairs_in_range(pairs, sequences)
        pairs = pairs.to(tokens.device, torch.int64, non_blocking=True)
    weight = None if pair_weight is None else _check_pair_weight(pair_weight, num_pairs, batch)
    return Layout(cu_seqlens, pairs, weight)


def _check_pair_weight(value: object, num_pairs: int, batch: Batch) -> Tensor:
    weight = check_tensor("pair_weight", value)
    if weight.is_complex():
        raise TypeError(f"pair_weight: expected real numbers, got {weight.dtype}")
    if weight.requires_grad:
        raise ValueError(
            "pair_weight: expected constants, got a tensor that requires grad; detach it, or "
            "multiply the output's losses by it"
        )
    if weight.dim() != 1 or weight.shape[0] != num_pairs:
        raise ValueError(
            f"pair_weight: expected shape [P] = [{num_pairs}], got {list(weight.shape)}"
        )
    check_same_device("pair_weight", weight, batch.name, batch.tokens)
    return weight.to(torch.float64)


# ---- indices -------------------------------------------------------------------------------------


def _check_index_tensor(
    name: str, value: object, dtypes: tuple[torch.dtype, ...], owner: str, tokens: Tensor
) -> Tensor:
    """Indices of one of the dtypes, on the device of the tokens or on the CPU."""
    tensor = check_tensor(name, value)
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {names_of(dtypes)}, got {tensor.dtype}")
    if tensor.device != tokens.device and tensor.device.type != "cpu":
        raise ValueError(
            f"{name}: expected device {tokens.device}, like {owner}, or cpu, got {tensor.device}"
        )
    return tensor


# Checks for CPU tensors that come with tokens on a GPU. On the CPU, the kernels check the values.


def _check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> None:
    ends = [0, *cu_seqlens.tolist()]
    for i, (before, end) in enumerate(pairwise(ends)):
        if end < before:
            least = "0 or more" if i == 0 else f"at least the value before it, {before}"
            raise ValueError(f"cu_seqlens[{i}]: expected {least}, got {end}")
    if ends[-1] > num_tokens:
        raise ValueError(
            f"cu_seqlens[{len(ends) - 2}]: expected at most N = {num_tokens}, got {ends[-1]}"
        )


def check_pairs_in_range(pairs: Tensor, sequences: int) -> None:
    """Raises IndexError if ``pairs``, on the CPU, name a sequence that does not exist."""
    indices = pairs.to(torch.int64)
    wrong = ((indices < 0) | (indices >= sequences)).nonzero()
    if len(wrong) > 0:
        p, side = wrong[0].tolist()
        raise IndexError(
            f"pairs[{p}, {side}] is out of range: expected a sequence in [0, {sequences}), "
            f"got {int(indices[p, side])}"
        )


# ---- a backward in place -------------------------------------------------------------------------


def _check_may_be_overwritten(logits: Tensor) -> None:  # [B, T, V]
    """Raises ValueError if the backward must not overwrite the logits with their gradient."""
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
