"""Means over chosen and rejected tokens, from the values of each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from simpo_ext._metrics.report import report_values, sequence_sums

ALL = ("logits", "logits_all", "entropy")
NAN = float("nan")


@pytest.mark.parametrize("empty", ["drop", "nan"])
@pytest.mark.parametrize("shift", [False, True])
def test_means_of_packed_sequences(shift: bool, empty: Any) -> None:
    """One sequence is empty. Pairs share some sequences."""
    generator = torch.Generator().manual_seed(0)
    lengths = [4, 0, 3, 1, 6]
    cu_seqlens = torch.tensor([2, *lengths]).cumsum(0)
    size = int(cu_seqlens[-1]) + 3  # with padding at both ends
    labels = torch.randint(3, (size,), generator=generator)
    labels[3] = -100
    values = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name in ALL}
    for value in values.values():
        value[:2] = value[-3:] = NAN
    pairs = torch.tensor([[0, 2], [4, 0], [2, 1], [4, 3]])
    got = report_values(
        ALL,
        values,
        labels,
        ignore_index=-100,
        shift=shift,
        empty=empty,
        cu_seqlens=cu_seqlens.to(torch.int32),
        pairs=pairs,
    )
    valid, ranges = [], []
    for s, length in enumerate(lengths):
        begin = int(cu_seqlens[s])
        positions = range(begin, begin + length)
        ranges.append(list(positions))
        of_labels = [t + shift for t in positions if t + shift < begin + length]
        valid.append([t - shift for t in of_labels if labels[t] != -100])
    counted = [p for p in pairs.tolist() if empty == "nan" or (valid[p[0]] and valid[p[1]])]
    want = []
    for name in ALL:
        for side in (0, 1):
            of_all = name == "logits_all"
            chosen = [pair[side] for pair in (pairs.tolist() if of_all else counted)]
            tokens = [t for s in chosen for t in (ranges if of_all else valid)[s]]
            want.append(values[name][tokens].mean())
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-12, atol=1e-12)


def test_sums_of_packed_sequences() -> None:
    values = torch.tensor([[NAN, 1.0, 2.0, NAN, 4.0, 8.0, torch.inf]])
    cu_seqlens = torch.tensor([1, 3, 4, 4, 6])
    sums, counts = sequence_sums(values, cu_seqlens=cu_seqlens)
    want = torch.tensor([3.0, NAN, 0.0, 12.0], dtype=torch.float64)
    torch.testing.assert_close(sums, want, rtol=0.0, atol=0.0, equal_nan=True)
    assert counts.tolist() == [2.0, 1.0, 0.0, 2.0]
    # Values that are not counted may be NaN.
    sums, counts = sequence_sums(values, values.isfinite(), cu_seqlens)
    assert (sums.tolist(), counts.tolist()) == ([3.0, 0.0, 0.0, 12.0], [2.0, 0.0, 0.0, 2.0])
