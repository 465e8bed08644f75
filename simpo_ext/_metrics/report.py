"""Metrics on request: averages values of tokens over the chosen and over the rejected side.

The values are the forward's mean logits and entropies, [B, T], or [N] for packed sequences. Sums
over sequences come first, then sums over sides. The host does not wait for a device.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from .._ops.records import METRIC_NAMES, EmptyPolicy

ReportName = Literal["logits", "logits_all", "entropy"]

REPORTS: tuple[ReportName, ...] = get_args(ReportName)
SIDES = ("chosen", "rejected")

# How many elements to copy at once for a sum in another dtype. On a CPU they fit its caches.
_CHUNK_ELEMENTS = 1 << 20
_CHUNK_ELEMENTS_OF_GPUS = 1 << 24


def check_report(argument: str, report: object) -> tuple[ReportName, ...]:
    """The names in the option ``report``, each once, in the order of :data:`REPORTS`."""
    expected = ", ".join(repr(name) for name in REPORTS)
    # A string is a collection, too: of its letters.
    if isinstance(report, str) or not isinstance(report, Collection):
        raise TypeError(
            f"{argument}: expected a sequence of names out of {expected}, got "
            f"{type(report).__name__}" + (f" {report!r}" if isinstance(report, str) else "")
        )
    for name in report:
        if not isinstance(name, str):
            raise TypeError(
                f"{argument}: expected names out of {expected}, got {type(name).__name__}"
            )
        if name not in REPORTS:
            raise ValueError(f"{argument}: expected names out of {expected}, got {name!r}")
    return tuple(name for name in REPORTS if name in report)


def asked_for(report: tuple[str, ...], like: Tensor) -> Tensor:  # [3]
    """1 for each of :data:`REPORTS` in ``report``, else 0. :func:`metric_names` reads it."""
    return torch.cat([like.new_full((1,), float(name in report)) for name in REPORTS])


def metric_names(values: Sequence[float]) -> tuple[str, ...]:
    """The names of metric values, in their order.

    The values are the metrics [9]. With a report, its metrics follow, then :func:`asked_for` [3],
    which has no names.
    """
    if len(values) == len(METRIC_NAMES):
        return METRIC_NAMES
    asked = values[-len(REPORTS) :]
    report = (name for name, is_asked in zip(REPORTS, asked, strict=True) if is_asked)
    return METRIC_NAMES + tuple(f"{name}/{side}" for name in report for side in SIDES)


# ---- values of tokens ----------------------------------------------------------------------------


def mean_logits(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    logit_scale: float,
) -> Tensor:  # [...]
    """Mean of ``logit_scale * (hidden @ weight.T + bias)`` over the vocabulary, without logits.

    The mean is linear, so the weight's mean row is enough. The result is float32, or float64 for
    float64 arguments.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    hidden, weight = hidden.detach(), weight.detach()
    mean_row = _sum_of_rows(weight, dtype) / weight.shape[0]
    means = _dot_products(hidden.reshape(-1, hidden.shape[-1]), mean_row).view(hidden.shape[:-1])
    if bias is not None:
        means = means + bias.detach().mean(dtype=dtype)
    return logit_scale * means


def row_means(logits: Tensor) -> Tensor:  # [B, ...] -> [B]
    """Mean of each row, detached; float32, or float64 for float64 logits."""
    logits = logits.detach()
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if logits.dtype == dtype or logits.is_cuda or logits.numel() == 0:
        return logits.flatten(1).mean(1, dtype=dtype) if logits.dim() > 1 else logits.to(dtype)
    # One row at a time: on a CPU, a mean in another dtype copies its argument.
    return torch.stack([row.mean(dtype=dtype) for row in logits])


