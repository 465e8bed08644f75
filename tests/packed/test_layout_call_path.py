"""Packed sequences, pairs, weights and variants under PyTorch's own checks and transforms."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from simpo_ext import (
    LinearSimPOLoss,
    SimPOLoss,
    count_pairs,
    linear_simpo_loss,
    linear_token_logps,
    sequence_logps,
    simpo_loss,
    simpo_loss_from_logps,
    simpo_loss_from_token_logps,
    token_logps,
)
from support.batches import make_batch
from support.comparisons import DIFFERENTIABLE, assert_same, reduced_weights
from support.linear_batches import Watcher
from support.packed_batches import PAIRS, Packed, make_linear_packed, make_packed

pytestmark = pytest.mark.kernels

OPS = torch.ops.simpo_ext
PAIRED = torch.tensor(PAIRS)
WEIGHTS = torch.tensor([0.25, -1.5, 3.0, 0.0, 7.0, 0.0, 1.0], dtype=torch.float64)
# The ops' options by their names in the schemas.
NUMBERS: dict[str, Any] = dict(
    ignore_index=-100, shift=True, average_log_prob=True, beta=2.0, gamma_beta_ratio=0.5,
    loss_type=0, label_smoothing=0.1, alpha=0.2, sft_weight=0.2, sft_reduction=0, reduction=1,
    empty=0,
)  # fmt: skip


def layout_of(packed: Packed) -> dict[str, Any]:
    return {"cu_seqlens": packed.cu_seqlens, "pairs": PAIRED, "pair_weight": WEIGHTS}


# ---- the ops -------------------------------------------------------------------------------------


def op_arguments(op: Any, known: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of an op, in the order of its schema."""
    return tuple({**NUMBERS, **known}[argument.name] for argument in op.default._schema.arguments)


# Packed, pairs, weights, reduction.
LAYOUTS = [(True, True, True, 1), (True, False, False, 0), (False, True, False, 2),
           (False, False, True, 0), (False, True, True, 1)]  # fmt: skip


