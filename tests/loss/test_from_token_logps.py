"""simpo_loss_from_token_logps(token_logps(logits), labels) equals simpo_loss(logits, labels)."""

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
    simpo_loss,
    simpo_loss_from_token_logps,
    token_logps,
)
from support import oracle
from support.batches import DTYPES, make_batch
from support.comparisons import (
    DIFFERENTIABLE,
    assert_outputs_match,
    assert_same,
    loss_and_gradient,
    reduced_weights,
)
from support.packed_batches import PAIRS, make_linear_packed, make_packed

pytestmark = pytest.mark.kernels

NAN = float("nan")
PAIRED = torch.tensor(PAIRS)
TOKEN_OPTIONS: list[dict[str, Any]] = [
    {},
    {"shift": False, "reduction": "none", "sft_weight": 0.3},
    {"average_log_prob": False, "loss_type": "hinge", "reduction": "sum"},
    {"sft_weight": 0.3, "sft_reduction": "token", "label_smoothing": 0.2},
    {"normalizer": (3.0, 7.0), "sft_weight": 0.3, "sft_reduction": "token"},
    {"alpha": 0.3, "empty": "nan"},
    {"loss_type": "ipo", "ignore_index": 3, "gamma": 0.3},
]


def through_token_logps(score: Callable[[Tensor], Tensor], logits: Tensor, labels: Tensor,
                        **options: Any) -> Any:  # fmt: skip
    """The loss in two steps, and the gradient of all outputs."""
    leaf = logits.clone().requires_grad_()
    out = simpo_loss_from_token_logps(score(leaf), labels, **options)
    outputs = [getattr(out, name) for name in DIFFERENTIABLE]
    return out, torch.autograd.grad(outputs, leaf, [reduced_weights(x) for x in outputs])[0]


@pytest.mark.parametrize("options", TOKEN_OPTIONS, ids=str)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_from_token_logps_equals_simpo_loss(dtype: torch.dtype, packed: bool, options: Any) -> None:
    batch = make_packed(dtype=dtype, before=2, after=1)
    logits, labels = batch[:2] if packed else batch.padded()
    mask = options.get("ignore_index", -100)
    labels = labels.masked_fill(labels == -100, mask)
    layout: dict[str, Any] = {"cu_seqlens": batch.cu_seqlens} if packed else {}
    scoring = {name: options[name] for name in ("ignore_index", "shift") if name in options}
    weight = torch.linspace(-0.5, 2.0, len(PAIRS))
    options = {**options, **layout, "pairs": PAIRED, "pair_weight": weight}
    out, gradient = through_token_logps(
        lambda x: token_logps(x, labels, **scoring, **layout), logits, labels, **options
    )
    leaf = logits.clone().requires_grad_()
    want = simpo_loss(leaf, labels, **options)
    outputs = [getattr(want, name) for name in DIFFERENTIABLE]
    assert_same(tuple(out), tuple(want))
    assert [x.requires_grad for x in out] == [x.requires_grad for x in want]
    weights = [reduced_weights(x) for x in outputs]
    assert_same(gradient, torch.autograd.grad(outputs, leaf, weights)[0])
    assert out.metrics() == pytest.approx(want.metrics(), nan_ok=True)


def test_from_token_logps_without_pairs_and_from_hidden_states() -> None:
    batch = make_batch(pairs=3)
    want, (want_gradient, _) = loss_and_gradient(*batch, sft_weight=0.3)
    leaf = batch.logits.clone().requires_grad_()
    out = simpo_loss_from_token_logps(token_logps(leaf, batch.labels), batch.labels, sft_weight=0.3)
    out.loss.backward()
    assert_same((tuple(out), leaf.grad), (tuple(want), want_gradient))

    linear, packed = make_linear_packed()
    layout = {"cu_seqlens": packed.cu_seqlens}
    logps = linear_token_logps(*linear[:3], bias=linear.bias, **layout)
    out = simpo_loss_from_token_logps(logps, linear.labels, pairs=PAIRED, **layout)
    want = linear_simpo_loss(*linear[:3], bias=linear.bias, pairs=PAIRED, **layout)
    assert_same(tuple(out), tuple(want))


@pytest.mark.parametrize("options", TOKEN_OPTIONS, ids=str)
def test_from_token_logps_matches_the_oracle_and_gradcheck(options: dict[str, Any]) -> None:
    packed = make_packed(dtype=torch.float64, before=1)
    labels = packed.labels.masked_fill(packed.labels == -100, options.get("ignore_index", -100))
    if options.get("empty") == "nan":
        options = {name: value for name, value in options.items() if name != "empty"}
    generator = torch.Generator().manual_seed(0)
    values = -3.0 * torch.rand(labels.shape, generator=generator, dtype=torch.float64)
    scoring = {name: options[name] for name in ("ignore_index", "shift") if name in options}
    cu = packed.cu_seqlens
    _, _, valid = oracle.token_logps(
        np.zeros((*labels.shape, 40)), labels.numpy(), cu_seqlens=cu.numpy(), **scoring
    )
    values[~torch.from_numpy(valid)] = NAN  # Masked positions are not read.
    of_loss = {name: value for name, value in options.items() if name not in scoring}
    if "gamma" in of_loss:
        of_loss["gamma_beta_ratio"] = of_loss.pop("gamma") / 2.0
    arguments = {"pairs": PAIRS, "cu_seqlens": cu.numpy(), **of_loss}
    want = oracle.preference_loss(values.numpy(), valid, **arguments)
    want_gradient = oracle.preference_grad(values.numpy(), valid, **arguments)
    leaf = values.clone().requires_grad_()
    options = {**options, "cu_seqlens": cu, "pairs": PAIRED}
    out = simpo_loss_from_token_logps(leaf, labels, **options)
    assert_outputs_match(out, want, 1e-13, 1e-14)
    (gradient,) = torch.autograd.grad(out.loss.sum(), leaf)
    np.testing.assert_allclose(gradient.numpy(), want_gradient, rtol=1e-13, atol=1e-16)
    finite = values.nan_to_num().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: simpo_loss_from_token_logps(x, labels, **options).loss, finite
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dtypes_from_token_logps(dtype: torch.dtype) -> None:
    batch = make_batch()
    leaf = (-torch.rand(batch.labels.shape, dtype=dtype)).requires_grad_()
    out = simpo_loss_from_token_logps(leaf, batch.labels)
    assert [x.dtype for x in out] == [dtype] * 7 + [torch.float64]
    out.loss.backward()
    assert leaf.grad.dtype == dtype
