"""What the loss allocates: no copy of the logits in the forward, one gradient in the backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import simpo_ext
from support.batches import make_batch

pytestmark = [pytest.mark.kernels, pytest.mark.emulation]  # test_cuda.py has the GPU's own


def allocated_bytes(function: Callable[[], object]) -> int:
    """Sum of all tensor allocations while the function runs, freed or not."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_forward_allocates_no_copy_of_the_logits_and_backward_one_gradient_at_most(
    dtype: torch.dtype, inplace: bool
) -> None:
    batch = make_batch(pairs=2, time=32, vocabulary=20000, dtype=dtype)
    size = batch.logits.numel() * batch.logits.element_size()
    leaf = batch.logits.requires_grad_()
    logits = leaf.view_as(leaf) if not inplace else leaf * 1
    losses: list[Tensor] = []

    def forward() -> None:
        out = simpo_ext.simpo_loss(logits, batch.labels, sft_weight=0.1, inplace_backward=inplace)
        losses.append(out.loss)

    assert allocated_bytes(forward) < 0.02 * size
    # With respect to the logits, so that the gradient of whatever made them is not counted.
    gradient = allocated_bytes(lambda: torch.autograd.grad(losses[0], logits))
    if inplace:
        assert gradient < 0.02 * size
    else:
        assert size <= gradient < 1.02 * size


def test_the_measure_sees_the_copies_of_the_eager_formula() -> None:
    batch = make_batch(pairs=2, time=32, vocabulary=20000)
    size = batch.logits.numel() * batch.logits.element_size()
    assert allocated_bytes(lambda: batch.logits[:, :-1].log_softmax(-1)) > 0.9 * size
