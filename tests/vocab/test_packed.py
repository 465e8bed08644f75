"""Packed sequences with a sharded vocabulary give the results of one rank."""

from __future__ import annotations

import pytest
import torch

from simpo_ext import simpo_loss, simpo_loss_from_token_logps, token_logps
from simpo_ext.distributed import (
    VocabShard,
    vocab_parallel_linear_token_logps,
    vocab_parallel_token_logps,
)
from support.packed_batches import make_packed
from support.ranks import run_on_ranks

# The ranks' processes always run the CPU kernels.
pytestmark = pytest.mark.cpu_only

CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def of_logits(rank: int, ranks: int) -> None:
    packed = make_packed(dtype=torch.float64)
    vocabulary = packed.logits.shape[1]
    begin, end = (vocabulary * r // ranks for r in (rank, rank + 1))
    part = packed.logits[:, begin:end].clone().requires_grad_()
    shard = VocabShard.of_group(end - begin)
    layout = {"cu_seqlens": packed.cu_seqlens}
    logps = vocab_parallel_token_logps(part, packed.labels, shard, **layout)
    assert logps.shape == packed.labels.shape
    with_row = vocab_parallel_token_logps(part[None], packed.labels[None], shard, **layout)
    assert torch.equal(with_row, logps[None])
    out = simpo_loss_from_token_logps(logps, packed.labels, **layout)
    out.loss.backward()

    whole = packed.logits.clone().requires_grad_()
    want = simpo_loss(whole, packed.labels, **layout)
    want.loss.backward()
    torch.testing.assert_close(out.loss, want.loss, **CLOSE)
    torch.testing.assert_close(part.grad, whole.grad[:, begin:end], **CLOSE)


def of_hidden(rank: int, ranks: int) -> None:
    packed = make_packed(dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(packed.labels), 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(packed.logits.shape[1], 5, generator=generator, dtype=torch.float64)
    begin, end = (len(weight) * r // ranks for r in (rank, rank + 1))
    x, part = hidden.clone().requires_grad_(), weight[begin:end].clone().requires_grad_()
    shard = VocabShard.of_group(end - begin)
    layout = {"cu_seqlens": packed.cu_seqlens}
    logps = vocab_parallel_linear_token_logps(x, part, packed.labels, shard, **layout)
    assert logps.shape == packed.labels.shape
    logps.sum().backward()

    whole_x, whole = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    want = token_logps(whole_x @ whole.T, packed.labels, **layout)
    want.sum().backward()
    torch.testing.assert_close(logps, want, **CLOSE)
    torch.testing.assert_close(x.grad, whole_x.grad, **CLOSE)
    torch.testing.assert_close(part.grad, whole.grad[begin:end], **CLOSE)


@pytest.mark.parametrize("ranks", [1, 2])
def test_packed_logits(ranks: int) -> None:
    run_on_ranks(ranks, on_this_rank, "logits")


@pytest.mark.parametrize("ranks", [1, 2])
def test_packed_hidden_states(ranks: int) -> None:
    run_on_ranks(ranks, on_this_rank, "hidden")


def on_this_rank(of: str) -> None:
    place = torch.distributed.get_rank(), torch.distributed.get_world_size()
    {"logits": of_logits, "hidden": of_hidden}[of](*place)
