"""Packed sequences: boundaries, padding, batches without scored tokens, and layouts in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from simpo_ext import (
    linear_simpo_loss,
    linear_token_logps,
    sequence_logps,
    simpo_loss,
    token_logps,
)
from support import oracle
from support.batches import DTYPES
from support.comparisons import assert_same, loss_and_gradient
from support.linear_batches import LinearBatch
from support.packed_batches import LENGTHS, PAIRS, Packed, make_linear_packed, make_packed

pytestmark = pytest.mark.kernels

NAN = float("nan")
PAIRED = torch.tensor(PAIRS)


# ---- boundaries and padding ----------------------------------------------------------------------


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_sequence_scores_like_a_batch_of_one(dtype: torch.dtype, shift: bool) -> None:
    packed = make_packed(dtype=dtype, before=2, after=1)
    logps = token_logps(*packed[:2], cu_seqlens=packed.cu_seqlens, shift=shift)
    means = sequence_logps(*packed[:2], cu_seqlens=packed.cu_seqlens, shift=shift)
    for s, span in enumerate(packed.spans):
        alone = packed.logits[None, span], packed.labels[None, span]
        assert_same(logps[None, span], token_logps(*alone, shift=shift))
        assert_same(means[s : s + 1], sequence_logps(*alone, shift=shift))
        if shift and packed.lengths[s]:
            assert logps[span][-1] == 0
    assert not logps[packed.padding()].any()


@pytest.mark.parametrize("label", [5, 41, -1])
def test_the_first_label_of_a_sequence_is_not_read_with_a_shift(label: int) -> None:
    packed = make_packed()
    want, gradients = loss_and_gradient(*packed[:2], cu_seqlens=packed.cu_seqlens)
    for span in packed.spans:
        packed.labels[span][:1] = label
    out, got = loss_and_gradient(*packed[:2], cu_seqlens=packed.cu_seqlens)
    assert_same((out, got), (want, gradients))


@pytest.mark.cpu_only
def test_a_label_out_of_range_inside_a_sequence_is_named() -> None:
    packed = make_packed(before=2)
    at = packed.spans[4].start + 3
    packed.labels[at] = 40
    for labels in (packed.labels, packed.labels[None]):
        logits = packed.logits.view(*labels.shape, -1)
        with pytest.raises(IndexError, match=rf"labels\[(0, )?{at}\].*got 40"):
            token_logps(logits, labels, cu_seqlens=packed.cu_seqlens)


@pytest.mark.parametrize("garbage", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_and_sequences_in_no_pair_change_nothing(
    dtype: torch.dtype, inplace: bool, garbage: float
) -> None:
    clean = make_packed(dtype=dtype)
    packed = make_packed(dtype=dtype, before=5, after=3)
    packed.logits[5:-3], packed.labels[5:-3] = clean.logits, clean.labels
    unused = packed.padding()
    unused[packed.spans[7]] = True
    packed.logits[unused] = garbage
    options: dict[str, Any] = {"pairs": PAIRED, "sft_weight": 0.2}
    want, (want_gradient, _) = loss_and_gradient(*clean[:2], cu_seqlens=clean.cu_seqlens, **options)
    leaf = packed.logits.clone().requires_grad_()
    logits = leaf * 1
    options |= {"cu_seqlens": packed.cu_seqlens, "inplace_backward": inplace}
    out = simpo_loss(logits, packed.labels, **options)
    out.loss.backward()
    assert_same(tuple(out), tuple(want))
    assert not leaf.grad[unused].any()
    assert_same(leaf.grad[~unused], want_gradient[: -LENGTHS[7]])
    if inplace:
        assert_same(logits.detach(), leaf.grad)


@pytest.mark.parametrize("garbage", [NAN, float("inf")])
@pytest.mark.parametrize("unused", ["padding", "in no pair", "weight 0", "dropped"])
def test_unscored_hidden_states_do_not_change_the_weight_gradient(
    unused: str, garbage: float
) -> None:
    def gradients(fill: float) -> tuple[Tensor, list[Tensor]]:
        batch, packed = make_linear_packed(before=5, after=3)
        rows = packed.padding()
        pairs, weight = torch.tensor([[0, 2], [6, 4], [5, 4]]), torch.tensor([1.0, 2.0, 1.0])
        if unused == "in no pair":
            rows[packed.spans[7]] = True
        elif unused == "weight 0":
            rows[packed.spans[5]], weight[2] = True, 0.0
        elif unused == "dropped":  # Its partner, 3, has no token.
            rows[packed.spans[5]], pairs[2, 1] = True, 3
        batch.hidden[rows] = fill
        leaf = batch.leaves()
        layout = {"cu_seqlens": packed.cu_seqlens, "pairs": pairs, "pair_weight": weight}
        out = linear_simpo_loss(*leaf[:3], bias=leaf.bias, sft_weight=0.2, **layout)
        out.loss.backward()
        assert not leaf.hidden.grad[rows].any()
        return out.loss.detach(), [x.grad for x in leaf.inputs()]

    loss, got = gradients(garbage)
    want_loss, want = gradients(0.5)
    assert_same(loss, want_loss)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("positions", "cu_seqlens"), [
    (0, [0]), (4, [0]), (4, [2]), (4, [4]),  # no sequences
    (0, [0, 0, 0]), (4, [2, 2, 2]), (3, [0, 1, 2]), (3, [1, 2, 3]),  # nothing to predict
])  # fmt: skip
def test_loss_zero_without_scored_tokens(
    positions: int, cu_seqlens: list[int], reduction: Any, inplace: bool
) -> None:
    leaf = torch.full((positions, 7), NAN, requires_grad=True)
    labels, cu = torch.full((positions,), 3), torch.tensor(cu_seqlens)
    options: dict[str, Any] = {"reduction": reduction, "sft_weight": 0.5, "cu_seqlens": cu}
    out = simpo_loss(leaf * 1, labels, inplace_backward=inplace, **options)
    pairs = (len(cu_seqlens) - 1) // 2
    nothing = torch.zeros((pairs,) if reduction == "none" else ())
    assert_same((out.loss, out.sft_loss, out.losses), (nothing, nothing, torch.zeros(pairs)))
    assert out.chosen_logps.shape == (pairs,) and out.chosen_logps.isnan().all()
    assert not torch.autograd.grad(out.loss.sum(), leaf)[0].any()
    assert list(out.metrics().values()) == pytest.approx([NAN] * 6 + [0, pairs, 0], nan_ok=True)
    logps = token_logps(leaf, labels, cu_seqlens=cu)
    assert_same(logps.detach(), torch.zeros(positions))
    assert sequence_logps(leaf, labels, cu_seqlens=cu).isnan().tolist() == [True] * (2 * pairs)


@pytest.mark.parametrize("pairs", [torch.zeros(0, 2, dtype=torch.int64), None])
def test_the_linear_loss_without_sequences_or_pairs(pairs: Any) -> None:
    batch, packed = make_linear_packed()
    cu = packed.cu_seqlens if pairs is not None else packed.cu_seqlens[-1:]
    leaf = batch.leaves()
    out = linear_simpo_loss(*leaf[:3], bias=leaf.bias, cu_seqlens=cu, pairs=pairs)
    out.loss.backward()
    assert out.loss == 0 and out.losses.shape == (0,)
    assert not any(x.grad.any() for x in leaf.inputs())


def test_an_empty_vocabulary() -> None:
    leaf = torch.zeros(4, 0, requires_grad=True)
    labels = torch.full((4,), -100)
    out = simpo_loss(leaf, labels, cu_seqlens=torch.tensor([0, 2, 4]))
    out.loss.backward()
    assert out.loss == 0 and leaf.grad.shape == (4, 0)


# ---- shapes, dtypes and strides ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_batch_of_one_row_equals_flat_positions(dtype: torch.dtype) -> None:
    packed = make_packed(dtype=dtype, before=1, after=1)
    options: dict[str, Any] = {"cu_seqlens": packed.cu_seqlens, "pairs": PAIRED}
    want, gradients = loss_and_gradient(*packed[:2], **options)
    row = packed.logits[None], packed.labels[None]
    out, of_row = loss_and_gradient(*row, **options)
    assert_same(tuple(out), tuple(want))
    assert_same(of_row, [gradient[None] for gradient in gradients])
    cu = packed.cu_seqlens
    assert_same(token_logps(*row, cu_seqlens=cu), token_logps(*packed[:2], cu_seqlens=cu)[None])
    assert_same(sequence_logps(*row, cu_seqlens=cu), sequence_logps(*packed[:2], cu_seqlens=cu))


def test_a_linear_batch_of_one_row_equals_flat_positions() -> None:
    batch, packed = make_linear_packed(before=1, after=1)
    results = []
    for inputs in (batch, batch._replace(hidden=batch.hidden[None], labels=batch.labels[None])):
        leaf = inputs.leaves()
        options = {"bias": leaf.bias, "cu_seqlens": packed.cu_seqlens}
        logps = linear_token_logps(*leaf[:3], **options)
        assert logps.shape == inputs.labels.shape
        out = linear_simpo_loss(*leaf[:3], pairs=PAIRED, **options)
        out.loss.backward()
        assert leaf.hidden.grad.shape == leaf.hidden.shape
        gradients = [leaf.hidden.grad.flatten(), leaf.weight.grad, leaf.bias.grad]
        results.append((tuple(out), logps.detach().flatten(), gradients))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("strided", [False, True])
def test_boundaries_of_either_dtype_and_any_stride(strided: bool, dtype: torch.dtype) -> None:
    packed = make_packed(before=2, after=2)
    want, gradients = loss_and_gradient(*packed[:2], cu_seqlens=packed.cu_seqlens)
    cu = packed.cu_seqlens.to(dtype)
    if strided:
        cu = torch.stack((cu, torch.full_like(cu, 10**6)), dim=1)[:, 0]
    out, got = loss_and_gradient(*packed[:2], cu_seqlens=cu)
    assert_same((tuple(out), got), (tuple(want), gradients))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels_of_any_integer_dtype_and_stride(dtype: torch.dtype) -> None:
    packed = make_packed()
    cu = packed.cu_seqlens
    narrow = packed.labels.masked_fill(packed.labels == -100, 99).to(dtype)
    narrow = torch.stack((narrow, narrow), dim=1)[:, 1]
    got = loss_and_gradient(packed.logits, narrow, cu_seqlens=cu, ignore_index=99)
    assert_same(got, loss_and_gradient(*packed[:2], cu_seqlens=cu))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "offset": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "wider": lambda x: torch.cat((x, x), -1)[:, : x.shape[1]],
    "every other row": lambda x: torch.stack((x, x), 1).flatten(0, 1)[::2],
    "vocabulary first": lambda x: x.t().contiguous().t(),
    "vocabulary strided": lambda x: torch.stack((x, x), -1)[..., 0],
    "one row expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_the_logits_changes_no_bit(layout: str, dtype: torch.dtype, rank: int) -> None:
    packed = make_packed(dtype=dtype)
    logits, labels = LAYOUTS[layout](packed.logits), packed.labels
    if rank == 3:
        logits, labels = logits[None], labels[None]
    options: dict[str, Any] = {"cu_seqlens": packed.cu_seqlens, "pairs": PAIRED}
    want, (want_gradient, _) = loss_and_gradient(logits.contiguous(), labels, **options)
    out, (gradient, _) = loss_and_gradient(logits, labels, **options)
    assert_same((tuple(out), gradient), (tuple(want), want_gradient))
    if layout in ("offset", "wider", "every other row"):  # These rows can be overwritten.
        leaf = packed.logits.clone().requires_grad_()
        logits = LAYOUTS[layout](leaf * 1)
        logits = logits[None] if rank == 3 else logits
        loss = simpo_loss(logits, labels, inplace_backward=True, **options).loss
        loss.backward()
        assert_same(leaf.grad.view(want_gradient.shape), want_gradient)
        assert_same(logits.detach(), want_gradient)


def transposed(batch: LinearBatch) -> LinearBatch:
    """The batch with columns first in memory, such as a weight [H, V].t()."""
    hidden, weight, labels, bias = batch
    return LinearBatch(hidden.t().contiguous().t(), weight.t().contiguous().t(), labels, bias)


def test_the_layout_of_hidden_states_changes_only_the_order_of_sums() -> None:
    batch, packed = make_linear_packed(dtype=torch.float64, before=1)
    results = []
    for stored in (batch, transposed(batch)):
        inputs = [x.detach().requires_grad_() for x in stored.inputs()]
        options = {"bias": inputs[2], "cu_seqlens": packed.cu_seqlens, "pairs": PAIRED}
        out = linear_simpo_loss(*inputs[:2], stored.labels, **options)
        results.append((tuple(out), torch.autograd.grad(out.loss, inputs)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14, equal_nan=True)


# ---- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threads", "times"), [(1, 2), pytest.param(2, 40, marks=pytest.mark.cpu_only)]
)
def test_repetition_and_threads_change_no_bit(threads: int, times: int, request: Any) -> None:
    # Sequence 0 or 2 is in every pair. For two threads, there are enough tokens and pairs for both.
    packed = make_packed([40, 3, 700] * times, 48)
    count = 3 * times
    pairs = torch.tensor([(0, p % count) if p % 2 else (p % count, 2) for p in range(20 * times)])
    options: dict[str, Any] = {"cu_seqlens": packed.cu_seqlens, "pairs": pairs, "sft_weight": 0.3}
    want = loss_and_gradient(*packed[:2], **options)
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(threads)
    for _ in range(2):
        assert_same(loss_and_gradient(*packed[:2], **options), want)


def test_the_order_of_the_sequences_changes_nothing() -> None:
    packed = make_packed(dtype=torch.float64)
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    moved = Packed(
        torch.cat([packed.logits[packed.spans[s]] for s in order]),
        torch.cat([packed.labels[packed.spans[s]] for s in order]),
        torch.tensor([0, *(packed.lengths[s] for s in order)]).cumsum(0),
    )
    place = torch.tensor(order).argsort()
    want, (gradient, _) = loss_and_gradient(*packed[:2], cu_seqlens=packed.cu_seqlens, pairs=PAIRED)
    out, (got, _) = loss_and_gradient(*moved[:2], cu_seqlens=moved.cu_seqlens, pairs=place[PAIRED])
    assert_same(tuple(out), tuple(want))
    assert_same(got, torch.cat([gradient[packed.spans[s]] for s in order]))


def test_the_oracle_reads_no_padding() -> None:
    packed = make_packed(dtype=torch.float64, before=3, after=3)
    logps, _, valid = oracle.token_logps(*packed.arrays(), cu_seqlens=packed.cu_seqlens.numpy())
    assert np.isfinite(logps).all()
    assert not valid[packed.padding().numpy()].any()
