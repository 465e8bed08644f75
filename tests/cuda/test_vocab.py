"""A sharded vocabulary on a GPU: agreement with the CPU, synchronization, graphs.

The tests marked ``kernels`` test the kernels' results with --kernels=cuda.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from simpo_ext.distributed import (
    VocabShard,
    vocab_parallel_linear_token_logps,
    vocab_parallel_token_logps,
)
from support.batches import DTYPES, make_batch
from support.float64_checks import exact_float32_products  # noqa: F401
from support.linear_batches import LinearBatch, make_linear_batch, upstream_of
from support.vocab_batches import in_shards, linear_in_shards, token_options

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_float32_products")]
DEVICE = "cuda"
# Large and small rows, an empty shard, and one of several chunks.
CUTS = (0, 1000, 1000, 18_001, 20_003)


def moved(batch: LinearBatch) -> LinearBatch:
    return LinearBatch(*(None if x is None else x.to(DEVICE) for x in batch))


def check_close(got: Sequence[Tensor], want: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Compares relative to the largest entry or 1, since products are summed in other orders."""
    tolerance = 1e-12 if dtype == torch.float64 else max(4 * torch.finfo(dtype).eps, 1e-5)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.device.type == DEVICE
        expected = theirs.cpu().double()
        error = (ours.cpu().double() - expected).abs().max()
        assert error <= tolerance * max(expected.abs().max(), 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_and_cpu_agree(dtype: torch.dtype) -> None:
    batch = make_batch(pairs=1, vocabulary=20_003, dtype=dtype)
    linear = make_linear_batch(pairs=1, vocabulary=20_003, dtype=dtype)
    upstream, options = upstream_of(batch.labels).float(), token_options(softcap=20.0)
    want = in_shards(batch, upstream, options, CUTS)
    want += linear_in_shards(linear, upstream, options, CUTS)
    got = in_shards(
        batch._replace(logits=batch.logits.to(DEVICE), labels=batch.labels.to(DEVICE)),
        upstream.to(DEVICE),
        options,
        CUTS,
    )
    got += linear_in_shards(moved(linear), upstream.to(DEVICE), options, CUTS)
    # Without max and sum_exp of the linear ops, which have rows for all tokens on a GPU.
    check_close(got[:5] + got[7:], want[:5] + want[7:], dtype)


def step(logits: Tensor, batch: LinearBatch, count: int) -> tuple[Tensor, ...]:
    """Both functions with one shard, and all gradients."""
    shard = VocabShard(0, 20_003, lambda x: x[None].clone(), lambda x: x * 1)
    leaf = batch.leaves()
    logits = logits.detach().clone().requires_grad_()
    logps = vocab_parallel_token_logps(logits, batch.labels, shard)
    linear_logps = vocab_parallel_linear_token_logps(
        *leaf[:3], shard, bias=leaf.bias, num_valid_tokens=count
    )
    loss = logps.sum() + linear_logps.square().sum()
    return loss.detach(), *torch.autograd.grad(loss, [logits, *leaf.inputs()])


def inputs(seed: int) -> tuple[Tensor, LinearBatch]:
    batch: Any = make_linear_batch(pairs=1, vocabulary=20_003, seed=seed)
    logits = make_batch(pairs=1, vocabulary=20_003, seed=seed).logits
    return logits.to(DEVICE), moved(batch)


def test_the_host_does_not_wait_for_the_gpu_if_the_count_is_given() -> None:
    logits, batch = inputs(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The mode is a prototype.
        try:
            torch.cuda.set_sync_debug_mode("error")
            step(logits, batch, 16)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_replays_on_new_data() -> None:
    logits, batch = inputs(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # A capture needs a warm-up on a side stream.
        step(logits, batch, 16)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(logits, batch, 16)
    for seed in (0, 1):
        new_logits, new_batch = inputs(seed)
        logits.copy_(new_logits)
        for ours, theirs in zip(batch, new_batch, strict=True):
            assert ours is not None and theirs is not None
            ours.copy_(theirs)
        graph.replay()
        # In a graph, cuBLAS may have another workspace, and then split products differently.
        check_close(captured, step(new_logits, new_batch, 16), torch.float32)
