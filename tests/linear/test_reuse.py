"""On CPUs, large logits and weight gradients reuse the memory that earlier calls freed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simpo_ext import linear_token_logps
from support.linear_batches import UNLIMITED

pytestmark = pytest.mark.cpu_only

LARGE = 2**25  # larger tensors reuse memory
ROWS, V, H = 700, 12293, 714  # four chunks of logits in one tensor, and a weight: 33 MiB each


def make_inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, ROWS, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) * 0.1
    labels = torch.randint(V, (1, ROWS), generator=generator)
    assert weight.nbytes > LARGE
    return hidden, weight, labels


def weight_gradient(inputs: tuple[Tensor, Tensor, Tensor], budget: int = UNLIMITED) -> Tensor:
    hidden, weight, labels = inputs
    leaf = weight.clone().requires_grad_()
    logps = linear_token_logps(hidden, leaf, labels, shift=False, logits_budget_bytes=budget)
    return torch.autograd.grad(logps.sum(), leaf)[0]


@pytest.mark.parametrize("budget", [0, UNLIMITED])
def test_old_values_in_reused_memory_change_nothing(budget: int) -> None:
    first, second = make_inputs(0), make_inputs(1)
    expected = weight_gradient(second, budget).clone()
    addresses = set()
    for _ in range(6):
        gradient = weight_gradient(first, budget)
        addresses.add(gradient.data_ptr())
        gradient.fill_(torch.nan)
        del gradient
        assert torch.equal(weight_gradient(second, budget), expected)
    assert len(addresses) <= 4  # At most four mappings are kept for reuse.


def test_memory_in_use_is_not_reused() -> None:
    inputs = make_inputs(0)
    held = [weight_gradient(inputs) for _ in range(3)]
    view = held[0][1:]
    copies = [gradient.clone() for gradient in held]
    del held[0]  # The view keeps the memory.
    weight_gradient(make_inputs(1)).fill_(torch.nan)
    weight_gradient(make_inputs(2))
    assert torch.equal(view, copies[0][1:])
    for gradient, copy in zip(held, copies[1:], strict=True):
        assert torch.equal(gradient, copy)
    assert len({view.data_ptr(), *(gradient.data_ptr() for gradient in held)}) == 3
