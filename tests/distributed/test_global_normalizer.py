"""global_normalizer computes one denominator for the micro-batches of all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from simpo_ext import PairCounts, count_pairs, simpo_loss
from simpo_ext.distributed.normalizer import global_normalizer
from support.packed_batches import PAIRS, Packed, make_packed
from support.ranks import run_on_ranks

# The ranks' processes always run the CPU kernels.
pytestmark = pytest.mark.cpu_only


def counts_of(pairs: float, tokens: float, dtype: torch.dtype = torch.float64) -> PairCounts:
    return PairCounts(torch.tensor(pairs, dtype=dtype), torch.tensor(tokens, dtype=dtype))


def as_numbers(counts: PairCounts) -> tuple[float, float]:
    assert isinstance(counts, PairCounts)
    assert all(value.shape == () and value.dtype == torch.float64 for value in counts)
    return counts.pairs.item(), counts.tokens.item()


@pytest.mark.parametrize("gradients", ["mean", "sum"])
def test_without_a_group_micro_batches_add_up(gradients: Any) -> None:
    several = [counts_of(3, 40), counts_of(0, 0), counts_of(2, 17)]
    for counts in (several, tuple(several), iter(several)):
        assert as_numbers(global_normalizer(counts, gradients=gradients)) == (5, 57)
    assert as_numbers(several[0]) == (3, 40)
    assert as_numbers(global_normalizer(several[0], gradients=gradients)) == (3, 40)
    assert as_numbers(global_normalizer(several[1], gradients=gradients)) == (1, 1)
    # float32 would round 2^24 + 1.
    large = [counts_of(2.0**24, 1, torch.float32), counts_of(1, 1, torch.int64)]
    assert as_numbers(global_normalizer(large)) == (2**24 + 1, 2)


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        (None, TypeError, r"counts: expected PairCounts, one or several, got NoneType"),
        (torch.ones(2), TypeError, r"counts: expected PairCounts, .* got Tensor"),
        ((torch.ones(()), torch.ones(())), TypeError, r"counts\[0\]: expected .* got Tensor"),
        ([counts_of(1, 1), (1, 1)], TypeError, r"counts\[1\]: expected PairCounts, got tuple"),
        (PairCounts(3, torch.ones(())), TypeError, r"counts\[0\].pairs: .* got int"),  # type: ignore[arg-type]
        (PairCounts(torch.ones(()), torch.ones(1)), ValueError, r"counts\[0\].tokens: .* \[1\]"),
        ([], ValueError, r"counts: expected at least one PairCounts, got none"),
        (
            [counts_of(1, 1), PairCounts(*torch.ones(2, device="meta"))],
            ValueError,
            r"counts\[1\].pairs: expected device cpu .* got meta",
        ),
    ],
    ids=str,
)
def test_invalid_counts_are_refused(counts: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        global_normalizer(counts)


def test_other_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gradients: expected one of 'mean', 'sum', got 'avg'"):
        global_normalizer(counts_of(1, 1), gradients="avg")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"group: expected .*ProcessGroup .* got str"):
        global_normalizer(counts_of(1, 1), group="dp")  # type: ignore[arg-type]


class Ops(TorchDispatchMode):
    """Records the names of the dispatched ops."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def normalizers_on_a_rank() -> list[Any]:
    rank = dist.get_rank()
    counts = [counts_of(rank, 10 * rank), counts_of(1, 2)]
    with Ops() as ops:
        whole = global_normalizer(counts)
    assert len([name for name in ops.names if name.startswith("c10d")]) == 1
    assert "aten::_local_scalar_dense" not in ops.names  # The host does not wait for a device.
    outer = dist.new_group([0, 2])
    if rank == 1:
        with pytest.raises(TypeError, match=r"group: expected .* that this rank is in"):
            global_normalizer(counts, group=outer)
        part = None
    else:
        part = as_numbers(global_normalizer(counts, group=outer))
    return [
        as_numbers(whole),
        as_numbers(global_normalizer(counts, gradients="sum")),
        as_numbers(global_normalizer(counts_of(0, 0))),
        part,
    ]


def test_the_ranks_of_a_group_add_up() -> None:
    third = pytest.approx(1 / 3, rel=1e-15)
    for rank, (mean, total, none, part) in enumerate(run_on_ranks(3, normalizers_on_a_rank)):
        assert mean == (2, 12)
        assert total == (6, 36)
        assert none == (third, third)
        assert part == (None if rank == 1 else (2, 12))


# The pairs of each rank. One rank has none, and pairs 4 and 5 are dropped.
SHARES = ((0, 1, 2, 4), (), (3, 5, 6))
OPTIONS: dict[str, Any] = {
    "sft_weight": 0.3,
    "sft_reduction": "token",
    "pair_weight": torch.tensor([0.5, 2.0, 1.0, -1.0, 3.0, 1.0, 0.25]),
}


def packed_pairs(which: Iterable[int], options: dict[str, Any]) -> tuple[Packed, dict[str, Any]]:
    """Packed sequences, and the options with these pairs and their weights."""
    packed = make_packed(dtype=torch.float64, before=1, after=2)
    rows = torch.tensor(list(which), dtype=torch.int64)
    options = {**options, "cu_seqlens": packed.cu_seqlens, "pairs": torch.tensor(PAIRS)[rows]}
    if "pair_weight" in options:
        options["pair_weight"] = options["pair_weight"][rows]
    return packed, options


def gradient_on_a_rank(gradients: Any, options: dict[str, Any]) -> Any:
    packed, options = packed_pairs(SHARES[dist.get_rank()], options)
    layout = {name: options[name] for name in ("cu_seqlens", "pairs")}
    normalizer = global_normalizer(count_pairs(packed.labels, **layout), gradients=gradients)
    leaf = packed.logits.requires_grad_()
    loss = simpo_loss(leaf, packed.labels, normalizer=normalizer, **options).loss
    loss.backward()
    for value in (leaf.grad, loss := loss.detach()):
        dist.all_reduce(value)
        if gradients == "mean":
            value /= dist.get_world_size()
    return loss, leaf.grad


@pytest.mark.parametrize("options", [{}, {"sft_weight": 0.3}, OPTIONS], ids=str)
@pytest.mark.parametrize("gradients", ["mean", "sum"])
def test_ranks_give_the_gradient_of_one_batch(gradients: Any, options: dict[str, Any]) -> None:
    packed, whole_options = packed_pairs(range(len(PAIRS)), options)
    leaf = packed.logits.requires_grad_()
    whole = simpo_loss(leaf, packed.labels, **whole_options).loss
    whole.backward()
    for loss, gradient in run_on_ranks(len(SHARES), gradient_on_a_rank, gradients, options):
        torch.testing.assert_close(loss, whole.detach(), rtol=1e-13, atol=0.0)
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=str)
def test_the_loss_keeps_its_dtype(options: dict[str, Any]) -> None:
    packed, options = packed_pairs(range(len(PAIRS)), options)
    layout = {name: options[name] for name in ("cu_seqlens", "pairs")}
    normalizer = global_normalizer(count_pairs(packed.labels, **layout))
    out = simpo_loss(packed.logits.float(), packed.labels, normalizer=normalizer, **options)
    assert out.loss.dtype == out.sft_loss.dtype == torch.float32
