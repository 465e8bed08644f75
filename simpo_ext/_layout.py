"""Where the sequences of a batch lie, which of them are pairs, and what a pair weighs."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import INDEX_DTYPES, check_index_tensor, check_tensor


class Layout(NamedTuple):
    """What the ops take beside token log-probabilities and targets [B, T].

    Without ``cu_seqlens`` the rows are the sequences, S = B; with it, B is 1. Without ``pairs``,
    pair p is of the sequences p and P + p.
    """

    cu_seqlens: Tensor | None = None  # [S + 1] int64
    pairs: Tensor | None = None  # [P, 2] int64
    pair_weight: Tensor | None = None  # [P] float64


def as_batch(
    name: str, tokens: object, labels: object, cu_seqlens: object
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, labels and cu_seqlens, the flat layout as a batch of one row.

    Args:
        name: Of ``tokens`` in messages.
        tokens: [B, T, ...]; or, if ``cu_seqlens`` are given, [N, ...] or [1, N, ...].
        labels: [B, T]; or [N] or [1, N].
        cu_seqlens: [S + 1], or None.

    Returns:
        What was given, or tokens [1, N, ...], labels [1, N], and cu_seqlens as int64 on the device
        of the tokens.
    """
    tokens, labels = check_tensor(name, tokens), check_tensor("labels", labels)
    if cu_seqlens is None:
        return tokens, labels, None
    last = {"logits": ", V", "hidden": ", H"}.get(name, "")
    labels_dim = 1 if labels.dim() == 1 else 2
    is_flat = tokens.dim() == labels_dim + bool(last) and (labels_dim == 1 or tokens.shape[0] == 1)
    if not is_flat or labels.shape != tokens.shape[:labels_dim]:
        raise ValueError(
            f"{name}, labels: expected shapes [N{last}] and [N], or [1, N{last}] and [1, N], with "
            f"cu_seqlens, got {list(tokens.shape)} and {list(labels.shape)}"
        )
    cu_seqlens = check_index_tensor(
        "cu_seqlens", cu_seqlens, (torch.int64, torch.int32), name, tokens
    )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens: expected shape [S + 1], got {list(cu_seqlens.shape)}")
    if labels_dim == 1:
        tokens, labels = tokens.unsqueeze(0), labels.unsqueeze(0)
    if cu_seqlens.device != tokens.device:
        _check_cu_seqlens(cu_seqlens, tokens.shape[1])
    return tokens, labels, cu_seqlens.to(tokens.device, torch.int64, non_blocking=True)


def resolve_layout(
    name: str,
    tokens: Tensor,  # [B, T, ...]
    cu_seqlens: Tensor | None,  # as as_batch returns it
    pairs: object,
    pair_weight: object,
) -> Layout:
    """The layout of a batch of pairs, checked but for what only the kernels can see."""
    sequences = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if pairs is None:
        if sequences % 2 != 0:
            what = (
                f"{name}: expected an even B (P chosen rows, then P rejected rows)"
                if cu_seqlens is None
                else "cu_seqlens: expected an even number of sequences (P chosen, then P rejected)"
            )
            raise ValueError(f"{what}, or pairs, got {sequences}")
        num_pairs = sequences // 2
    else:
        pairs = check_index_tensor("pairs", pairs, INDEX_DTYPES, name, tokens)
        if pairs.dim() != 2 or pairs.shape[1] != 2:
            raise ValueError(
                f"pairs: expected shape [P, 2] (chosen, rejected), got {list(pairs.shape)}"
            )
        num_pairs = pairs.shape[0]
        if pairs.device != tokens.device:
            _check_pairs(pairs, sequences)
        pairs = pairs.to(tokens.device, torch.int64, non_blocking=True)
    return Layout(cu_seqlens, pairs, _check_pair_weight(pair_weight, num_pairs, name, tokens))


def _check_pair_weight(value: object, num_pairs: int, name: str, tokens: Tensor) -> Tensor | None:
    if value is None:
        return None
    weight = check_tensor("pair_weight", value)
    if weight.is_complex():
        raise TypeError(f"pair_weight: expected real numbers, got {weight.dtype}")
    if weight.requires_grad:
        raise ValueError(
            "pair_weight: expected constants, got a tensor that requires grad; detach it, or "
            "multiply losses, the output, by it"
        )
    if weight.dim() != 1 or weight.shape[0] != num_pairs:
        raise ValueError(
            f"pair_weight: expected shape [P] = [{num_pairs}], got {list(weight.shape)}"
        )
    if weight.device != tokens.device:
        raise ValueError(
            f"pair_weight: expected device {tokens.device} as of {name}, got {weight.device}"
        )
    return weight.to(torch.float64)


# Of CPU tensors beside tokens on a GPU. Where all is on the CPU, the kernels find the same.


def _check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> None:
    ends = [0, *cu_seqlens.tolist()]
    for i, (before, end) in enumerate(pairwise(ends)):
        if end < before:
            least = "0 or more" if i == 0 else f"at least the {before} before it"
            raise ValueError(f"cu_seqlens[{i}]: expected {least}, got {end}")
    if ends[-1] > num_tokens:
        raise ValueError(
            f"cu_seqlens[{len(ends) - 2}]: expected at most N = {num_tokens}, got {ends[-1]}"
        )


def _check_pairs(pairs: Tensor, sequences: int) -> None:
    for p, pair in enumerate(pairs.tolist()):
        for side, sequence in enumerate(pair):
            if not 0 <= sequence < sequences:
                raise IndexError(
                    f"pairs[{p}, {side}] is out of range: expected a sequence in [0, {sequences}), "
                    f"got {sequence}"
                )
