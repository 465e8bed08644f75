"""The default of logits_budget_bytes is a share of the GPU's memory. The tests need no GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import simpo_ext
from simpo_ext._ops import logits_plan
from simpo_ext._ops.logits_plan import DEFAULT_LOGITS_BUDGET_BYTES, default_logits_budget
from simpo_ext.distributed import VocabShard, vocab_parallel_linear_token_logps
from support.linear_batches import LinearBatch, Watcher, make_linear_batch

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
MEMORY = 150_121_545_727  # not a multiple of 16

Function = Callable[..., Tensor]


def of_whole_vocabulary(batch: LinearBatch, **options: Any) -> Tensor:
    options |= {"bias": batch.bias, "shift": False}
    return simpo_ext.linear_token_logps(*batch[:3], **options)


def of_shards(batch: LinearBatch, **options: Any) -> Tensor:
    shard = VocabShard(0, len(batch.weight), lambda x: x[None].clone(), lambda x: x * 1)
    options |= {"bias": batch.bias, "shift": False}
    return vocab_parallel_linear_token_logps(*batch[:3], shard, **options)


def budget_passed(function: Function, batch: LinearBatch, **options: Any) -> int:
    """The budget that the op receives."""
    with Watcher() as watcher:
        function(batch, **options)
    (_, arguments, _) = watcher.calls[0]
    budget: int = arguments[-2]
    return budget


def test_the_default_is_a_sixteenth_of_the_gpu_s_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def properties(device: torch.device) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(total_memory=MEMORY + device.index)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    second = torch.device("cuda", 1)
    for device in (GPU, second, CPU, torch.device("meta")):
        assert default_logits_budget(device) == DEFAULT_LOGITS_BUDGET_BYTES == 2**30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in (CPU, torch.device("meta")):
        assert default_logits_budget(device) == 2**30
    assert not asked
    assert default_logits_budget(GPU) == MEMORY // 16
    assert default_logits_budget(second) == (MEMORY + 1) // 16
    assert asked == [GPU, second]


@pytest.mark.parametrize("function", [of_whole_vocabulary, of_shards])
def test_the_ops_get_the_default_of_their_device(
    monkeypatch: pytest.MonkeyPatch, function: Function
) -> None:
    leaf = make_linear_batch().leaves()
    assert budget_passed(function, leaf) == DEFAULT_LOGITS_BUDGET_BYTES
    defaults = {CPU: 12_345}
    monkeypatch.setattr(logits_plan, "default_logits_budget", defaults.__getitem__)
    assert budget_passed(function, leaf) == 12_345
    assert budget_passed(function, leaf, logits_budget_bytes=0) == 0
    assert budget_passed(function, leaf, logits_budget_bytes=5) == 5
    assert budget_passed(function, leaf.leaves((False, False, False))) == 0
    with torch.no_grad():
        assert budget_passed(function, leaf) == 0


@pytest.mark.parametrize("memory", [None, MEMORY])
def test_the_default_is_a_constant_in_a_compiled_graph(
    monkeypatch: pytest.MonkeyPatch, memory: int | None
) -> None:
    if memory is not None:  # Otherwise Dynamo must trace the query of torch.
        monkeypatch.setattr(logits_plan, "_gpu_memory", lambda device: memory)
    elif torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(GPU).total_memory
    factors: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        factors.extend(node.args[1] for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    x = torch.ones(3, dtype=torch.int64)
    compiled = torch.compile(
        lambda x: x * default_logits_budget(GPU), fullgraph=True, backend=backend
    )
    budget = 2**30 if memory is None else memory // 16
    assert compiled(x).tolist() == [budget] * 3
    assert factors == [budget]


def test_a_function_of_gpu_tensors_compiles_without_graph_break() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(of_whole_vocabulary, fullgraph=True, backend=backend)
    # A torch without CUDA can neither slice nor differentiate fake tensors on a GPU.
    with FakeTensorMode(), torch.no_grad():
        logps = compiled(
            LinearBatch(*(torch.empty_like(x, device=GPU) for x in make_linear_batch()))
        )
    assert logps.device == GPU
    (graph,) = graphs
    assert sum("linear_token_logps" in str(node.target) for node in graph.graph.nodes) == 1
