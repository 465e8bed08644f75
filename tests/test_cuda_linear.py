"""Hidden states and lm_head on a GPU: agreement with the CPU, graphs, waiting, memory.

What the kernels compute is tested by the tests marked ``kernels``, with --kernels=cuda.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import simpo_ext
from batches import DTYPES

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
UNLIMITED = 1 << 60


class LinearBatch(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor


def make_linear_batch(
    *,
    pairs: int = 2,
    time: int = 24,
    hidden: int = 64,
    vocabulary: int = 20003,  # three chunks, the last one narrower, rows that end anywhere
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


def loss_and_grads(batch: LinearBatch, **options: Any) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in (batch.hidden, batch.weight, batch.bias)]
    out = simpo_ext.linear_simpo_loss(*leaves[:2], batch.labels, bias=leaves[2], **options)
    return out.loss.detach(), *torch.autograd.grad(out.loss, leaves)


@pytest.mark.parametrize("budget", [0, UNLIMITED])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_and_cpu_agree(dtype: torch.dtype, budget: int) -> None:
    batch = make_linear_batch(dtype=dtype)
    want = loss_and_grads(LinearBatch(*(t.cpu() for t in batch)), sft_weight=0.3)
    got = loss_and_grads(batch, sft_weight=0.3, logits_budget_bytes=budget)
    # Of the largest entry: products of two libraries, each rounded to the dtype.
    tolerance = 1e-12 if dtype == torch.float64 else max(4 * torch.finfo(dtype).eps, 1e-5)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.device.type == DEVICE
        error = (ours.cpu().double() - theirs.double()).abs().max() / theirs.double().abs().max()
        assert error <= tolerance


def test_gradcheck_on_the_gpu() -> None:
    batch = make_linear_batch(pairs=1, time=4, hidden=3, vocabulary=9, dtype=torch.float64)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return simpo_ext.linear_simpo_loss(hidden, weight, batch.labels, bias=bias).loss

    leaves = [t.requires_grad_() for t in (batch.hidden, batch.weight, batch.bias)]
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
def test_nothing_waits_for_the_gpu_where_the_count_is_given(budget: int) -> None:
    batch = make_linear_batch()
    count = int((batch.labels[:, 1:] != -100).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        try:
            torch.cuda.set_sync_debug_mode("error")
            loss_and_grads(batch, num_valid_tokens=count, logits_budget_bytes=budget)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("extra", [None, 0, 5])
def test_a_captured_graph_replays_on_new_data(extra: int | None) -> None:
    # With a bound of the count, or without one: rows for every token then.
    def step(batch: LinearBatch) -> tuple[Tensor, ...]:
        bound = None if extra is None else int(most) + extra
        return loss_and_grads(batch, num_valid_tokens=bound, sft_weight=0.2)

    batches = [make_linear_batch(dtype=torch.bfloat16, seed=seed) for seed in range(3)]
    batches[1].labels[:, :12] = -100  # fewer tokens than in the capture
    most = max((batch.labels[:, 1:] != -100).sum() for batch in batches)
    static = LinearBatch(*(t.clone() for t in batches[0]))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # captures want a warm-up on a stream of their own
        step(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)

    for batch in batches[1:]:
        for destination, source in zip(static, batch, strict=True):
            destination.copy_(source)
        graph.replay()
        for ours, theirs in zip(captured, step(batch), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2.0**-7, atol=1e-6)


def test_tokens_beyond_the_bound_are_nan() -> None:
    batch = make_linear_batch()
    count = int((batch.labels[:, 1:] != -100).sum())
    logps = simpo_ext.linear_token_logps(
        batch.hidden, batch.weight, batch.labels, num_valid_tokens=count - 3
    )
    assert int(logps.isnan().sum()) == 3


def test_a_label_out_of_range_is_nan_and_no_fault() -> None:
    batch = make_linear_batch()
    batch.labels[1, 20] = 2**62
    loss, dhidden, dweight, _ = loss_and_grads(batch)
    assert loss.isnan()
    assert dhidden.isnan().any()
    assert dweight.isnan().any()
    torch.cuda.synchronize()


@pytest.mark.parametrize("budget", [0, UNLIMITED])
def test_peak_memory_is_the_gradients_and_the_logits_allowed(budget: int) -> None:
    batch = make_linear_batch(time=256, hidden=256, vocabulary=65536, dtype=torch.bfloat16)
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    rows = int((batch.labels[:, 1:] != -100).sum())
    chunk = rows * 8192 * 2
    logits = rows * 65536 * 2 if budget else 0
    gradients = (hidden.numel() + weight.numel()) * 2
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = simpo_ext.linear_simpo_loss(
        hidden, weight, batch.labels, logits_budget_bytes=budget, num_valid_tokens=rows
    ).loss
    torch.autograd.grad(loss, (hidden, weight))
    peak = torch.cuda.max_memory_allocated() - before
    rows_bytes = rows * 256 * (2 + 2 + 4)
    assert peak < 1.05 * (gradients + logits + chunk + rows_bytes)


def test_repetition_changes_no_bit() -> None:
    batch = make_linear_batch(dtype=torch.bfloat16)
    first = loss_and_grads(batch)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(loss_and_grads(batch), first, strict=True))
