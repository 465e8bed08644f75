"""Tests of the linear oracle against PyTorch's derivatives in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from simpo_ext import simpo_loss
from support import linear_oracle
from support.linear_batches import dense_logps, logps_and_gradients, make_linear_batch, upstream_of

SCORINGS: list[dict[str, Any]] = [
    {},
    {"shift": False},
    {"logit_scale": 0.7},
    {"softcap": 3.0, "logit_scale": 1.5},
    {"ignore_index": 3},
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scoring", SCORINGS, ids=str)
def test_logps_and_gradients_match_automatic_differentiation(
    scoring: dict[str, Any], bias: bool
) -> None:
    batch = make_linear_batch(dtype=torch.float64, bias=bias)
    batch.labels.masked_fill_(batch.labels == -100, scoring.get("ignore_index", -100))
    logps, dhidden, dweight, dbias = logps_and_gradients(dense_logps, batch, **scoring)
    options = {"bias": batch.double_bias(), **scoring}
    want, _, valid = linear_oracle.linear_token_logps(*batch.doubles(), **options)
    np.testing.assert_allclose(want, logps.numpy(), rtol=1e-13, atol=1e-13)
    upstream = upstream_of(batch.labels).numpy()
    grads = linear_oracle.linear_token_logps_grad(upstream, *batch.doubles(), **options)
    np.testing.assert_allclose(grads.hidden, dhidden.numpy(), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(grads.weight, dweight.numpy(), rtol=1e-12, atol=1e-13)
    assert not grads.hidden[~valid].any()
    if bias:
        np.testing.assert_allclose(grads.bias, dbias.numpy(), rtol=1e-12, atol=1e-13)


def test_the_loss_and_its_gradients_match_those_of_the_logits() -> None:
    batch = make_linear_batch(pairs=3, dtype=torch.float64).leaves()
    options: dict[str, Any] = {"sft_weight": 0.3, "label_smoothing": 0.1, "softcap": 20.0}
    logits = torch.nn.functional.linear(batch.hidden, batch.weight, batch.bias)
    out = simpo_loss(logits, batch.labels, **options)
    out.loss.backward()
    want, grads = linear_oracle.linear_simpo_loss(
        *batch.doubles(), bias=batch.double_bias(), **options
    )
    assert want.loss == pytest.approx(out.loss.item(), rel=1e-13)
    for grad, leaf in zip(grads, batch.inputs(), strict=True):
        np.testing.assert_allclose(grad, leaf.grad.numpy(), rtol=1e-11, atol=1e-14)


def test_masked_positions_have_gradient_zero() -> None:
    batch = make_linear_batch(dtype=torch.float64)
    upstream = upstream_of(batch.labels).numpy()
    want = linear_oracle.linear_token_logps_grad(upstream, *batch.doubles())
    hidden, weight, labels = batch.doubles()
    masked = np.append(labels[:, 1:] == -100, np.ones((len(labels), 1), dtype=np.bool_), axis=1)
    spoiled = np.where(masked[..., None], np.nan, hidden)
    got = linear_oracle.linear_token_logps_grad(upstream, spoiled, weight, labels)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)
