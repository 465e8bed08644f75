"""Sharded vocabularies in a single process: PyTorch's own checks, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from simpo_ext import linear_token_logps, token_logps
from simpo_ext.distributed import (
    VocabShard,
    vocab_parallel_linear_token_logps,
    vocab_parallel_token_logps,
)
from support.batches import DTYPES, make_batch
from support.comparisons import assert_same
from support.linear_batches import OPS, make_linear_batch
from support.vocab_batches import token_options

pytestmark = pytest.mark.kernels

OPTIONS = token_options()


class Beside:
    """Collectives of a rank among others, whose tensors are given."""

    def __init__(self, before: list[Tensor], after: list[Tensor], of_others: Tensor | int = 0):
        self._before, self._after, self._of_others = before, after, of_others
        self.gathered: list[Tensor] = []
        self.reduced: list[Tensor] = []

    def gather(self, tensor: Tensor) -> Tensor:
        self.gathered.append(tensor)
        return torch.stack([*self._before, tensor, *self._after])

    def reduce(self, tensor: Tensor) -> Tensor:
        self.reduced.append(tensor)
        return tensor + self._of_others

    def shard(self, first_label: int, vocab_size: int) -> VocabShard:
        return VocabShard(first_label, vocab_size, self.gather, self.reduce)


ALONE = Beside([], [])


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "logit_scale": 0.8}, {"shift": False}])
def test_gradcheck_of_a_shard_beside_others(options: dict[str, Any]) -> None:
    logits, labels = make_batch(time=6, vocabulary=8, dtype=torch.float64)
    ops = token_options(**options)
    parts = {a: logits[..., a:b].contiguous() for a, b in ((0, 3), (3, 6), (6, 8))}
    stats = {a: OPS.token_logps_shard(part, labels, a, 8, *ops) for a, part in parts.items()}
    shard = Beside([stats[0]], [stats[6]]).shard(3, 8)

    def function(part: Tensor) -> Tensor:
        return vocab_parallel_token_logps(part, labels, shard, **options)

    assert torch.autograd.gradcheck(function, parts[3].requires_grad_())
    assert_same(function(parts[3].detach()), function(parts[3]).detach())


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}, {"logits_budget_bytes": 0}])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_of_lm_head_in_shards(bias: bool, options: dict[str, Any]) -> None:
    batch = make_linear_batch(time=6, vocabulary=8, width=3, dtype=torch.float64, bias=bias)
    hidden, weight, labels, offset = batch.leaves((False, True, True))
    ops = token_options(softcap=options.get("softcap"))
    valid = int((labels[:, 1:] >= 0).sum())

    def stats_of(a: int, b: int) -> Tensor:
        args = hidden, weight[a:b].detach(), None if offset is None else offset[a:b].detach()
        stats, _ = OPS.linear_token_logps_shard(*args, labels, a, 8, *ops, 0, valid)
        return stats

    shard = Beside([stats_of(0, 3)], [stats_of(6, 8)]).shard(3, 8)
    inputs = [x[3:6].detach().requires_grad_() for x in (weight, offset) if x is not None]
    assert torch.autograd.gradcheck(
        lambda w, b=None: vocab_parallel_linear_token_logps(
            hidden, w, labels, shard, bias=b, **options
        ),
        inputs,
    )


def test_gradcheck_of_hidden_states_of_a_shard_that_has_all_labels() -> None:
    batch = make_linear_batch(time=6, vocabulary=8, width=3, dtype=torch.float64).leaves()
    shard = ALONE.shard(0, 8)
    assert torch.autograd.gradcheck(
        lambda h, w, b: vocab_parallel_linear_token_logps(h, w, batch.labels, shard, bias=b),
        batch.inputs(),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_collectives_get_small_tensors_and_their_results_are_used(dtype: torch.dtype) -> None:
    hidden, weight, labels, _ = make_linear_batch(dtype=dtype, vocabulary=50, width=5).leaves()
    compute = torch.promote_types(dtype, torch.float32)
    rows = int((labels[:, 1:] >= 0).sum())
    beside = Beside([], [], torch.ones((), dtype=compute))
    logps = vocab_parallel_linear_token_logps(hidden, weight, labels, beside.shard(0, 50))
    (stats,) = beside.gathered
    assert (stats.shape, stats.dtype) == ((3, rows), torch.float64)
    logps.sum().backward()
    (sums,) = beside.reduced
    assert (sums.shape, sums.dtype) == ((rows, 5), compute)
    valid = torch.nn.functional.pad(labels[:, 1:] >= 0, (0, 1))
    assert hidden.grad is not None
    assert_same(hidden.grad[valid], (sums + 1).to(dtype))
    assert not hidden.grad[~valid].any()

    # The backward reduces nothing if only the weight needs a gradient, and nothing for logits.
    frozen = vocab_parallel_linear_token_logps(hidden.detach(), weight, labels, beside.shard(0, 50))
    frozen.sum().backward()
    logits = torch.randn(*labels.shape, 50).to(dtype).requires_grad_()
    vocab_parallel_token_logps(logits, labels, beside.shard(0, 50)).sum().backward()
    assert len(beside.gathered) == 3
    assert beside.gathered[2].shape == (3, *labels.shape)
    assert len(beside.reduced) == 1


def test_a_single_shard_has_the_bits_of_the_whole_vocabulary() -> None:
    for dtype in DTYPES:
        logits, labels = make_batch(dtype=dtype)
        leaves = [logits.clone().requires_grad_() for _ in range(2)]
        ours = vocab_parallel_token_logps(leaves[0], labels, ALONE.shard(0, 50), softcap=9.0)
        theirs = token_logps(leaves[1], labels, softcap=9.0)
        assert_same(ours, theirs)
        for logps in (ours, theirs):
            logps.sum().backward()
        assert_same(leaves[0].grad, leaves[1].grad)


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_inputs(
    pytestconfig: pytest.Config,
) -> None:
    batch = make_linear_batch()
    grads = []
    for function in (
        lambda *args, **kw: vocab_parallel_linear_token_logps(*args, ALONE.shard(0, 50), **kw),
        linear_token_logps,
    ):
        leaf = batch.leaves()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logps = function(leaf.hidden, leaf.weight, leaf.labels, bias=leaf.bias)
        logps.sum().backward()
        grads.append([logps.detach(), *(x.grad for x in leaf.inputs())])
    if pytestconfig.getoption("--kernels") != "cpu":
        # The CUDA ops round the product of a single chunk to bfloat16 before they add the label's
        # share. The ops of a shard do not.
        of_shard, of_all = (each.pop(1) for each in grads)
        tolerance = 2.0**-7 * of_all.abs().max().item()
        torch.testing.assert_close(of_shard, of_all, rtol=0.0, atol=tolerance)
    assert_same(*grads)


def test_an_in_place_backward_overwrites_the_logits_once() -> None:
    logits, labels = make_batch()
    leaf = logits.clone().requires_grad_()
    want = torch.autograd.grad(token_logps(leaf, labels).sum(), leaf)[0]
    computed = leaf * 1.0
    shard = ALONE.shard(0, 50)
    logps = vocab_parallel_token_logps(computed, labels, shard, inplace_backward=True)
    logps.sum().backward(retain_graph=True)
    assert_same(leaf.grad, want)
    assert_same(computed.detach(), want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()
    with pytest.raises(ValueError, match="inplace_backward: expected logits computed"):
        vocab_parallel_token_logps(leaf, labels, shard, inplace_backward=True)


def test_double_backward_and_gradients_of_statistics_are_refused() -> None:
    logits, labels = make_batch()
    leaf = logits.clone().requires_grad_()
    logps = vocab_parallel_token_logps(leaf, labels, ALONE.shard(0, 50))
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(logps.sum(), leaf, create_graph=True)
    stats = OPS.token_logps_shard(leaf, labels, 0, 50, *OPTIONS)
    with pytest.raises(RuntimeError, match="ops for a sharded vocabulary have no gradients"):
        stats.sum().backward()


# ---- opcheck -------------------------------------------------------------------------------------


# The other checks compare outputs, and do not take NaN for equal.
WITH_NAN = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("columns", [0, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_the_ops_from_logits(dtype: torch.dtype, columns: int) -> None:
    logits, labels = make_batch(dtype=dtype)
    labels = labels.where(labels < 0, 10 + labels % 20)
    part, options = logits[..., 10 : 10 + columns], (10, 50, *OPTIONS)
    checks: Any = "ALL" if columns else WITH_NAN
    opcheck = torch.library.opcheck
    opcheck(OPS.token_logps_shard.default, (part, labels, *options), test_utils=checks)
    stats = OPS.token_logps_shard(part, labels, *options)
    merge = (stats[None], labels, *OPTIONS[:2], dtype == torch.float64)
    opcheck(OPS.token_logps_merge.default, merge, test_utils=checks)
    logps, *_ = OPS.token_logps_merge(*merge)
    rows = torch.zeros_like(logps), torch.full_like(logps, 1e6, dtype=torch.float64)
    backward = (torch.ones_like(logps), part.contiguous(), labels, *rows, *options)
    opcheck(OPS.token_logps_shard_backward.default, backward)
    opcheck(OPS.token_logps_shard_backward_.default, backward)


@pytest.mark.parametrize(
    ("dtype", "columns", "budget", "rows", "needs"),
    [
        (torch.float32, 128, 0, -1, (True, True, True)),
        (torch.bfloat16, 4099, 2**24, 30, (True, True, True)),  # two chunks, kept
        (torch.float64, 0, 2**24, 30, (True, True, True)),
        (torch.float16, 50, 2**24, 30, (True, False, False)),
        (torch.float32, 50, 0, 30, (False, True, False)),
        (torch.float32, 50, 0, 30, (False, False, True)),
    ],
)
def test_opcheck_of_the_ops_from_hidden_states(
    dtype: torch.dtype, columns: int, budget: int, rows: int, needs: tuple[bool, bool, bool]
) -> None:
    hidden, weight, labels, bias = make_linear_batch(vocabulary=5000, width=4, dtype=dtype)
    assert bias is not None
    labels = labels.where(labels < 0, labels % max(columns, 1))
    args, part = (hidden, weight[:columns], bias[:columns], labels), (0, 5000, *OPTIONS)
    checks: Any = "ALL" if columns else WITH_NAN
    opcheck = torch.library.opcheck
    forward = (*args, *part, budget, rows)
    opcheck(OPS.linear_token_logps_shard.default, forward, test_utils=checks)
    stats, kept = OPS.linear_token_logps_shard(*forward)
    merge = (stats[None], labels, *OPTIONS[:2], dtype == torch.float64)
    opcheck(OPS.linear_token_logps_merge.default, merge, test_utils=checks)
    logps, *sums = OPS.linear_token_logps_merge(*merge)
    backward = (torch.ones_like(logps), *args, *sums, kept, *part, *needs)
    opcheck(OPS.linear_token_logps_shard_backward.default, backward)
    dhidden, _, _ = OPS.linear_token_logps_shard_backward(*backward)
    if needs[0]:
        scatter = (dhidden, hidden, labels, *OPTIONS[:2])
        opcheck(OPS.linear_token_logps_dhidden.default, scatter)


# ---- compile -------------------------------------------------------------------------------------

# Dynamo's own use of autograd.Function warns.
of_dynamo = pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function'> should not be instantiated:DeprecationWarning"
)


@of_dynamo
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.cpu_only
def test_compiles_without_graph_break(dynamic: bool) -> None:
    shard = VocabShard(0, 50, lambda x: x[None], lambda x: x * 1.0)

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight)
        logps = vocab_parallel_linear_token_logps(hidden * 2, weight, labels, shard)
        return vocab_parallel_token_logps(logits, labels, shard).sum() + logps.square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for time in (8, 6):
        results = []
        for call in (loss, compiled):
            hidden, weight, labels, _ = make_linear_batch(time=time).leaves()
            value = call(hidden, weight, labels)
            value.backward()
            results.append([value.detach(), hidden.grad, weight.grad])
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


# ---- errors --------------------------------------------------------------------------------------


def test_invalid_shards_are_refused() -> None:
    def same(x: Tensor) -> Tensor:
        return x

    for wrong, error, message in (
        ((-1, 50), ValueError, r"first_label: expected an int in \[0, 2\^63\), got -1"),
        ((0.0, 50), TypeError, "first_label: expected an int, got float"),
        ((0, 0), ValueError, "vocab_size: expected 1 or more, got 0"),
        ((51, 50), ValueError, r"expected labels within \[0, 50\), got 0 labels from 51 on"),
    ):
        with pytest.raises(error, match=message):
            VocabShard(*wrong, same, same)
    with pytest.raises(TypeError, match="all_reduce: expected a callable, got NoneType"):
        VocabShard(0, 50, same, None)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"expected labels within \[0, 50\), got 21 labels from 30 on"
    ):
        VocabShard(30, 50, same, same, 21)
    with pytest.raises(RuntimeError, match=r"expected torch\.distributed to be initialised"):
        VocabShard.of_group(5)


def test_arguments_that_do_not_match_are_refused() -> None:
    logits, labels = make_batch()
    hidden, weight, labels, bias = make_linear_batch()
    shard = ALONE.shard(20, 50)
    with pytest.raises(
        TypeError, match=r"shard: expected a VocabShard with a plain tensor for logits .* NoneType"
    ):
        vocab_parallel_token_logps(logits, labels)
    with pytest.raises(
        TypeError, match=r"shard: expected a VocabShard with a plain tensor for weight .* int"
    ):
        vocab_parallel_linear_token_logps(hidden, weight, labels, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"within \[0, 50\), got 50 labels from 20 on"):
        vocab_parallel_token_logps(logits, labels, shard)
    sized = VocabShard(20, 50, ALONE.gather, ALONE.reduce, 29)
    with pytest.raises(ValueError, match=r"logits of 29 labels, .* got 30"):
        vocab_parallel_linear_token_logps(hidden, weight[20:], labels, sized)
    with pytest.raises(ValueError, match=r"bias: expected shape \[30\]"):
        vocab_parallel_linear_token_logps(hidden, weight[20:], labels, shard, bias=bias)
    with pytest.raises(ValueError, match=r"labels: expected shape \[4, 8\]"):
        vocab_parallel_token_logps(logits[..., 20:], labels[:, 1:], shard)
    unstacked = VocabShard(0, 50, lambda x: x, lambda x: x)
    with pytest.raises(ValueError, match=r"all_gather: expected \[K, 3, 4, 8\], got \[3, 4, 8\]"):
        vocab_parallel_token_logps(logits, labels, unstacked)
    wrong = VocabShard(0, 50, lambda x: x[None], lambda x: x[None])
    leaf = hidden.clone().requires_grad_()
    logps = vocab_parallel_linear_token_logps(leaf, weight, labels, wrong)
    with pytest.raises(ValueError, match=r"all_reduce: expected \[\d+, 16\], got \[1, \d+, 16\]"):
        logps.sum().backward()


def test_ops_refuse_invalid_tensors() -> None:
    logits, labels = make_batch()
    with pytest.raises(RuntimeError, match="50 labels that start at first_label"):
        OPS.token_logps_shard(logits, labels, 1, 50, *OPTIONS)
    with pytest.raises(RuntimeError, match="50 labels that start at first_label"):
        OPS.token_logps_shard(logits, labels, -1, 50, *OPTIONS)
    stats = OPS.token_logps_shard(logits, labels, 0, 50, *OPTIONS)
    with pytest.raises(
        RuntimeError, match=r"shards: expected shape \[K, 3, B, T\], got \[3, 4, 8\]"
    ):
        OPS.token_logps_merge(stats, labels, *OPTIONS[:2], False)
    with pytest.raises(RuntimeError, match=r"shards: expected shape \[1, 3, 4, 7\]"):
        OPS.token_logps_merge(stats[None], labels[:, 1:], *OPTIONS[:2], False)
    with pytest.raises(RuntimeError, match="shards: expected dtype Double, got Float"):
        OPS.token_logps_merge(stats[None].float(), labels, *OPTIONS[:2], False)
    hidden = torch.zeros(4, 8, 5)
    with pytest.raises(RuntimeError, match=r"dhidden_rows: expected shape \[30, 5\]"):
        OPS.linear_token_logps_dhidden(torch.zeros(30, 4), hidden, labels, *OPTIONS[:2])
    with pytest.raises(RuntimeError, match="dhidden_rows: expected dtype Float, got Double"):
        OPS.linear_token_logps_dhidden(
            torch.zeros(30, 5, dtype=torch.float64), hidden, labels, *OPTIONS[:2]
        )
