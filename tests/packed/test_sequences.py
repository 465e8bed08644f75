"""Packed sequences give the results of padded rows, and those of the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simpo_ext import (
    SimPOOutput,
    linear_simpo_loss,
    linear_token_logps,
    sequence_logps,
    token_logps,
)
from support import linear_oracle
from support.batches import DTYPES
from support.comparisons import OUTPUTS, assert_outputs_match, assert_same, loss_and_gradient
from support.packed_batches import (
    LENGTHS,
    PAIRS,
    Packed,
    make_linear_packed,
    make_packed,
    pad,
    padded_linear,
)

pytestmark = pytest.mark.kernels

NAN = float("nan")
PAIRED = torch.tensor(PAIRS)
# The order in which CUDA kernels sum depends on where 16-byte vectors begin. If the vocabulary is a
# multiple of 8, they begin at the same places in both layouts.
VOCABULARIES = [40, pytest.param(259, marks=pytest.mark.cpu_only)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"shift": False, "reduction": "none", "sft_weight": 0.3},
    {"average_log_prob": False, "loss_type": "hinge", "reduction": "sum"},
    {"sft_weight": 0.3, "sft_reduction": "token", "label_smoothing": 0.2},
    {"softcap": 6.0, "logit_scale": 1.5, "normalizer": 3.0},
    {"alpha": 0.3, "empty": "nan"},
    {"loss_type": "ipo", "ignore_index": 3},
]


def with_ignore_index(packed: Packed, options: dict[str, Any]) -> Packed:
    mask = options.get("ignore_index", -100)
    return packed._replace(labels=packed.labels.masked_fill(packed.labels == -100, mask))


def assert_losses_match(out: SimPOOutput, want: SimPOOutput) -> None:
    """Compares bit for bit, except for sums over the batch, whose order may differ."""
    eps = torch.finfo(out.loss.dtype).eps
    for name in OUTPUTS:
        rtol = 4 * eps if name in ("loss", "sft_loss") else 0.0
        got, expected = getattr(out, name), getattr(want, name)
        torch.testing.assert_close(got, expected, rtol=rtol, atol=0.0, equal_nan=True, msg=name)
    assert out.metrics() == pytest.approx(want.metrics(), rel=1e-13, nan_ok=True)


# ---- padded rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logps_and_gradients_equal_those_of_padded_rows(
    dtype: torch.dtype, vocabulary: int, shift: bool
) -> None:
    packed = make_packed(vocabulary=vocabulary, dtype=dtype, before=3, after=2)
    padded, cu = packed.padded(NAN), packed.cu_seqlens
    leaf, rows = packed.logits.requires_grad_(), padded.logits.requires_grad_()
    logps = token_logps(leaf, packed.labels, cu_seqlens=cu, shift=shift)
    want = token_logps(rows, padded.labels, shift=shift)
    assert_same(logps.detach(), packed.flat(want.detach()))
    upstream = torch.linspace(-1.0, 1.5, logps.numel()).to(logps)
    gradient = torch.autograd.grad(logps, leaf, upstream)[0]
    in_rows = pad([upstream[span] for span in packed.spans], (), 0.0)
    assert_same(gradient, packed.flat(torch.autograd.grad(want, rows, in_rows)[0]))
    for average in (True, False):
        options = {"shift": shift, "average_log_prob": average}
        sequences = sequence_logps(leaf, packed.labels, cu_seqlens=cu, **options)
        in_rows = sequence_logps(rows, padded.labels, **options)
        assert_same(sequences, in_rows)
        upstream = torch.linspace(-1.0, 1.5, len(LENGTHS)).to(logps)
        gradient = torch.autograd.grad(sequences, leaf, upstream)[0]
        assert_same(gradient, packed.flat(torch.autograd.grad(in_rows, rows, upstream)[0]))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairs", [None, PAIRED])
def test_the_loss_and_its_gradient_equal_those_of_padded_rows(
    pairs: Any, dtype: torch.dtype, vocabulary: int, options: dict[str, Any]
) -> None:
    packed = make_packed(vocabulary=vocabulary, dtype=dtype, before=1, after=4)
    packed = with_ignore_index(packed, options)
    padded = packed.padded(NAN)
    labels = padded.labels.masked_fill(padded.labels == -100, options.get("ignore_index", -100))
    options = {"pairs": pairs, **options}
    want, of_rows = loss_and_gradient(padded.logits, labels, **options)
    out, gradients = loss_and_gradient(*packed[:2], cu_seqlens=packed.cu_seqlens, **options)
    assert_losses_match(out, want)
    assert_same(gradients, [packed.flat(gradient) for gradient in of_rows])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_linear_loss_equals_that_of_padded_rows(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    batch, packed = make_linear_packed(dtype=dtype, before=1, after=4)
    packed = with_ignore_index(packed, options)
    batch = batch._replace(labels=packed.labels)
    padded = padded_linear(batch, packed)
    mask = options.get("ignore_index", -100)
    padded = padded._replace(labels=padded.labels.masked_fill(padded.labels == -100, mask))
    results = []
    for inputs, layout in ((batch, {"cu_seqlens": packed.cu_seqlens}), (padded, {})):
        leaf = inputs.leaves()
        arguments = {"bias": leaf.bias, "pairs": PAIRED, **layout}
        out = linear_simpo_loss(*leaf[:3], **arguments, **options)
        results.append((out, torch.autograd.grad(out.loss.sum(), leaf.inputs())))
    (out, gradients), (want, of_rows) = results
    assert_losses_match(out, want)
    of_rows = (packed.flat(of_rows[0]), *of_rows[1:])
    eps = {torch.float64: 1e-15, torch.float32: 1e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    for got, expected in zip(gradients, of_rows, strict=True):
        finite = expected.double().nan_to_num()
        assert (got.isnan() == expected.isnan()).all()
        error = (got.double().nan_to_num() - finite).abs().max()
        assert error <= 10 * eps * max(finite.abs().max().item(), 1e-3)
    assert not gradients[0][packed.padding()].any()


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_logps_equal_those_of_padded_rows(dtype: torch.dtype, shift: bool) -> None:
    batch, packed = make_linear_packed(dtype=dtype, before=2, after=1)
    padded = padded_linear(batch, packed)
    cu = packed.cu_seqlens
    logps = linear_token_logps(*batch[:3], bias=batch.bias, cu_seqlens=cu, shift=shift)
    want = linear_token_logps(*padded[:3], bias=padded.bias, shift=shift)
    assert_same(logps, packed.flat(want))


# ---- the oracle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_output_and_the_gradient_match_the_oracle(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    packed = with_ignore_index(make_packed(dtype=dtype, before=2, after=3), options)
    want, want_gradient = packed.oracle_loss(pairs=PAIRS, **options)
    options = {"cu_seqlens": packed.cu_seqlens, "pairs": PAIRED, **options}
    out, (gradient, _) = loss_and_gradient(*packed[:2], **options)
    # Sums of log-probabilities reach 100. Those of tokens are within 5e-7.
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    assert_outputs_match(out, want, 10 * tolerance, 2 * tolerance)
    assert out.metrics() == pytest.approx(want.metrics, rel=2e-6, abs=2e-6, nan_ok=True)
    rounding = {torch.float64: 1e-13, torch.float32: 3e-6}.get(dtype, torch.finfo(dtype).eps)
    assert gradient.shape == packed.logits.shape
    largest = np.nanmax(np.abs(want_gradient))
    np.testing.assert_allclose(
        gradient.double().numpy(), want_gradient, rtol=0.0, atol=rounding * largest
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_linear_front_end_matches_the_oracle(options: dict[str, Any]) -> None:
    batch, packed = make_linear_packed(dtype=torch.float64, before=2, after=3)
    batch = batch._replace(labels=with_ignore_index(packed, options).labels)
    layout = {"cu_seqlens": packed.cu_seqlens.numpy(), "pairs": PAIRS}
    want, gradients = linear_oracle.linear_simpo_loss(
        *batch.doubles(), bias=batch.double_bias(), **layout, **options
    )
    leaf = batch.leaves()
    layout = {"cu_seqlens": packed.cu_seqlens, "pairs": PAIRED}
    out = linear_simpo_loss(*leaf[:3], bias=leaf.bias, **layout, **options)
    assert_outputs_match(out, want, 1e-12)
    out.loss.sum().backward()
    for ours, theirs in zip(leaf.inputs(), gradients, strict=True):
        np.testing.assert_allclose(ours.grad.numpy(), theirs, rtol=1e-11, atol=1e-13)


def shapes_of_real_pairs() -> tuple[list[int], list[int]]:
    """Prompt lengths and sequence lengths of eight pairs of a preference data set, in tokens."""
    triples = ((26, 402, 131), (545, 220, 220), (12, 620, 264), (10, 504, 174), (505, 542, 337),
               (187, 72, 155), (28, 660, 550), (126, 1, 87))  # fmt: skip
    prompts = [prompt for prompt, _, _ in triples] * 2
    lengths = [p + c for p, c, _ in triples] + [p + r for p, _, r in triples]
    return prompts, lengths


def test_a_batch_with_lengths_of_real_data() -> None:
    prompts, lengths = shapes_of_real_pairs()
    packed = make_packed(lengths, 24)
    for span, prompt in zip(packed.spans, prompts, strict=True):
        packed.labels[span.start : span.start + prompt] = -100
    options: dict[str, Any] = {"sft_weight": 0.3, "sft_reduction": "token"}
    want, want_gradient = packed.oracle_loss(**options)
    out, (gradient, _) = loss_and_gradient(*packed[:2], cu_seqlens=packed.cu_seqlens, **options)
    assert_outputs_match(out, want, 1e-6, 2e-6)
    assert out.metrics()["num_tokens"] == sum(lengths) - sum(prompts)
    error = np.abs(gradient.double().numpy() - want_gradient).max()
    assert error < 3e-6 * np.abs(want_gradient).max()


def test_a_thousand_short_sequences_in_more_pairs() -> None:
    rng = np.random.default_rng(0)
    packed = make_packed(rng.integers(0, 5, 1201).tolist(), 3, dtype=torch.float64)
    pairs = rng.integers(0, 1201, (3003, 2))
    options: dict[str, Any] = {"sft_weight": 0.3, "sft_reduction": "token", "pairs": pairs}
    want, want_gradient = packed.oracle_loss(**options)
    options |= {"pairs": torch.from_numpy(pairs), "cu_seqlens": packed.cu_seqlens}
    out, (gradient, _) = loss_and_gradient(*packed[:2], **options)
    assert_outputs_match(out, want, 1e-12, 1e-13)
    assert out.metrics() == pytest.approx(want.metrics, rel=1e-12)
    np.testing.assert_allclose(gradient.numpy(), want_gradient, rtol=1e-11, atol=1e-16)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_random_layouts_agree_with_the_oracle(data: st.DataObject) -> None:
    def pick(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    lengths = data.draw(st.lists(st.integers(0, 7), max_size=9))
    if pick(True, False):
        pairs = None
        lengths = lengths[: len(lengths) // 2 * 2]
    else:
        sequence = st.integers(0, max(len(lengths) - 1, 0))
        drawn = st.lists(st.tuples(sequence, sequence), max_size=12 if lengths else 0)
        pairs = np.array(data.draw(drawn), dtype=np.int64).reshape(-1, 2)
    count = len(lengths) // 2 if pairs is None else len(pairs)
    edges = {"before": pick(0, 0, 1, 5), "after": pick(0, 0, 1, 5)}
    seed = data.draw(st.integers(0, 2**32))
    packed = make_packed(lengths, pick(1, 2, 7, 33), dtype=torch.float64, seed=seed, **edges)
    inside = ~packed.padding()
    masked = torch.from_numpy(np.random.default_rng(seed).random(len(inside)) < pick(0.0, 0.3, 0.8))
    packed.labels[inside & masked] = -100
    options: dict[str, Any] = {
        "shift": pick(True, False), "beta": pick(0.1, 2.0, 10.0), "sft_weight": pick(0.0, 0.3),
        "average_log_prob": pick(True, False), "empty": pick("drop", "drop", "nan"),
        "alpha": pick(0.0, 0.0, 0.05, -0.1), "gamma_beta_ratio": pick(None, 0.3, -1.1),
        **pick({"loss_type": "hinge"}, {"loss_type": "ipo"}, {}, {"label_smoothing": 0.2}),
        **pick({"reduction": "sum"}, {"reduction": "none"}, {"normalizer": (3.0, 7.0)}, {}),
    }  # fmt: skip
    if options.get("reduction") != "none":
        options["sft_reduction"] = pick("sequence", "token")
    weight = np.array([pick(0.0, 1.0, -2.0, 0.5) for _ in range(count)]) if pick(0, 1) else None

    want, want_gradient = packed.oracle_loss(pairs=pairs, pair_weight=weight, **options)
    options |= {
        "pairs": None if pairs is None else torch.from_numpy(pairs),
        "pair_weight": None if weight is None else torch.from_numpy(weight),
        "cu_seqlens": packed.cu_seqlens,
    }
    out, (gradient, _) = loss_and_gradient(*packed[:2], **options)
    for name in OUTPUTS:
        got = getattr(out, name).detach().numpy()
        np.testing.assert_allclose(got, getattr(want, name), rtol=1e-11, atol=1e-11, err_msg=name)
    assert out.metrics() == pytest.approx(want.metrics, rel=1e-11, abs=1e-11, nan_ok=True)
    np.testing.assert_allclose(gradient.numpy(), want_gradient, rtol=1e-10, atol=1e-11)
