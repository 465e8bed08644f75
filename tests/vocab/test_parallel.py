"""Vocabulary-parallel log-probabilities on the ranks of a gloo group equal those of one rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from simpo_ext import (
    linear_simpo_loss,
    linear_token_logps,
    sequence_logps,
    simpo_loss,
    token_logps,
)
from simpo_ext.distributed import (
    VocabShard,
    vocab_parallel_linear_token_logps,
    vocab_parallel_token_logps,
)
from support.batches import Batch, make_batch
from support.comparisons import assert_same
from support.linear_batches import LinearBatch, make_linear_batch, upstream_of
from support.ranks import run_on_ranks

# Shards of a vocabulary of 50, by the number of ranks. The sizes differ, and one shard is empty.
CUTS = {1: (0, 50), 2: (0, 23, 50), 4: (0, 20, 20, 49, 50)}


def batches(dtype: torch.dtype = torch.float32, vocabulary: int = 50) -> tuple[Batch, LinearBatch]:
    """Batches with labels at both ends of every shard."""
    batch = make_batch(vocabulary=vocabulary, dtype=dtype)
    linear = make_linear_batch(vocabulary=vocabulary, dtype=dtype, width=5)
    for labels in (batch.labels, linear.labels):
        scored = labels >= 0
        ends = torch.tensor([0, 19, 20, 22, 23, 48, 49])[: max(vocabulary - 43, 1)]
        count = int(scored.sum())
        labels[scored] = ends[torch.arange(count) % len(ends)]
    return batch, linear


def results_of(
    from_logits: Callable[[Tensor, Tensor], Tensor],
    from_hidden: Callable[..., Tensor],
    batch: Batch,
    linear: LinearBatch,
) -> dict[str, Tensor]:
    """Both functions' log-probabilities, and the gradients of all inputs."""
    upstream = upstream_of(batch.labels).float()
    logits = batch.logits.requires_grad_()
    logps = from_logits(logits, batch.labels)
    logps.backward(upstream.to(logps.dtype))
    linear_logps = from_hidden(linear.hidden, linear.weight, linear.labels, bias=linear.bias)
    linear_logps.backward(upstream.to(logps.dtype))
    assert linear.bias is not None
    results = {
        "logps": logps.detach(),
        "linear_logps": linear_logps.detach(),
        "logits": logits.grad,
        "hidden": linear.hidden.grad,
        "weight": linear.weight.grad,
        "bias": linear.bias.grad,
    }
    return {name: tensor for name, tensor in results.items() if tensor is not None}


def expected(dtype: torch.dtype = torch.float32, vocabulary: int = 50) -> dict[str, Tensor]:
    batch, linear = batches(dtype, vocabulary)
    return results_of(token_logps, linear_token_logps, batch, linear.leaves())


SHARDED = {"logits": -1, "weight": 0, "bias": 0}


def check(results: Sequence[dict[str, Tensor]], dtype: torch.dtype = torch.float32) -> None:
    """Replicated results have the same bits on all ranks. All results match those of one rank."""
    want = expected(dtype)
    for name, tensor in want.items():
        parts = [result[name] for result in results]
        if name in SHARDED:
            got = torch.cat(parts, SHARDED[name])
        else:
            got = parts[0]
            for part in parts:
                assert_same(part, got)
        bound = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(got, tensor, rtol=bound, atol=bound)


# ---- shards --------------------------------------------------------------------------------------


def my_shard(cuts: Sequence[int]) -> tuple[int, int, VocabShard]:
    rank = dist.get_rank()
    first, end = cuts[rank], cuts[rank + 1]
    return first, end, VocabShard.of_group(end - first, vocab_size=cuts[-1])


