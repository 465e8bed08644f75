"""Requested metrics of packed sequences and of pairs by indices."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from simpo_ext import linear_simpo_loss, simpo_loss
from support.packed_batches import PAIRS, make_packed

pytestmark = pytest.mark.kernels

ALL = ("logits", "logits_all", "entropy")
NAMES = tuple(f"{name}/{side}" for name in ALL for side in ("chosen", "rejected"))


def expected(
    logits: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor, pairs: list[list[int]]
) -> dict[str, float]:
    """The metrics by definition. A sequence counts once for each of its pairs."""
    spans = [slice(a, b) for a, b in pairwise(cu_seqlens.tolist())]
    scored = [[t for t in range(s.start, s.stop - 1) if labels[t + 1] != -100] for s in spans]
    counted = [pair for pair in pairs if all(scored[s] for s in pair)]
    means, logps = logits.double().mean(-1), logits.double().log_softmax(-1)
    entropies = -(logps.exp() * logps).sum(-1)
    result = {}
    for side, name in enumerate(("chosen", "rejected")):
        tokens = [t for pair in counted for t in scored[pair[side]]]
        everything = [t for pair in pairs for t in range(*spans[pair[side]].indices(len(labels)))]
        result[f"logits/{name}"] = means[tokens].mean().item()
        result[f"logits_all/{name}"] = means[everything].mean().item()
        result[f"entropy/{name}"] = entropies[tokens].mean().item()
    return {name: result[name] for name in NAMES}


def test_packed_sequences_in_several_pairs() -> None:
    packed = make_packed(before=3, after=2)  # The padding is NaN.
    out = simpo_loss(
        packed.logits, packed.labels, cu_seqlens=packed.cu_seqlens, pairs=torch.tensor(PAIRS),
        report=ALL,
    )  # fmt: skip
    inside = torch.nan_to_num(packed.logits)
    want = expected(inside, packed.labels, packed.cu_seqlens, [list(pair) for pair in PAIRS])
    got = {name: value for name, value in out.metrics().items() if name in NAMES}
    assert got == pytest.approx(want, rel=1e-5, abs=1e-6)
    assert all(math.isfinite(value) for value in got.values())


def test_packed_hidden_states_have_the_metrics_of_their_logits() -> None:
    packed = make_packed()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(packed.labels), 5, generator=generator)
    weight = torch.randn(packed.logits.shape[1], 5, generator=generator)
    layout = {"cu_seqlens": packed.cu_seqlens, "pairs": torch.tensor(PAIRS)}
    of_hidden = linear_simpo_loss(hidden, weight, packed.labels, report=ALL, **layout).metrics()
    of_logits = simpo_loss(hidden @ weight.T, packed.labels, report=ALL, **layout).metrics()
    assert of_hidden == pytest.approx(of_logits, rel=1e-4, abs=1e-5)


def test_rows_in_pairs_by_indices() -> None:
    logits, labels = make_packed().padded()
    out = simpo_loss(logits, labels, pairs=torch.tensor(PAIRS), report=ALL).metrics()
    rows = torch.arange(len(labels) + 1) * labels.shape[1]
    pairs = [list(pair) for pair in PAIRS]
    want = expected(logits.flatten(0, 1), labels.flatten(), rows, pairs)
    got = {name: value for name, value in out.items() if name in NAMES}
    assert got == pytest.approx(want, rel=1e-5, abs=1e-6)