def _sum_of_rows(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the first dimension in ``dtype``, without a copy of the whole matrix in it."""
    # On GPUs, a sum converts each element as it reads it, and a compiler fuses the conversion.
    if matrix.dtype == dtype or matrix.is_cuda or torch.compiler.is_compiling():
        return matrix.sum(0, dtype=dtype)
    total = matrix.new_zeros(matrix.shape[1:], dtype=dtype)
    for rows in _chunks(matrix):
        total += rows.sum(0, dtype=dtype)
    return total


def _dot_products(rows: Tensor, vector: Tensor) -> Tensor:
    """``rows @ vector`` in the vector's dtype. Autocast would round a matrix product."""
    if torch.compiler.is_compiling():
        return (rows.to(vector.dtype) * vector).sum(-1)
    products = [(chunk * vector).sum(-1) for chunk in _chunks(rows)]
    return torch.cat(products)


def _chunks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Chunks of rows, so small that each can be copied."""
    elements = _CHUNK_ELEMENTS_OF_GPUS if matrix.is_cuda else _CHUNK_ELEMENTS
    rows = max(1, elements // max(1, matrix.shape[1]))
    chunks: tuple[Tensor, ...] = torch.split(matrix, rows)
    return chunks


# ---- tokens to sequences -------------------------------------------------------------------------


def _sequence_of_position(positions: int, cu_seqlens: Tensor) -> Tensor:
    """[N]: 1 + the sequence of each position; 0 before the first and S + 1 past the last."""
    steps = torch.arange(positions, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens, steps, right=True)


def valid_tokens(
    labels: Tensor,  # [B, T] or [N]
    ignore_index: int,
    shift: bool,
    cu_seqlens: Tensor | None = None,  # [S + 1]
) -> Tensor:  # as labels, bool
    """Which positions are scored."""
    is_label = labels != ignore_index
    if shift:
        is_label = F.pad(is_label[..., 1:], (0, 1), value=False)
    if cu_seqlens is None:
        return is_label
    sequence = _sequence_of_position(labels.shape[-1], cu_seqlens).view(labels.shape)
    is_inside = (sequence > 0) & (sequence < cu_seqlens.shape[0])
    if shift:  # the last position of a sequence predicts nothing
        is_inside = is_inside & (sequence == F.pad(sequence[..., 1:], (0, 1), value=0))
    return is_label & is_inside


def sequence_sums(
    values: Tensor,  # [B, T] or [N]
    is_counted: Tensor | None = None,  # as values, bool; None: all of them
    cu_seqlens: Tensor | None = None,  # [S + 1]
) -> tuple[Tensor, Tensor]:  # [S], [S]
    """Sum and count of each sequence's values with ``is_counted``, in float64."""
    values = values.to(torch.float64)
    if is_counted is None:
        counted = torch.ones_like(values)
    else:
        counted = is_counted.to(torch.float64)
        values = torch.where(is_counted, values, 0.0)  # drops NaN, too
    if cu_seqlens is None:
        return values.sum(-1), counted.sum(-1)
    # The first and the last entry are for positions outside of all sequences.
    sequence = _sequence_of_position(values.numel(), cu_seqlens)
    nothing = values.new_zeros(cu_seqlens.shape[0] + 1)
    sums = nothing.index_add(0, sequence, values.flatten())
    counts = nothing.index_add(0, sequence, counted.flatten())
    return sums[1:-1], counts[1:-1]


# ---- sequences to sides --------------------------------------------------------------------------


def _sides(of_sequences: Tensor, pairs: Tensor | None) -> Tensor:
    """[S] -> [2, P]: the values of each pair's chosen and rejected sequence."""
    if pairs is None:
        return of_sequences.view(2, -1)
    last = of_sequences.shape[0] - 1
    if last < 0:
        return of_sequences.new_zeros((2, pairs.shape[0]))
    # On a GPU, an index out of range has already made the loss NaN. Here it would stop the device.
    return of_sequences[pairs.clamp(0, last).t()]


def counted_pairs(
    num_valid: Tensor,  # [S]
    empty: EmptyPolicy,
    pairs: Tensor | None = None,  # [P, 2]
) -> Tensor | None:  # [P], bool; None: all of them
    """The pairs that count: all of them, or with "drop" those without an empty completion."""
    if empty != "drop":
        return None
    return (_sides(num_valid, pairs) > 0).all(0)


def count_sides(
    num_valid: Tensor,  # [S]
    empty: EmptyPolicy,
    pairs: Tensor | None = None,  # [P, 2]
) -> tuple[Tensor, Tensor]:  # [], []
    """The number of counted pairs and of the valid tokens of their chosen sequences, float64.

    A pair with a sequence that does not exist makes both NaN.
    """
    chosen = _sides(num_valid, pairs)[0].to(torch.float64)
    is_counted = counted_pairs(num_valid, empty, pairs)
    if is_counted is None:
        is_counted = torch.ones_like(chosen, dtype=torch.bool)
    num_pairs = is_counted.sum(dtype=torch.float64)
    num_tokens = torch.where(is_counted, chosen, 0.0).sum()
    if pairs is not None:
        exists = ((pairs >= 0) & (pairs < num_valid.shape[0])).all()
        num_pairs = torch.where(exists, num_pairs, torch.nan)
        num_tokens = torch.where(exists, num_tokens, torch.nan)
    return num_pairs, num_tokens


def side_means(
    sums: Tensor,  # [S]
    counts: Tensor,  # [S]
    pairs: Tensor | None = None,  # [P, 2]; None: (p, P + p)
    is_counted: Tensor | None = None,  # [P], bool; None: all of them
) -> Tensor:  # [2]
    """Mean over all values of the chosen and of the rejected sequences; NaN if there are none.

    A sequence counts once for each of its pairs.
    """
    of_sides = [_sides(sums, pairs), _sides(counts, pairs)]
    if is_counted is not None:
        of_sides = [torch.where(is_counted, side, 0.0) for side in of_sides]
    total, number = (side.sum(1) for side in of_sides)
    return total / number


def report_values(
    report: tuple[str, ...],
    values: Mapping[str, Tensor],  # of each name, as labels
    labels: Tensor,  # [B, T] or [N]
    *,
    ignore_index: int,
    shift: bool,
    empty: EmptyPolicy,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    pairs: Tensor | None = None,  # [P, 2]
) -> Tensor:  # [2 * len(report)]
    """The values of the metrics that ``report`` adds."""
    is_valid = valid_tokens(labels, ignore_index, shift, cu_seqlens)
    num_valid, _ = sequence_sums(is_valid, cu_seqlens=cu_seqlens)
    is_counted = counted_pairs(num_valid, empty, pairs)
    means = []
    for name in report:
        if name == "logits_all":
            of_sequences = sequence_sums(values[name], None, cu_seqlens)
            means.append(side_means(*of_sequences, pairs))
        else:
            of_sequences = sequence_sums(values[name], is_valid, cu_seqlens)
            means.append(side_means(*of_sequences, pairs, is_counted))
    return torch.cat(means)