def on_shards(
    cuts: Sequence[int], dtype: torch.dtype, backend: str | None
) -> tuple[dict[str, Tensor], tuple[int, int, int | None]]:
    first, end, shard = my_shard(cuts)
    batch, linear = batches(dtype)
    assert linear.bias is not None

    def from_logits(logits: Tensor, labels: Tensor) -> Tensor:
        return vocab_parallel_token_logps(logits, labels, shard)

    def from_hidden(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor) -> Tensor:
        return vocab_parallel_linear_token_logps(hidden * 1, weight, labels, shard, bias=bias)

    functions: list[Callable[..., Tensor]] = [from_logits, from_hidden]
    if backend is not None:
        functions = [compiled(function, backend) for function in functions]
    part = linear._replace(weight=linear.weight[first:end], bias=linear.bias[first:end])
    logits = batch.logits[..., first:end].detach()
    results = results_of(functions[0], functions[1], Batch(logits, batch.labels), part.leaves())
    return results, (shard.first_label, shard.vocab_size, shard.size)


def compiled(function: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    # Dynamo's own use of autograd.Function warns.
    warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_with_shards_match_one_rank(world_size: int, dtype: torch.dtype) -> None:
    cuts = CUTS[world_size]
    results = run_on_ranks(world_size, on_shards, cuts, dtype, None)
    check([result for result, _ in results], dtype)
    assert [shard for _, shard in results] == [
        (cuts[rank], 50, cuts[rank + 1] - cuts[rank]) for rank in range(world_size)
    ]


def test_compiles_with_its_collectives() -> None:
    results = run_on_ranks(2, on_shards, CUTS[2], torch.float32, "aot_eager")
    check([result for result, _ in results])


# ---- collectives ---------------------------------------------------------------------------------


def calls_of_collectives() -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    first, end, shard = my_shard(CUTS[2])
    batch, linear = batches(torch.bfloat16)
    calls: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def counted(name: str, collective: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(tensor: Tensor) -> Tensor:
            calls.append((name, tuple(tensor.shape), tensor.dtype))
            return collective(tensor)

        return call

    shard = VocabShard(
        first, 50, counted("gather", shard.all_gather), counted("reduce", shard.all_reduce)
    )
    logits = batch.logits[..., first:end].detach().requires_grad_()
    logps = vocab_parallel_token_logps(logits, batch.labels, shard)
    calls.append(("backward", (), logps.dtype))
    logps.sum().backward()
    leaf = linear._replace(weight=linear.weight[first:end], bias=None).leaves()
    logps = vocab_parallel_linear_token_logps(*leaf[:3], shard)
    calls.append(("backward", (), logps.dtype))
    logps.sum().backward()
    return calls


def test_collectives_of_forward_and_backward() -> None:
    labels = batches()[1].labels
    rows = int((labels[:, 1:] >= 0).sum())
    for calls in run_on_ranks(2, calls_of_collectives):
        assert calls == [
            ("gather", (3, *labels.shape), torch.float64),
            ("backward", (), torch.float32),
            ("gather", (3, rows), torch.float64),
            ("backward", (), torch.float32),
            ("reduce", (rows, 5), torch.float32),
        ]


# ---- DTensors ------------------------------------------------------------------------------------


def on_dtensors(vocabulary: int, sharded_batch: bool, backend: str | None) -> dict[str, Any]:
    from torch.distributed.tensor import (
        Partial,
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )

    batch, linear = batches(vocabulary=vocabulary)
    assert linear.bias is not None
    if sharded_batch:
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
        rows: list[Any] = [Shard(0), Replicate()]
        of_logits: list[Any] = [Shard(0), Shard(2)]
        of_weight: list[Any] = [Replicate(), Shard(0)]
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        rows, of_logits, of_weight = [Replicate()], [Shard(2)], [Shard(0)]
    logits = distribute_tensor(batch.logits, mesh, of_logits)
    labels = distribute_tensor(batch.labels, mesh, rows)
    leaf = LinearBatch(
        distribute_tensor(linear.hidden, mesh, rows).requires_grad_(),
        distribute_tensor(linear.weight, mesh, of_weight).requires_grad_(),
        distribute_tensor(linear.labels, mesh, rows),
        distribute_tensor(linear.bias, mesh, of_weight).requires_grad_(),
    )
    functions: list[Callable[..., Tensor]] = [
        vocab_parallel_token_logps,
        vocab_parallel_linear_token_logps,
    ]
    if backend is not None:
        functions = [compiled(function, backend) for function in functions]
    logits = logits.requires_grad_()
    upstream = distribute_tensor(upstream_of(batch.labels).float(), mesh, rows).to_local()
    logps = functions[0](logits, labels)
    logps.backward(upstream)
    linear_logps = functions[1](*leaf[:3], bias=leaf.bias)
    linear_logps.backward(upstream)
    assert type(logps) is type(linear_logps) is Tensor
    gradients: dict[str, Any] = {
        "logits": logits.grad,
        "hidden": leaf.hidden.grad,
        "weight": leaf.weight.grad,
        "bias": None if leaf.bias is None else leaf.bias.grad,
    }
    partial = [Partial() if sharded_batch else of_weight[0], *of_weight[1:]]
    placements = {"logits": of_logits, "hidden": rows, "weight": partial, "bias": partial}
    for name, gradient in gradients.items():
        # Older versions of torch return gradients of uneven shards replicated.
        if vocabulary % mesh.size(mesh.ndim - 1) == 0 or torch.__version__ >= "2.13":
            assert gradient.placements == tuple(placements[name]), name
    results = {name: gradient.full_tensor() for name, gradient in gradients.items()}
    return {"logps": logps.detach(), "linear_logps": linear_logps.detach(), **results}


# Of 49 entries over 4 ranks, the last has fewer. Of 5 over 4, the last has none.
@pytest.mark.parametrize(
    ("world_size", "vocabulary", "sharded_batch", "backend"),
    [
        (2, 50, False, None),
        (4, 49, False, None),
        (4, 5, False, None),
        (4, 50, True, None),
        (2, 49, False, "aot_eager"),
    ],
)
def test_dtensors_match_one_rank(
    world_size: int, vocabulary: int, sharded_batch: bool, backend: str | None
) -> None:
    results = run_on_ranks(world_size, on_dtensors, vocabulary, sharded_batch, backend)
    for name, tensor in expected(vocabulary=vocabulary).items():
        for rank, result in enumerate(results):
            want = tensor
            if sharded_batch and name.endswith("logps"):
                want = tensor.chunk(2)[rank // 2]
            torch.testing.assert_close(result[name], want, rtol=2e-6, atol=2e-6)


def errors_of_dtensors() -> list[str]:
    from torch.distributed.tensor import (
        DTensor,
        Partial,
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    batch, linear = batches(vocabulary=48)
    logits, labels = batch
    hidden, weight, _, bias = linear
    assert bias is not None

    def dtensor(tensor: Tensor, *placements: Any) -> DTensor:
        return distribute_tensor(tensor, mesh, placements)

    sharded = dtensor(logits, Replicate(), Shard(2))
    head = dtensor(weight, Replicate(), Shard(0))
    partial = DTensor.from_local(weight, mesh, [Partial(), Shard(0)])
    strided = DTensor.from_local(
        weight[:12], mesh, [_StridedShard(0, split_factor=2), Shard(0)], run_check=False
    )
    shard = VocabShard(0, 48, lambda x: x[None], lambda x: x)
    functions: list[Callable[[], Any]] = [
        lambda: vocab_parallel_token_logps(dtensor(logits, Shard(2), Shard(2)), labels),
        lambda: vocab_parallel_token_logps(dtensor(logits, Replicate(), Shard(0)), labels),
        lambda: vocab_parallel_token_logps(dtensor(logits, Shard(1), Shard(2)), labels),
        lambda: vocab_parallel_token_logps(sharded, labels, shard),
        lambda: vocab_parallel_token_logps(sharded, dtensor(labels, Shard(0), Replicate())),
        lambda: vocab_parallel_token_logps(logits, dtensor(labels, Shard(0), Replicate()), shard),
        lambda: vocab_parallel_linear_token_logps(hidden, partial, labels),
        lambda: vocab_parallel_linear_token_logps(hidden, strided, labels),
        lambda: vocab_parallel_linear_token_logps(
            hidden, dtensor(weight, Shard(1), Shard(0)), labels
        ),
        lambda: vocab_parallel_linear_token_logps(
            dtensor(hidden, Replicate(), Shard(1)), head, labels
        ),
        lambda: vocab_parallel_linear_token_logps(
            hidden, head, labels, bias=dtensor(bias, Replicate(), Replicate())
        ),
        # These functions take no DTensors.
        lambda: token_logps(sharded, labels),
        lambda: sequence_logps(logits, dtensor(labels, Replicate(), Replicate())),
        lambda: simpo_loss(sharded, labels),
        lambda: linear_simpo_loss(hidden, head, labels),
    ]
    messages = []
    for function in functions:
        try:
            function()
        except (TypeError, ValueError) as error:
            messages.append(f"{type(error).__name__}: {error}")
        else:
            messages.append("no error")
    # Beside plain shards, a replicated DTensor counts as its local tensor.
    everywhere = dtensor(labels, Replicate(), Replicate())
    assert_same(
        vocab_parallel_token_logps(logits, everywhere, shard),
        vocab_parallel_token_logps(logits, labels, shard),
    )
    return messages


def test_invalid_layouts_of_dtensors_are_refused() -> None:
    plain = "TypeError: {}: expected a plain torch.Tensor, got a DTensor"
    parts = [
        "ValueError: logits: expected the vocabulary, dimension 2, to be sharded over one mesh",
        "ValueError: logits: expected the vocabulary, dimension 2, to be sharded over one mesh",
        "ValueError: logits: expected to be replicated over the mesh dimension that shards the",
        "ValueError: shard: expected None with a DTensor for logits",
        "ValueError: labels: expected placements [Replicate(), Replicate()] over the mesh of",
        "ValueError: labels: expected a plain tensor or a replicated DTensor",
        "ValueError: weight: expected Shard and Replicate placements, got placements [Partial",
        "ValueError: weight: expected Shard and Replicate placements, got placements [_Strided",
        "ValueError: weight: expected Shard(0) over one mesh dimension and Replicate over others",
        "ValueError: hidden: expected to be replicated over the mesh dimension that shards the",
        "ValueError: bias: expected the layout of weight",
        plain.format("logits"),
        plain.format("labels"),
        plain.format("logits"),
        plain.format("weight"),
    ]
    for messages in run_on_ranks(4, errors_of_dtensors):
        for message, part in zip(messages, parts, strict=True):
            assert message.startswith(part), message


# ---- ranks that disagree -------------------------------------------------------------------------


def disagreements() -> list[str]:
    rank = dist.get_rank()
    batch, linear = batches()
    shard = VocabShard.of_group(25)
    first = 25 * rank
    logits, weight = batch.logits[..., first : first + 25], linear.weight[first : first + 25]
    fewer = linear.labels.clone()
    fewer[0] = -100
    functions: list[Callable[[], Any]] = [
        lambda: VocabShard.of_group(25, vocab_size=51 if rank else None),
        lambda: VocabShard.of_group(0),
        lambda: vocab_parallel_token_logps(
            logits[:, : 8 - rank], batch.labels[:, : 8 - rank], shard
        ),
        lambda: vocab_parallel_linear_token_logps(
            linear.hidden, weight, fewer if rank else linear.labels, shard
        ),
    ]
    messages = []
    for function in functions:
        try:
            function()
        except ValueError as error:
            messages.append(str(error))
    # Labels of equal shape are not compared. A token with different labels on the ranks is NaN.
    labels = batch.labels if rank else (49 - batch.labels).where(batch.labels >= 0, -100)
    messages.append(str(vocab_parallel_token_logps(logits, labels, shard).isnan().any().item()))
    return messages


def test_ranks_that_disagree_raise_errors() -> None:
    count = int((batches()[1].labels[:, 1:] >= 0).sum())
    fewer = int((batches()[1].labels[1:, 1:] >= 0).sum())
    for messages in run_on_ranks(2, disagreements):
        assert messages == [
            "shard_size: expected the sizes of all ranks to add up to vocab_size, at least 1, got "
            "[25, 25] with the sum 50 and vocab_size [None, 51]",
            "shard_size: expected the sizes of all ranks to add up to vocab_size, at least 1, got "
            "[0, 0] with the sum 0 and vocab_size [None, None]",
            "labels: expected the same B sequences of T tokens on every rank of the group, got "
            "[4, 8] on rank 0, [4, 7] on rank 1",
            "labels: expected the same R scored tokens on every rank of the group, got "
            f"[{count}] on rank 0, [{fewer}] on rank 1",
            "True",
        ]
