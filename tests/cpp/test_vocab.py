"""The C++ functions for a sharded vocabulary: the same bits as in Python."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import simpo_ext
from simpo_ext.distributed import (
    VocabShard,
    vocab_parallel_linear_token_logps,
    vocab_parallel_token_logps,
)
from support.batches import make_batch
from support.builds import WITHOUT_DEBUG_INFO, build, needs_libtorch, run
from support.paths import ROOT

PROGRAM = ROOT / "tests" / "cpp" / "vocab_shards"
# The same as in vocab_shards/main.cpp.
CUTS = (0, 20, 20, 60)
OPTION_TABLE: list[dict[str, Any]] = [{}, {"shift": False, "logit_scale": 0.5, "softcap": 20.0}]


class Ranks:
    """Threads of this process that exchange tensors."""

    def __init__(self, count: int) -> None:
        self._places: list[Tensor] = [torch.empty(0)] * count
        self._barrier = threading.Barrier(count, timeout=30)

    def shard(self, rank: int) -> VocabShard:
        def exchange(tensor: Tensor) -> Tensor:
            self._places[rank] = tensor
            self._barrier.wait()
            stacked = torch.stack(self._places)
            self._barrier.wait()
            return stacked

        return VocabShard(CUTS[rank], CUTS[-1], exchange, lambda tensor: exchange(tensor).sum(0))


def results_of(batch: list[Tensor], shard: VocabShard, end: int, **options: Any) -> list[Tensor]:
    logits, labels, hidden, weight, bias, upstream = batch
    part = slice(shard.first_label, end)
    inputs = [logits[..., part], hidden, weight[part], bias[part]]
    logits, hidden, weight, bias = (x.detach().clone().requires_grad_() for x in inputs)
    logps = vocab_parallel_token_logps(logits, labels, shard, **options)
    logps.backward(upstream)
    vocab_parallel_token_logps(logits, labels, shard, **options)  # where C++ checks in place
    linear_logps = vocab_parallel_linear_token_logps(
        hidden, weight, labels, shard, bias=bias, **options
    )
    linear_logps.backward(upstream)
    gradients = [x.grad for x in (hidden, weight, bias)]
    return [logps.detach(), logits.grad, linear_logps.detach(), *gradients]


def on_threads(batch: list[Tensor], **options: Any) -> list[list[Tensor]]:
    """results_of on all ranks at the same time."""
    count = len(CUTS) - 1
    ranks, results = Ranks(count), [[torch.empty(0)]] * count

    def work(rank: int) -> None:
        results[rank] = results_of(batch, ranks.shard(rank), CUTS[rank + 1], **options)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.cpu_only
@needs_libtorch
def test_a_program_with_collectives_by_hand_gets_python_s_numbers(tmp_path: Path) -> None:
    prefixes = f"{torch.utils.cmake_prefix_path};{simpo_ext.cmake_prefix_path()}"
    build(PROGRAM, tmp_path / "build", *WITHOUT_DEBUG_INFO, f"-DCMAKE_PREFIX_PATH={prefixes}")
    logits, labels = make_batch(pairs=3, vocabulary=60)
    batch = [logits, labels, torch.randn(*labels.shape, 5), torch.randn(60, 5), torch.randn(60)]
    batch.append(torch.randn(labels.shape))
    torch.save(batch, tmp_path / "batch.pt")
    program = tmp_path / "build" / "vocab_shards"
    assert run(program, tmp_path / "batch.pt", tmp_path / "results.pt").strip() == "ok"

    # weights_only refuses the lists that C++ writes. This file is our own.
    results = torch.load(tmp_path / "results.pt", weights_only=False)
    expected: list[Tensor] = []
    for options in OPTION_TABLE:
        of_ranks = on_threads(batch, **options)
        assert len({tuple(logps.flatten().tolist()) for logps, *_ in of_ranks}) == 1
        for of_rank in of_ranks:
            expected += of_rank
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
