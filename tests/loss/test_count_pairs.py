"""count_pairs counts the denominators of a mean before the loss is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from simpo_ext import count_pairs, linear_simpo_loss, simpo_loss, simpo_loss_from_token_logps
from simpo_ext import token_logps as score_tokens
from support import oracle
from support.batches import make_batch
from support.linear_batches import LinearBatch
from support.packed_batches import PAIRS, Packed, make_linear_packed, make_packed

pytestmark = pytest.mark.kernels

PAIRED = torch.tensor(PAIRS)


def as_numbers(counts: Any) -> tuple[float, float]:
    return counts.pairs.item(), counts.tokens.item()


def total_of(counts: list[Any]) -> Any:
    """The sum of the counts of all micro-batches."""
    return type(counts[0])(*(sum(part) for part in zip(*counts, strict=True)))


def brute_force(sequences: list[list[int]], pairs: Any, empty: str, mask: int, shift: bool) -> Any:
    """Counts one label at a time."""
    num_pairs = num_tokens = 0
    for chosen, rejected in pairs:
        valid = [0, 0]
        for side, s in enumerate((chosen, rejected)):
            for position, label in enumerate(sequences[s]):
                if label != mask and (position > 0 or not shift):
                    valid[side] += 1
        if min(valid) > 0 or empty == "nan":
            num_pairs += 1
            num_tokens += valid[0]
    return num_pairs, num_tokens


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("empty", ["drop", "nan"])
@pytest.mark.parametrize("mask", [-100, 7])
@pytest.mark.parametrize("pairs", [None, PAIRED])
def test_counts_equal_those_of_a_loop(pairs: Any, mask: int, empty: Any, shift: bool) -> None:
    packed = make_packed(before=2, after=3)
    packed.labels[
        packed.spans[5].start + 1
    ] = -100  # The sequence has a token only without the shift.
    labels = packed.labels.masked_fill(packed.labels == -100, mask)
    padded = packed.padded().labels
    padded = padded.masked_fill(padded == -100, mask)
    sequences = [labels[span].tolist() for span in packed.spans]
    expected_pairs = [(p, p + 4) for p in range(4)] if pairs is None else PAIRS
    want = brute_force(sequences, expected_pairs, empty, mask, shift)
    options: dict[str, Any] = {"empty": empty, "ignore_index": mask, "shift": shift}
    cu = packed.cu_seqlens
    for given, layout in ((labels, cu), (labels[None], cu), (labels, cu.int()), (padded, None)):
        got = count_pairs(given, cu_seqlens=layout, pairs=pairs, **options)
        assert as_numbers(got) == want
        expected = oracle.count_pairs(
            given.numpy(), cu_seqlens=None if layout is None else layout.numpy(),
            pairs=None if pairs is None else pairs.numpy(), **options,
        )  # fmt: skip
        assert expected == want


def test_the_loss_divides_by_the_counts() -> None:
    packed = make_packed()
    layout: dict[str, Any] = {"cu_seqlens": packed.cu_seqlens, "pairs": PAIRED}
    for empty in ("drop", "nan"):
        counts = count_pairs(packed.labels, empty=empty, **layout)
        out = simpo_loss(*packed[:2], empty=empty, **layout)
        assert counts.pairs.item() == out.metrics()["num_pairs"]
    summed = simpo_loss(*packed[:2], sft_reduction="token", reduction="sum", **layout)
    mean = simpo_loss(*packed[:2], sft_reduction="token", **layout)
    counts = count_pairs(packed.labels, **layout)
    assert (summed.sft_loss / mean.sft_loss).item() == pytest.approx(counts.tokens.item(), rel=1e-6)


def test_the_counts_are_float64_scalars() -> None:
    for device in ("cpu", "meta"):
        counts = count_pairs(make_batch().labels.to(device))
        assert counts._fields == ("pairs", "tokens")
        assert isinstance(counts, tuple)
        for count in counts:
            assert (count.shape, count.dtype) == ((), torch.float64)
            assert count.device.type == device
            assert not count.requires_grad


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels_of_any_integer_dtype_and_stride(dtype: torch.dtype) -> None:
    labels = make_batch(pairs=3).labels
    narrow = labels.masked_fill(labels == -100, 100).to(dtype)
    want = as_numbers(count_pairs(labels))
    for given in (narrow, narrow.t().contiguous().t(), torch.stack((narrow, narrow), 2)[..., 1]):
        assert as_numbers(count_pairs(given, ignore_index=100)) == want


@pytest.mark.parametrize("empty", ["drop", "nan"])
def test_nothing_to_count(empty: Any) -> None:
    none = torch.zeros(0, 2, dtype=torch.int64)
    for labels, layout, pairs in (
        (torch.zeros(0, 5), {}, 0),
        (torch.zeros(4, 0), {}, 2),
        (torch.zeros(4, 5), {"pairs": none}, 0),
        (torch.zeros(6), {"cu_seqlens": torch.tensor([2])}, 0),
        (torch.zeros(6), {"cu_seqlens": torch.tensor([2, 2, 2])}, 1),
        (torch.zeros(0), {"cu_seqlens": torch.tensor([0])}, 0),
    ):
        counts = count_pairs(labels.long(), empty=empty, **layout)
        assert as_numbers(counts) == (pairs if empty == "nan" else 0, 0)


# ---- the counts as normalizer --------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"sft_weight": 0.3},
    {"sft_weight": 0.3, "sft_reduction": "token"},
    {"loss_type": "hinge", "sft_weight": 0.3, "sft_reduction": "token", "average_log_prob": False},
]


def micro_batches(packed: Packed, pairs: Tensor, parts: int) -> list[tuple[Packed, Tensor, Tensor]]:
    """Of each micro-batch: the sequences, the pairs among them, and their positions in packed."""
    result = []
    for some in pairs.tensor_split(parts):
        used = some.flatten().unique()
        lengths = torch.tensor(packed.lengths)[used]
        cu = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        at = torch.cat([torch.arange(span.start, span.stop) for span in packed.spans])
        owner = torch.repeat_interleave(torch.tensor(packed.lengths))
        positions = torch.cat([at[owner == s] for s in used])
        part = Packed(positions, packed.labels[positions], cu)
        result.append((part, torch.searchsorted(used, some), positions))
    return result


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_micro_batches_give_the_gradient_of_one_batch(parts: int, options: dict[str, Any]) -> None:
    packed = make_packed(dtype=torch.float64, before=1, after=1)
    whole = packed.logits.clone().requires_grad_()
    layout = {"cu_seqlens": packed.cu_seqlens, "pairs": PAIRED}
    want = simpo_loss(whole, packed.labels, **layout, **options).loss
    want.backward()
    steps = micro_batches(packed, PAIRED, parts)
    counts = [count_pairs(p.labels, cu_seqlens=p.cu_seqlens, pairs=pairs) for p, pairs, _ in steps]
    normalizer = total_of(counts)
    assert as_numbers(normalizer) == as_numbers(count_pairs(packed.labels, **layout))
    leaf, total = packed.logits.clone().requires_grad_(), 0.0
    for part, pairs, positions in steps:
        layout = {"cu_seqlens": part.cu_seqlens, "pairs": pairs, "normalizer": normalizer}
        loss = simpo_loss(leaf[positions], part.labels, **layout, **options).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(want.item(), rel=1e-13)
    torch.testing.assert_close(leaf.grad, whole.grad, rtol=1e-12, atol=1e-16)


def test_micro_batches_of_hidden_states_and_token_logps() -> None:
    batch, packed = make_linear_packed(dtype=torch.float64)
    options: dict[str, Any] = {"sft_weight": 0.3, "sft_reduction": "token"}
    leaf = batch.leaves()
    layout = {"cu_seqlens": packed.cu_seqlens, "pairs": PAIRED}
    want = linear_simpo_loss(*leaf[:3], bias=leaf.bias, **layout, **options).loss
    want.backward()
    normalizer = count_pairs(packed.labels, **layout)
    parts: LinearBatch = batch.leaves()
    losses, from_tokens = 0.0, 0.0
    for part, pairs, positions in micro_batches(packed, PAIRED, 3):
        layout = {"cu_seqlens": part.cu_seqlens, "pairs": pairs, "normalizer": normalizer}
        hidden = parts.hidden[positions], parts.weight, part.labels
        loss = linear_simpo_loss(*hidden, bias=parts.bias, **layout, **options).loss
        loss.backward()
        losses += loss.item()
        logps = score_tokens(packed.logits[positions], part.labels, cu_seqlens=part.cu_seqlens)
        out = simpo_loss_from_token_logps(logps, part.labels, **layout, **options)
        from_tokens += out.loss.item()
    assert losses == pytest.approx(want.item(), rel=1e-13)
    assert from_tokens == pytest.approx(want.item(), rel=1e-12)
    for got, expected in zip(parts.inputs(), leaf.inputs(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-11, atol=1e-13)


def test_weights_do_not_change_the_denominators() -> None:
    batch = make_batch(pairs=3, dtype=torch.float64)
    weight = torch.tensor([0.5, 0.0, -2.0])
    options: dict[str, Any] = {"sft_weight": 0.3, "sft_reduction": "token", "pair_weight": weight}
    plain = simpo_loss(*batch, **options)
    given = simpo_loss(*batch, normalizer=count_pairs(batch.labels), **options)
    torch.testing.assert_close(given.loss, plain.loss, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(given.sft_loss, plain.sft_loss, rtol=1e-14, atol=0.0)