def op_inputs(flat: bool, pairs: bool, weights: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Token logps and labels of padded rows, or of one packed row with its targets."""
    # Every sequence has a token, since opcheck does not take NaN for equal.
    packed = make_packed((7, 4, 5, 2, 12, 2, 5, 9))
    labels, cu = packed.padded().labels, packed.cu_seqlens
    if flat:
        labels = OPS.sequence_targets(packed.labels[None], cu, 40, -100, True)
    return {
        "token_logps": -torch.rand(labels.shape, dtype=dtype),
        "labels": labels,
        "cu_seqlens": cu if flat else None,
        "shift": not flat,
        "pairs": PAIRED if pairs else None,
        "pair_weight": (WEIGHTS if pairs else WEIGHTS[:4]) if weights else None,
    }


@pytest.mark.parametrize("shift", [True, False])
def test_opcheck_of_the_targets_of_sequences(shift: bool) -> None:
    packed = make_packed(before=2, after=1)
    arguments = (packed.labels[None], packed.cu_seqlens, 40, -100, shift)
    torch.library.opcheck(OPS.sequence_targets.default, arguments)


@pytest.mark.parametrize(("flat", "dtype"), [(True, torch.float32), (False, torch.float64)])
def test_opcheck_of_the_sequence_ops(flat: bool, dtype: torch.dtype) -> None:
    known = op_inputs(flat, False, False, dtype)
    logps, counts = OPS.sequence_logps(*op_arguments(OPS.sequence_logps, known))
    backward = {**known, "grad_logps": logps, "counts": counts}
    torch.library.opcheck(
        OPS.sequence_logps_backward.default, op_arguments(OPS.sequence_logps_backward, backward)
    )
    known["token_logps"].requires_grad_()
    torch.library.opcheck(OPS.sequence_logps.default, op_arguments(OPS.sequence_logps, known))


@pytest.mark.parametrize(("flat", "pairs", "weights", "reduction"), LAYOUTS)
def test_opcheck_of_the_preference_ops(
    flat: bool, pairs: bool, weights: bool, reduction: int
) -> None:
    dtype = torch.float64 if reduction else torch.float32
    known = {**op_inputs(flat, pairs, weights, dtype), "reduction": reduction}
    out = OPS.preference_loss(*op_arguments(OPS.preference_loss, known))
    loss, losses, logps, _, sft_loss, _, slopes, counts = out
    saved = {**known, "slopes": slopes, "counts": counts}
    for grads in ((loss, losses, logps, sft_loss), (loss, None, None, None)):
        names = ("grad_loss", "grad_losses", "grad_logps", "grad_sft_loss")
        arguments = {**saved, **dict(zip(names, grads, strict=True))}
        torch.library.opcheck(
            OPS.preference_loss_backward.default,
            op_arguments(OPS.preference_loss_backward, arguments),
        )
    known["token_logps"].requires_grad_()
    torch.library.opcheck(OPS.preference_loss.default, op_arguments(OPS.preference_loss, known))


# ---- the fast path and the ops -------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"sft_weight": 0.3, "sft_reduction": "token", "normalizer": (3.0, 7.0)},
    {"reduction": "none", "sft_weight": 0.3, "loss_type": "ipo", "inplace_backward": True},
    {"alpha": 0.3, "average_log_prob": False, "reduction": "sum", "inplace_backward": True},
    {"empty": "nan", "loss_type": "hinge", "shift": False},
]


def scored(packed: Packed, **options: Any) -> tuple[Tensor, Any]:
    """A leaf, and the outputs for leaf * 1, which an in-place backward may overwrite."""
    leaf = packed.logits.clone().requires_grad_()
    return leaf, simpo_loss(leaf * 1, packed.labels, **layout_of(packed), **options)


def gradient(leaf: Tensor, out: Any, names: tuple[str, ...] = DIFFERENTIABLE) -> Tensor:
    outputs = [getattr(out, name) for name in names]
    return torch.autograd.grad(outputs, leaf, [reduced_weights(x) for x in outputs])[0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_both_paths_give_the_same_bits(options: dict[str, Any]) -> None:
    packed = make_packed(before=1, after=2)
    for names in (*((name,) for name in DIFFERENTIABLE), DIFFERENTIABLE):
        leaf, out = scored(packed, **options)
        with Watcher() as watcher:
            other, want = scored(packed, **options)
        assert {"token_logps", "preference_loss"} <= {name for name, _, _ in watcher.calls}
        assert_same(tuple(out), tuple(want))
        assert [x.requires_grad for x in out] == [x.requires_grad for x in want]
        assert_same(gradient(leaf, out, names), gradient(other, want, names))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext])
def test_evaluation_gives_the_same_values(context: Any) -> None:
    packed = make_packed(after=1)
    _, want = scored(packed)
    batch, in_linear = make_linear_packed(after=1)
    leaf = batch.leaves()
    want_linear = linear_simpo_loss(*leaf[:3], bias=leaf.bias, **layout_of(in_linear))
    with context():
        out = simpo_loss(*packed[:2], **layout_of(packed))
        linear = linear_simpo_loss(*batch[:3], bias=batch.bias, **layout_of(in_linear))
    for got, expected in ((out, want), (linear, want_linear)):
        assert_same([x.clone() for x in got], [x.detach() for x in expected])
        assert all(x.grad_fn is None and not x.requires_grad for x in got)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_checkpoint_gives_the_same_gradients(inplace: bool) -> None:
    packed = make_packed(before=1)
    leaf, out = scored(packed)
    (want,) = torch.autograd.grad(out.loss, leaf)
    leaf = packed.logits.clone().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        layout = {**layout_of(packed), "inplace_backward": inplace}
        return simpo_loss(x * 1, packed.labels, **layout).loss

    checkpoint(loss, leaf, use_reentrant=False).backward()
    assert_same(leaf.grad, want)


def test_a_graph_that_is_retained_runs_again() -> None:
    leaf, out = scored(make_packed(before=1))
    out.loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    out.loss.backward()
    assert_same(leaf.grad, 2 * once)


def test_second_backward_in_place_and_double_backward_fail() -> None:
    leaf, out = scored(make_packed(), inplace_backward=True)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()
    leaf, out = scored(make_packed())
    with pytest.raises(RuntimeError, match=r"double backward|differentiate twice"):
        torch.autograd.grad(out.loss, leaf, create_graph=True)[0].sum().backward()


def test_weights_may_change_after_the_forward() -> None:
    packed, results = make_packed(), []
    for spoil in (False, True):
        layout = {**layout_of(packed), "pair_weight": WEIGHTS.float()}
        leaf = packed.logits.clone().requires_grad_()
        out = simpo_loss(leaf, packed.labels, **layout)
        if spoil:
            layout["pair_weight"].fill_(9.0)
        out.loss.backward()
        results.append(leaf.grad)
    assert_same(*results)


# ---- gradcheck -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [*OPTIONS[:2], {"alpha": 0.2, "reduction": "sum"}], ids=str)
@pytest.mark.parametrize("rank", [2, 3])
def test_gradcheck_of_simpo_loss(rank: int, options: dict[str, Any]) -> None:
    packed = make_packed((4, 0, 3, 1, 3, 2, 2), 5, dtype=torch.float64, before=1, after=1)
    packed.logits[packed.padding()] = 0.0
    logits, labels = packed.logits, packed.labels
    if rank == 3:
        logits, labels = logits[None], labels[None]
    layout = layout_of(packed)
    assert torch.autograd.gradcheck(
        lambda x: simpo_loss(x, labels, **layout, **options).loss, logits.requires_grad_()
    )


@pytest.mark.parametrize("function", [token_logps, sequence_logps])
def test_gradcheck_of_logps(function: Callable[..., Tensor]) -> None:
    packed = make_packed((4, 1, 0, 5), 5, dtype=torch.float64)
    kept = [0, 3]  # The others have no tokens, so their logps are NaN.

    def logps(x: Tensor) -> Tensor:
        result = function(x, packed.labels, cu_seqlens=packed.cu_seqlens)
        return result[kept] if function is sequence_logps else result

    assert torch.autograd.gradcheck(logps, packed.logits.requires_grad_())


def test_gradcheck_of_linear_simpo_loss() -> None:
    batch, packed = make_linear_packed((4, 0, 3, 1, 3, 2, 2), 5, 3, dtype=torch.float64)
    layout = layout_of(packed)
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: (
            linear_simpo_loss(
                hidden, weight, batch.labels, bias=bias, sft_weight=0.2, alpha=0.1, **layout
            ).loss
        ),
        batch.leaves().inputs(),
    )


@pytest.mark.parametrize("options", [{"loss_type": "ipo"}, {"alpha": 0.4}, {"alpha": -1.0}])
def test_gradcheck_of_simpo_loss_from_logps(options: dict[str, Any]) -> None:
    chosen = torch.tensor([-1.0, -2.0, -0.3], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-1.5, -0.5, -3.0], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([0.5, -2.0, 3.0])
    assert torch.autograd.gradcheck(
        lambda c, r: simpo_loss_from_logps(c, r, pair_weight=weight, **options)[0],
        (chosen, rejected),
    )


# ---- compile, export, meta, autocast -------------------------------------------------------------


def assert_compiles(function: Callable[..., Tensor], *cases: tuple[Any, ...], **how: Any) -> None:
    """Compares values and gradients of the compiled function with the eager function's."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, **how)
    for inputs in cases:
        results = []
        for call in (function, compiled):
            leaves = [x.detach().clone() for x in inputs]
            leaves[0].requires_grad_()
            value = call(*leaves)
            value.sum().backward()
            results.append((value.detach(), leaves[0].grad))
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [
    {"inplace_backward": True, "sft_weight": 0.3, "sft_reduction": "token"},
    {"loss_type": "ipo", "alpha": 0.2, "reduction": "none"},
], ids=str)  # fmt: skip
@pytest.mark.cpu_only
def test_compiles_without_graph_break(options: dict[str, Any]) -> None:
    def loss(x: Tensor, y: Tensor, cu: Tensor, pairs: Tensor, weight: Tensor) -> Tensor:
        out = simpo_loss(x * 2, y, cu_seqlens=cu, pairs=pairs, pair_weight=weight, **options)
        return out.loss + 0.1 * out.losses.sum() + out.chosen_rewards.nansum()

    packed = make_packed(before=1, after=1)
    assert_compiles(loss, (*packed, PAIRED, WEIGHTS), backend="aot_eager")


