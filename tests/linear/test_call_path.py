"""linear_token_logps keeps and computes what budget, count and requested gradients need.

The results do not depend on that, nor on checkpoints and other features of autograd.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from simpo_ext import linear_simpo_loss, linear_token_logps
from support.batches import DTYPES
from support.comparisons import assert_same
from support.linear_batches import (
    CHUNK,
    OPS,
    UNLIMITED,
    LinearBatch,
    Watcher,
    logps_and_gradients,
    logps_op,
    make_linear_batch,
    watched_logps,
)

pytestmark = pytest.mark.kernels

# Four chunks on a CPU and two on CUDA. None is full, and the last is the shortest.
FOUR = 3 * CHUNK + 5
NEEDS = [needs for needs in itertools.product((True, False), repeat=3) if any(needs)]
ALL = (True, True, True)


def bytes_of_a_chunk(batch: LinearBatch, num_valid_tokens: int = -1) -> int:
    """The size of one chunk of logits for this number of tokens."""
    kept = logps_op(batch, UNLIMITED, num_valid_tokens)[3]
    return kept[0].numel() * kept.element_size()


def valid_tokens(batch: LinearBatch) -> int:
    return int((batch.labels[:, 1:] != -100).sum())


def loss_of(batch: LinearBatch, **options: Any) -> Tensor:
    return linear_simpo_loss(*batch[:3], bias=batch.bias, **options).loss


def gradients_of_the_loss(batch: LinearBatch, **options: Any) -> list[Tensor]:
    leaf = batch.leaves()
    loss_of(leaf, **options).backward()
    return [x.grad for x in leaf.inputs()]


# ---- kept logits ---------------------------------------------------------------------------------


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("vocabulary", "chunks", "width"),
    [(1, 1, 64), (64, 1, 64), (131, 1, 192), (4096, 1, 4096), (4097, 2, 2112), (8192, 2, 4096),
     (8193, 3, 2752), (FOUR, 4, 3136), (32000, 8, 4032)],
)  # fmt: skip
def test_all_chunks_have_the_width_of_an_even_split(
    vocabulary: int, chunks: int, width: int
) -> None:
    batch = make_linear_batch(pairs=1, time=3, vocabulary=vocabulary, width=2)
    kept = logps_op(batch, UNLIMITED)[3]
    assert kept.shape == (chunks, batch.labels.numel(), width)
    assert bytes_of_a_chunk(batch) == 6 * width * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_valid_tokens", [-1, 24, 32, 40])
def test_chunks_are_kept_as_the_budget_allows(num_valid_tokens: int, dtype: torch.dtype) -> None:
    batch = make_linear_batch(vocabulary=FOUR, width=3, dtype=dtype)
    rows = batch.labels.numel() if num_valid_tokens == -1 else num_valid_tokens
    assert rows >= valid_tokens(batch)
    all_kept = logps_op(batch, UNLIMITED, num_valid_tokens)[3]
    chunks, size = len(all_kept), bytes_of_a_chunk(batch, num_valid_tokens)
    assert chunks >= 2
    budgets = {0: 0, size: 0, 2 * size - 1: 0, 2 * size: 1, chunks * size: chunks - 1,
               (chunks + 1) * size - 1: chunks - 1, (chunks + 1) * size: chunks,
               2**63 - 1: chunks}  # fmt: skip
    for budget, kept in budgets.items():
        logps, row_max, sum_exp, kept_logits = logps_op(batch, budget, num_valid_tokens)
        assert logps.shape == batch.labels.shape
        assert row_max.shape == sum_exp.shape == (rows,)
        assert logps.dtype == row_max.dtype == torch.promote_types(dtype, torch.float32)
        assert sum_exp.dtype == torch.float64
        assert kept_logits.shape == (kept, *all_kept.shape[1:]), budget
        assert kept_logits.dtype == dtype
        assert_same(logps, logps_op(batch, 0, num_valid_tokens)[0])


def test_an_op_without_rows_keeps_no_logits() -> None:
    batch = make_linear_batch(vocabulary=FOUR, width=3)
    batch.labels.fill_(-100)
    logps, row_max, sum_exp, kept = logps_op(batch, UNLIMITED, 0)
    assert not logps.any()
    assert row_max.shape == sum_exp.shape == (0,)
    assert kept.numel() == 0


@pytest.mark.parametrize("options", [{}, {"softcap": 9.0, "logit_scale": 1.3}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_budget_changes_no_bit(dtype: torch.dtype, bias: bool, options: Any) -> None:
    batch = make_linear_batch(vocabulary=FOUR, width=8, dtype=dtype, bias=bias)
    want = logps_and_gradients(linear_token_logps, batch, logits_budget_bytes=0, **options)
    size = bytes_of_a_chunk(batch)
    # These keep some chunks, or all of them, for the valid rows or for all rows.
    for budget in (2 * size, 3 * size, 4 * size, UNLIMITED, None):
        got = logps_and_gradients(linear_token_logps, batch, logits_budget_bytes=budget, **options)
        assert_same(got, want)


def kept_by(watcher: Watcher) -> int:
    """The number of chunks that the only call of the op kept."""
    return len(watcher.named("linear_token_logps")[1][3])


def test_the_function_passes_the_budget_and_keeps_logits_only_for_a_backward() -> None:
    leaf = make_linear_batch(vocabulary=FOUR, width=3).leaves()
    count = len(logps_op(leaf, UNLIMITED)[3])
    _, watcher = watched_logps(leaf, logits_budget_bytes=UNLIMITED)
    assert kept_by(watcher) == count
    _, watcher = watched_logps(leaf)  # The default budget is larger than this batch's logits.
    assert kept_by(watcher) == count
    _, watcher = watched_logps(leaf, logits_budget_bytes=0)
    assert kept_by(watcher) == 0
    with torch.no_grad():
        _, watcher = watched_logps(leaf, logits_budget_bytes=UNLIMITED)
    assert kept_by(watcher) == 0
    frozen = leaf.leaves((False, False, False))
    logps, watcher = watched_logps(frozen, logits_budget_bytes=UNLIMITED)
    assert kept_by(watcher) == 0
    assert not logps.requires_grad
    for needs in NEEDS:
        _, watcher = watched_logps(leaf.leaves(needs), logits_budget_bytes=UNLIMITED)
        assert kept_by(watcher) == count, needs


def test_the_loss_passes_the_budget() -> None:
    leaf = make_linear_batch(vocabulary=FOUR, width=3).leaves()
    for budget, some in ((0, False), (UNLIMITED, True)):
        with Watcher() as watcher:
            loss_of(leaf, logits_budget_bytes=budget)
        assert (kept_by(watcher) > 0) == some


# ---- requested gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, UNLIMITED])
@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_requested_gradients_have_the_same_bits(
    needs: tuple[bool, bool, bool], budget: int
) -> None:
    batch = make_linear_batch(vocabulary=FOUR, width=8)
    want = logps_and_gradients(linear_token_logps, batch, logits_budget_bytes=budget)
    with Watcher() as watcher:
        got = logps_and_gradients(linear_token_logps, batch, needs, logits_budget_bytes=budget)
    assert_same(got[0], want[0])
    for ours, theirs, needed in zip(got[1:], want[1:], needs, strict=True):
        assert_same(ours, theirs if needed else None)
    args, results = watcher.named("linear_token_logps_backward")
    assert args[-3:] == needs
    for result, leaf, needed in zip(results, batch.inputs(), needs, strict=True):
        assert result.shape == (leaf.shape if needed else (0,))
        assert result.dtype == leaf.dtype


@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_the_loss_computes_only_requested_gradients(needs: tuple[bool, bool, bool]) -> None:
    batch = make_linear_batch(vocabulary=131)
    want = gradients_of_the_loss(batch)
    leaf = batch.leaves(needs)
    loss_of(leaf).backward()
    got = [x.grad for x in leaf.inputs()]
    assert_same(got, [x if needed else None for x, needed in zip(want, needs, strict=True)])


def test_without_a_bias_its_gradient_is_not_requested() -> None:
    batch = make_linear_batch(bias=False)
    with Watcher() as watcher:
        logps_and_gradients(linear_token_logps, batch)
    args, results = watcher.named("linear_token_logps_backward")
    assert args[-3:] == (True, True, False)
    assert results[2].shape == (0,)


@pytest.mark.parametrize("inputs", [["hidden"], ["weight"], ["bias"], ["weight", "bias"]])
def test_a_gradient_of_some_leaves_has_the_same_bits(inputs: list[str]) -> None:
    batch = make_linear_batch(vocabulary=131)
    want = dict(zip(("hidden", "weight", "bias"), gradients_of_the_loss(batch), strict=True))
    leaf = batch.leaves()
    got = torch.autograd.grad(loss_of(leaf), [getattr(leaf, name) for name in inputs])
    assert_same(got, tuple(want[name] for name in inputs))


# ---- num_valid_tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, UNLIMITED])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_given_count_changes_only_the_order_of_sums(dtype: torch.dtype, budget: int) -> None:
    batch = make_linear_batch(vocabulary=FOUR, width=8, dtype=dtype)
    want = logps_and_gradients(linear_token_logps, batch, logits_budget_bytes=budget)
    exact = valid_tokens(batch)
    options: dict[str, Any] = {"logits_budget_bytes": budget, "num_valid_tokens": exact}
    assert_same(logps_and_gradients(linear_token_logps, batch, **options)[0], want[0])
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    for count in (exact, exact + 1, batch.labels.numel(), batch.labels.numel() + 33):
        options["num_valid_tokens"] = count
        for got, other in zip(
            logps_and_gradients(linear_token_logps, batch, **options), want, strict=True
        ):
            assert got is not None and other is not None
            error = (got.double() - other.double()).abs().max()
            assert error <= tolerance * max(1.0, other.abs().max().item())


@pytest.mark.cpu_only
@pytest.mark.parametrize("short", [1, 23])
@pytest.mark.parametrize("function", [linear_token_logps, linear_simpo_loss])
def test_a_count_that_is_too_small_is_an_error(function: Any, short: int) -> None:
    batch = make_linear_batch()
    there = valid_tokens(batch)
    with pytest.raises(ValueError, match=rf"num_valid_tokens: .*\b{there}\b.*\b{there - short}\b"):
        function(*batch[:3], num_valid_tokens=there - short)


def test_the_count_depends_on_the_shift() -> None:
    batch = make_linear_batch()
    batch.labels[:, 0] = 3  # Scored only if not shifted.
    count = valid_tokens(batch)
    logps = linear_token_logps(*batch[:3], num_valid_tokens=count)
    assert_same(logps, linear_token_logps(*batch[:3]))
    logps = linear_token_logps(*batch[:3], shift=False, num_valid_tokens=count + 4)
    assert_same(logps, linear_token_logps(*batch[:3], shift=False))


# ---- autograd features ---------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("budget", [0, UNLIMITED])
def test_a_checkpoint_gives_the_same_gradients(budget: int, reentrant: bool) -> None:
    batch = make_linear_batch(vocabulary=FOUR, width=3)
    want = gradients_of_the_loss(batch)
    leaf = batch.leaves()

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        again = LinearBatch(hidden, weight, batch.labels, bias)
        return loss_of(again, logits_budget_bytes=budget)

    checkpoint(loss, *leaf.inputs(), use_reentrant=reentrant).backward()
    assert_same([x.grad for x in leaf.inputs()], want)


# A backward that overwrote the kept logits would make a second one wrong.
@pytest.mark.parametrize("budget", [0, 1, 2, UNLIMITED])
def test_a_graph_that_is_retained_runs_again(budget: int) -> None:
    batch = make_linear_batch(vocabulary=FOUR, width=3)
    size = bytes_of_a_chunk(batch)
    leaf = batch.leaves()
    loss = loss_of(leaf, logits_budget_bytes=budget if budget > 2 else (budget + 1) * size)
    first = torch.autograd.grad(loss, leaf.inputs(), retain_graph=True)
    second = torch.autograd.grad(loss, leaf.inputs(), retain_graph=True)
    assert_same(second, first)
    assert_same(torch.autograd.grad(loss, leaf.inputs()), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaf.inputs())


def test_the_backward_op_changes_none_of_its_arguments() -> None:
    batch = make_linear_batch(vocabulary=FOUR, width=3)
    with Watcher() as watcher:
        logps_and_gradients(linear_token_logps, batch, logits_budget_bytes=UNLIMITED)
    args, want = watcher.named("linear_token_logps_backward")
    copies = [x.clone() if isinstance(x, Tensor) else x for x in args]
    assert_same(OPS.linear_token_logps_backward(*copies), want)
    assert_same(copies, list(args))


@pytest.mark.parametrize("expanded", [True, False])
def test_layout_of_the_incoming_gradient_changes_no_bit(expanded: bool) -> None:
    leaf = make_linear_batch(vocabulary=131, dtype=torch.float64).leaves()
    logps = linear_token_logps(*leaf[:3], bias=leaf.bias)
    upstream = torch.rand(*logps.shape, 2, dtype=torch.float64)[..., 1]
    upstream = upstream[:1, :1].expand_as(logps) if expanded else upstream
    got = torch.autograd.grad(logps, leaf.inputs(), upstream, retain_graph=True)
    assert_same(got, torch.autograd.grad(logps, leaf.inputs(), upstream.contiguous()))


def test_hooks_see_and_change_gradients() -> None:
    batch = make_linear_batch()
    want = gradients_of_the_loss(batch)
    leaf = batch.leaves()
    hidden, seen = leaf.hidden * 1, []
    hidden.register_hook(seen.append)
    loss = loss_of(leaf._replace(hidden=hidden))
    loss.register_hook(lambda grad: grad * 2)
    loss.backward()
    assert_same(leaf.hidden.grad, 2 * want[0])
    assert_same(seen, [2 * want[0]])


DERIVATIVES: list[Callable[[LinearBatch], Tensor]] = [
    lambda batch: loss_of(batch),
    lambda batch: linear_token_logps(*batch[:3], bias=batch.bias).sum(),
    lambda batch: linear_token_logps(*batch[:3], bias=batch.bias).square().sum(),
]


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("function", DERIVATIVES, ids=["loss", "logps", "squares"])
def test_double_backward_fails(function: Callable[[LinearBatch], Tensor], which: int) -> None:
    leaf = make_linear_batch().leaves()
    scale = torch.ones((), requires_grad=True)
    scaled = LinearBatch(leaf.hidden * scale, leaf.weight * scale, leaf.labels, leaf.bias)
    with pytest.raises(RuntimeError, match=r"double backward|differentiate twice"):
        torch.autograd.grad(function(scaled), leaf.inputs()[which], create_graph=True)[
            0
        ].sum().backward()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_forward_mode_fails_instead_of_losing_the_tangent(which: int) -> None:
    batch = make_linear_batch()

    def logps(x: Tensor) -> Tensor:
        inputs = batch.inputs()
        inputs[which] = x
        return linear_token_logps(*inputs[:2], batch.labels, bias=inputs[2])

    x = batch.inputs()[which]
    with pytest.raises(NotImplementedError, match=r"jvp|forward"):
        torch.func.jvp(logps, (x,), (x,))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_gives_the_same_values(context: Callable[[], Any]) -> None:
    batch = make_linear_batch(vocabulary=FOUR, width=3)
    leaf = batch.leaves()
    want = tuple(linear_simpo_loss(*leaf[:3], bias=leaf.bias))
    with context():
        got = tuple(linear_simpo_loss(*leaf[:3], bias=leaf.bias))
    assert_same([x.clone() for x in got], [x.detach() for x in want])
    assert not any(x.requires_grad for x in got)
    assert all(x.is_inference() == (context is torch.inference_mode) for x in got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repetition_changes_no_bit(dtype: torch.dtype) -> None:
    batch = make_linear_batch(pairs=4, time=64, vocabulary=FOUR, width=32, dtype=dtype)
    first = logps_and_gradients(linear_token_logps, batch)
    for _ in range(3):
        assert_same(logps_and_gradients(linear_token_logps, batch), first)
