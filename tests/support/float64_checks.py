"""Compares losses and gradients on any device with the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from support import linear_oracle, oracle
from support.batches import Batch
from support.linear_batches import LinearBatch


@pytest.fixture
def exact_float32_products() -> Iterator[None]:
    """Turns TF32 off, which rounds factors to 10 bits and which the environment may turn on."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


class LossAndGradients(NamedTuple):
    loss: Tensor  # []
    gradients: tuple[Tensor, ...]  # of the logits; or of hidden, weight and, if requested, bias


def relative_error(got: Tensor, want: Tensor) -> float:
    """The relative error in the Frobenius norm."""
    return ((got.detach().cpu().double() - want).norm() / want.norm()).item()


def check_of_logits(got: LossAndGradients, batch: Batch, **options: Any) -> None:
    """Allows the errors of a float32 loss, and of a gradient rounded once to the logits' dtype."""
    logits, labels = (x.detach().cpu() for x in batch)
    want, gradient = oracle.simpo_loss(logits.double().numpy(), labels.numpy(), **options)
    assert relative_error(got.loss, torch.as_tensor(want.loss)) <= 1e-5
    unit_roundoff = torch.finfo(logits.dtype).eps / 2
    assert 0 < relative_error(got.gradients[0], torch.from_numpy(gradient)) <= unit_roundoff + 1e-5


def check_of_hidden_states(got: LossAndGradients, batch: LinearBatch, **options: Any) -> None:
    """Allows any order of sums in matrix products, which depends on shape, device and library.

    The oracle rounds the logits to their dtype, like the products. Another order may round a logit
    the other way, which moves it by the gap between two numbers of its size. Besides arithmetic
    errors, the bounds allow this for four labels of one sequence.
    """
    hidden, weight, labels, bias = (None if x is None else x.detach().cpu() for x in batch)
    assert hidden is not None and weight is not None and labels is not None
    x, w = hidden.double().numpy(), weight.double().numpy()
    b = None if bias is None else bias.double().numpy()
    exact = torch.from_numpy(linear_oracle.linear(x, w, b))
    logits = exact.to(hidden.dtype)
    want, dlogits = oracle.simpo_loss(logits.double().numpy(), labels.numpy(), **options)

    eps = torch.finfo(hidden.dtype).eps
    scored = (labels[:, 1:] != -100).sum(1)
    gap = eps * exact.abs().max().item()
    # This moves a mean log-probability by gap / tokens, and the reward by beta times that. The loss
    # is a mean over pairs.
    beta, pairs = options.get("beta", 2.0), len(labels) // 2
    slope = (beta + options.get("sft_weight", 0.0)) / pairs
    moved = 4 * slope * gap / scored.min().item()
    loss = torch.as_tensor(want.loss)
    own = 1e-5 if hidden.dtype != torch.float64 else 1e-13
    assert (got.loss.detach().cpu().double() - loss).abs() <= moved + own * loss.abs()

    # Rounding dlogits and the result adds half of eps each. A label's logit that is rounded the
    # other way moves its row of dlogits by p (1 - p) gap, which is less than eps of all rows' norm.
    gradients = linear_oracle.linear_grad(dlogits, x, w)[: len(got.gradients)]
    for ours, theirs in zip(got.gradients, gradients, strict=True):
        assert 0 < relative_error(ours, torch.from_numpy(theirs)) <= 2 * eps + own