@pytest.mark.cpu_only
def test_compiles_with_dynamic_numbers_of_sequences_and_pairs() -> None:
    def loss(x: Tensor, y: Tensor, cu: Tensor, pairs: Tensor, weight: Tensor) -> Tensor:
        layout = {"cu_seqlens": cu, "pairs": pairs}
        counts = count_pairs(y, **layout)
        logps = token_logps(x * 1, y, cu_seqlens=cu)
        out = simpo_loss(x, y, pair_weight=weight, normalizer=counts, **layout)
        again = simpo_loss_from_token_logps(logps, y, **layout)
        return out.loss + again.loss

    cases = []
    for lengths, pairs in (
        ((5, 3, 8), ((0, 1), (2, 1))),
        ((9, 3), ((0, 1), (1, 0), (0, 0), (0, 1))),
    ):
        packed = make_packed(lengths, 20)
        cases.append((*packed, torch.tensor(pairs), torch.rand(len(pairs)) + 0.5))
    assert_compiles(loss, *cases, backend="aot_eager", dynamic=True)


@pytest.mark.cpu_only
def test_the_linear_loss_compiles() -> None:
    batch, packed = make_linear_packed()

    def loss(hidden: Tensor, weight: Tensor, y: Tensor, cu: Tensor, pairs: Tensor) -> Tensor:
        logps = linear_token_logps(hidden, weight, y, cu_seqlens=cu)
        out = linear_simpo_loss(hidden * 2, weight, y, cu_seqlens=cu, pairs=pairs)
        return out.loss + logps.mean()

    assert_compiles(loss, (*batch[:3], packed.cu_seqlens, PAIRED), backend="aot_eager")


