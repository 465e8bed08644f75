"""Hidden states and lm_head on a GPU: agreement with the CPU, graphs, synchronization, memory.

The tests marked ``kernels`` test the kernels' results with --kernels=cuda.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import simpo_ext
from support.batches import DTYPES
from support.float64_checks import (
    LossAndGradients,
    check_of_hidden_states,
    exact_float32_products,  # noqa: F401
)
from support.linear_batches import LinearBatch

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_float32_products")]
DEVICE = "cuda"
UNLIMITED = 1 << 60
CHUNK = 8192
MIB = 2**20


def make_linear_batch(
    *,
    pairs: int = 2,
    time: int = 24,
    hidden: int = 64,
    vocabulary: int = 20003,  # three chunks of which the last is narrower
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = DEVICE,
) -> LinearBatch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * pairs, time, hidden, generator=generator)
    weight = torch.randn(vocabulary, hidden, generator=generator) * 0.3
    bias = torch.randn(vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (2 * pairs, time), generator=generator)
    labels[:, : time // 3] = -100
    return LinearBatch(
        x.to(device, dtype), weight.to(device, dtype), labels.to(device), bias.to(device, dtype)
    )


def loss_and_grads(batch: LinearBatch, **options: Any) -> LossAndGradients:
    leaf = batch.leaves()
    out = simpo_ext.linear_simpo_loss(*leaf[:3], bias=leaf.bias, **options)
    return LossAndGradients(out.loss.detach(), torch.autograd.grad(out.loss, leaf.inputs()))


@pytest.mark.parametrize("budget", [0, UNLIMITED])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_and_cpu_agree(dtype: torch.dtype, budget: int) -> None:
    batch = make_linear_batch(dtype=dtype)
    want = loss_and_grads(LinearBatch(*(t.cpu() for t in batch if t is not None)), sft_weight=0.3)
    got = loss_and_grads(batch, sft_weight=0.3, logits_budget_bytes=budget)
    # Relative to the largest entry: two libraries compute products and round them to the dtype.
    tolerance = 1e-12 if dtype == torch.float64 else max(4 * torch.finfo(dtype).eps, 1e-5)
    for ours, theirs in zip((got.loss, *got.gradients), (want.loss, *want.gradients), strict=True):
        assert ours.device.type == DEVICE
        error = (ours.cpu().double() - theirs.double()).abs().max() / theirs.double().abs().max()
        assert error <= tolerance


def test_gradcheck_on_the_gpu() -> None:
    batch = make_linear_batch(pairs=1, time=4, hidden=3, vocabulary=9, dtype=torch.float64)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return simpo_ext.linear_simpo_loss(hidden, weight, batch.labels, bias=bias).loss

    leaves = [t.requires_grad_() for t in batch.inputs()]
    assert torch.autograd.gradcheck(loss, leaves)


def test_compiles_without_graph_break_on_the_gpu() -> None:
    batch = make_linear_batch()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return simpo_ext.linear_simpo_loss(
            hidden, weight, batch.labels, num_valid_tokens=batch.labels.numel()
        ).loss

    leaves = [t.clone().requires_grad_() for t in (batch.hidden, batch.weight)]
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for ours, theirs in zip(compiled, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("budget", [0, UNLIMITED])
def test_the_host_does_not_wait_for_the_gpu_if_the_count_is_given(budget: int) -> None:
    batch = make_linear_batch()
    count = int((batch.labels[:, 1:] != -100).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The mode is a prototype.
        try:
            torch.cuda.set_sync_debug_mode("error")
            loss_and_grads(batch, num_valid_tokens=count, logits_budget_bytes=budget)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_against_float64_are_rounding_errors(dtype: torch.dtype) -> None:
    batch = make_linear_batch(dtype=dtype)
    check_of_hidden_states(loss_and_grads(batch, sft_weight=0.3), batch, sft_weight=0.3)


@pytest.mark.parametrize("extra", [None, 0, 5])
def test_a_captured_graph_replays_on_new_data(extra: int | None) -> None:
    # With extra, the count has a bound. Without, there are rows for all tokens.
    def step(batch: LinearBatch) -> LossAndGradients:
        bound = None if extra is None else int(most) + extra
        return loss_and_grads(batch, num_valid_tokens=bound, sft_weight=0.2)

    batches = [make_linear_batch(dtype=torch.bfloat16, seed=seed) for seed in range(3)]
    batches[1].labels[:, :12] = -100  # fewer tokens than in the capture
    most = max((batch.labels[:, 1:] != -100).sum() for batch in batches)
    static = LinearBatch(*(t.clone() for t in batches[0]))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # A capture needs a warm-up on a side stream.
        step(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)

    for batch in batches[1:]:
        for destination, source in zip(static, batch, strict=True):
            destination.copy_(source)
        graph.replay()
        check_of_hidden_states(captured, batch, sft_weight=0.2)
        check_of_hidden_states(step(batch), batch, sft_weight=0.2)  # The number of rows may differ.


def test_tokens_beyond_num_valid_tokens_are_nan() -> None:
    batch = make_linear_batch()
    count = int((batch.labels[:, 1:] != -100).sum())
    logps = simpo_ext.linear_token_logps(
        batch.hidden, batch.weight, batch.labels, num_valid_tokens=count - 3
    )
    assert int(logps.isnan().sum()) == 3


def test_a_label_out_of_range_gives_nan() -> None:
    batch = make_linear_batch()
    batch.labels[1, 20] = 2**62
    loss, (dhidden, dweight, _) = loss_and_grads(batch)
    assert loss.isnan()
    assert dhidden.isnan().any()
    assert dweight.isnan().any()
    torch.cuda.synchronize()


def peak_bytes(function: Callable[[], object]) -> int:
    """The peak of the memory that torch allocates while the function runs."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # Torch could reuse a larger block.
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def workspace_bytes() -> int:
    """The size of the workspace that torch allocates for each product of cuBLAS.

    It is 0 if torch keeps the workspaces of the first product.
    """
    x, w = (torch.randn(512, 512, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    leaf = x.requires_grad_()

    def product() -> None:
        torch.autograd.grad((leaf @ w).sum(), leaf)

    product()
    return peak_bytes(product)


@pytest.mark.parametrize("budget", [0, 3, UNLIMITED])  # in chunks
def test_peak_memory_is_gradients_and_budget(budget: int) -> None:
    batch = make_linear_batch(time=512, hidden=512, vocabulary=8 * CHUNK, dtype=torch.bfloat16)
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    rows = int((batch.labels[:, 1:] != -100).sum())
    chunk = rows * CHUNK * 2
    workspace = workspace_bytes()

    def step() -> None:
        loss = simpo_ext.linear_simpo_loss(
            hidden,
            weight,
            batch.labels,
            logits_budget_bytes=min(budget * chunk, UNLIMITED),
            num_valid_tokens=rows,
        ).loss
        torch.autograd.grad(loss, (hidden, weight))

    gradients = (hidden.numel() + weight.numel()) * 2
    held = min(budget, 9) if budget else 1  # the kept chunks and the current one
    rows_bytes = rows * 512 * (2 + 4)  # hidden states, and the sum of their gradients
    # Torch does not split a block if the rest would be less than 1 MiB.
    assert peak_bytes(step) <= gradients + held * chunk + rows_bytes + workspace + 6 * MIB
    assert chunk / 3 > 6 * MIB


def test_the_sum_of_dhidden_needs_no_memory_for_products() -> None:
    # The rows are large compared with a chunk of logits, and the weight needs no gradient.
    batch = make_linear_batch(time=1024, hidden=4096, vocabulary=2 * CHUNK, dtype=torch.bfloat16)
    hidden = batch.hidden.requires_grad_()
    rows = int((batch.labels[:, 1:] != -100).sum())
    workspace = workspace_bytes()
    logps = simpo_ext.linear_token_logps(
        hidden, batch.weight, batch.labels, num_valid_tokens=rows, logits_budget_bytes=UNLIMITED
    )
    peak = peak_bytes(lambda: torch.autograd.grad(logps.sum(), hidden))
    # All logits are kept, so the backward gathers no hidden states. Beside the sum, it holds a
    # chunk of dlogits, and later dhidden.
    allowed = max(rows * CHUNK * 2, hidden.numel() * 2) + rows * 4096 * 4
    assert peak <= allowed + workspace + 4 * MIB
    assert rows * 4096 * 2 / 3 > 4 * MIB  # A product would be larger than the slack.


def test_repetition_changes_no_bit() -> None:
    batch = make_linear_batch(dtype=torch.bfloat16)
    first = loss_and_grads(batch)
    for _ in range(3):
        again = loss_and_grads(batch)
        assert torch.equal(again.loss, first.loss)
        for ours, theirs in zip(again.gradients, first.gradients, strict=True):
            assert torch.equal(ours, theirs)