def test_the_module_exports() -> None:
    packed = make_packed()
    module = SimPOLoss(sft_weight=0.1, alpha=0.2)
    layout = layout_of(packed)
    exported = torch.export.export(module, tuple(packed[:2]), layout).module()
    assert_same(exported(*packed[:2], **layout).loss, module(*packed[:2], **layout).loss)


def test_meta_tensors_give_shapes_and_dtypes() -> None:
    packed = make_packed(dtype=torch.bfloat16)
    batch, _ = make_linear_packed(dtype=torch.bfloat16)
    layout = layout_of(packed)
    on_meta = {name: value.to("meta") for name, value in layout.items()}
    hidden, weight, labels, _ = (x.to("meta") for x in batch)
    for ours, expected in (
        (simpo_loss(hidden.new_empty(packed.logits.shape), labels, **on_meta),
         simpo_loss(*packed[:2], **layout)),
        (linear_simpo_loss(hidden, weight, labels, **on_meta),
         linear_simpo_loss(*batch[:3], **layout)),
    ):  # fmt: skip
        assert all(x.device.type == "meta" for x in ours)
        assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in expected]
    cu = on_meta["cu_seqlens"]
    logits = hidden.new_empty(packed.logits.shape)
    assert token_logps(logits, labels, cu_seqlens=cu).shape == labels.shape
    assert token_logps(logits[None], labels[None], cu_seqlens=cu).shape == (1, *labels.shape)
    assert sequence_logps(logits, labels, cu_seqlens=cu).shape == (len(cu) - 1,)


def test_autocast_casts_the_linear_layer_but_not_the_loss() -> None:
    batch, packed = make_linear_packed()
    layout = layout_of(packed)
    low = [x.bfloat16() for x in batch.inputs()]
    want = linear_simpo_loss(*low[:2], batch.labels, bias=low[2], **layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_simpo_loss(*batch[:3], bias=batch.bias, **layout)
        plain = simpo_loss(*packed[:2], **layout)
    assert_same(tuple(out), tuple(want))
    assert_same(tuple(plain), tuple(simpo_loss(*packed[:2], **layout)))
    assert out.loss.dtype == plain.loss.dtype == torch.float32


# ---- modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"alpha": 0.3, "beta": 1.5}, {"loss_type": "ipo"}, {"loss_type": "ipo", "gamma": 1.0},
    {"sft_weight": 0.3, "sft_reduction": "token", "normalizer": (3.0, 9.0)},
], ids=str)  # fmt: skip
def test_modules_equal_the_functions(options: dict[str, Any]) -> None:
    packed = make_packed()
    layout = layout_of(packed)
    want = simpo_loss(*packed[:2], **layout, **options)
    assert_same(tuple(SimPOLoss(**options)(*packed[:2], **layout)), tuple(want))
    batch, in_linear = make_linear_packed()
    layout = {**layout_of(in_linear), "bias": batch.bias}
    want = linear_simpo_loss(*batch[:3], **layout, **options)
    assert_same(tuple(LinearSimPOLoss(**options)(*batch[:3], **layout)), tuple(want))
    if "normalizer" not in options:
        counts = count_pairs(in_linear.labels, cu_seqlens=in_linear.cu_seqlens, pairs=PAIRED)
        layout |= {"normalizer": counts}
        want = linear_simpo_loss(*batch[:3], **layout, **options)
        assert_same(tuple(LinearSimPOLoss(**options)(*batch[:3], **layout)), tuple(want))


def test_modules_show_alpha_and_follow_changes() -> None:
    module = SimPOLoss(alpha=0.25, loss_type="ipo")
    assert "alpha=0.25" in repr(module)
    assert "loss_type='ipo'" in repr(module)
    assert "gamma_beta_ratio=0.0" in repr(module)
    batch = make_batch()
    module.alpha = -0.5
    want = simpo_loss(*batch, alpha=-0.5, loss_type="ipo")
    assert_same(tuple(module(*batch)), tuple(want))
    module.alpha = 1e40
    with pytest.raises(ValueError, match="alpha: expected"):
        module(*batch)
