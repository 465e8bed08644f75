"""simpo_loss records one autograd node, or calls the ops if a PyTorch feature must see them.

Both paths give the same results.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from simpo_ext import SimPOLoss, SimPOOutput, simpo_loss
from support.batches import Batch, make_batch
from support.comparisons import assert_same

pytestmark = pytest.mark.kernels

FORWARD_OPS = ["token_logps", "preference_loss"]
BACKWARD_OPS = ["preference_loss_backward", "token_logps_backward"]
DIFFERENTIABLE = ("loss", "losses", "chosen_logps", "rejected_logps", "sft_loss")


class Watcher(TorchDispatchMode):
    """Records the library's ops that are dispatched. While it is active, the loss calls the ops."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "simpo_ext":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def nodes_of_the_loss(output: Tensor) -> int:
    """The number of this library's autograd nodes behind an output."""
    count, pending = 0, [output.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None:
            count += "simpo" in node.name().lower() or "TokenLogps" in node.name()
            pending += [below for below, _ in node.next_functions]
    return count


def scored(batch: Batch, context: AbstractContextManager[Any], **options: Any) -> Any:
    """A leaf, and the outputs for leaf * 1, which an in-place backward may overwrite."""
    leaf = batch.logits.clone().requires_grad_()
    with context:
        return leaf, simpo_loss(leaf * 1, batch.labels, **options)


def gradient(leaf: Tensor, out: SimPOOutput, names: tuple[str, ...] = ("loss",)) -> Tensor:
    outputs = [getattr(out, name) for name in names]
    weights = [torch.linspace(1.0, 1.5, max(x.numel(), 1)).to(x).view(x.shape) for x in outputs]
    return torch.autograd.grad(outputs, leaf, weights)[0]


# ---- equal results -------------------------------------------------------------------------------

COMBINATIONS: list[dict[str, Any]] = [
    {**losses, **average, **reduction, **sft, **inplace}
    for losses, average, reduction, sft, inplace in itertools.product(
        ({}, {"label_smoothing": 0.2}, {"loss_type": "hinge"}),
        ({}, {"average_log_prob": False}),
        ({}, {"reduction": "sum"}, {"reduction": "none"}, {"normalizer": (3.0, 7.0)}),
        ({}, {"sft_weight": 0.3}, {"sft_weight": 0.3, "sft_reduction": "token"}),
        ({}, {"inplace_backward": True}),
    )
    if not (reduction.get("reduction") == "none" and "sft_reduction" in sft)
]
EXTRAS: list[dict[str, Any]] = [
    {"beta": 10.0, "gamma": 3.0},
    {"empty": "nan"},
    {"shift": False, "ignore_index": 7},
    {"softcap": 6.0, "logit_scale": 1.5},
]


@pytest.mark.parametrize("options", COMBINATIONS + EXTRAS, ids=str)
def test_both_paths_give_the_same_bits(options: dict[str, Any]) -> None:
    batch = make_batch(pairs=3)
    batch.labels[4] = -100  # drops a pair
    batch.labels[batch.labels == -100] = options.get("ignore_index", -100)
    for names in (*((name,) for name in DIFFERENTIABLE), DIFFERENTIABLE):
        leaf, out = scored(batch, nullcontext(), **options)
        other_leaf, want = scored(batch, Watcher(), **options)
        assert nodes_of_the_loss(out.losses) == 1
        assert nodes_of_the_loss(want.losses) == 2
        assert_same(tuple(out), tuple(want))
        assert [x.requires_grad for x in tuple(out)] == [x.requires_grad for x in tuple(want)]
        assert_same(gradient(leaf, out, names), gradient(other_leaf, want, names))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_both_paths_agree_on_other_dtypes_and_layouts(dtype: torch.dtype) -> None:
    logits, labels = make_batch(pairs=3, vocabulary=77, dtype=dtype)
    for strided in (logits, logits.transpose(0, 1).contiguous().transpose(0, 1), logits[..., ::3]):
        batch = Batch(strided, (labels % strided.shape[2]).where(labels >= 0, labels))
        leaf, out = scored(batch, nullcontext())
        other_leaf, want = scored(batch, Watcher())
        assert_same(tuple(out), tuple(want))
        assert_same(gradient(leaf, out), gradient(other_leaf, want))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext])
def test_both_paths_agree_without_a_gradient(context: Any) -> None:
    batch = make_batch()
    with context():
        out = simpo_loss(*batch)
        with Watcher():
            want = simpo_loss(*batch)
    assert_same(tuple(out), tuple(want))
    for ours, theirs in zip(tuple(out), tuple(want), strict=True):
        assert ours.grad_fn is theirs.grad_fn is None
        assert ours.is_inference() == theirs.is_inference()


# ---- features that must see the ops --------------------------------------------------------------


def test_plain_tensors_take_one_node() -> None:
    leaf = make_batch().logits.requires_grad_()
    out = simpo_loss(leaf, make_batch().labels)
    assert out.loss.grad_fn is not None
    ((below, _), *others) = out.loss.grad_fn.next_functions
    assert below.variable is leaf
    assert all(node is None for node, _ in others)


def test_a_dispatch_mode_sees_every_op() -> None:
    batch = make_batch()
    with Watcher() as both:
        scored(batch, nullcontext())[1].loss.backward()
    assert both.seen == FORWARD_OPS + BACKWARD_OPS
    _, out = scored(batch, nullcontext())
    with Watcher() as backward:
        out.loss.backward()
    assert backward.seen == BACKWARD_OPS
    _, out = scored(batch, nullcontext(), inplace_backward=True)
    with Watcher() as backward:
        out.loss.backward()
    assert backward.seen == ["preference_loss_backward", "token_logps_backward_"]


def test_a_function_mode_sees_the_forward_ops() -> None:
    class FunctionWatcher(TorchFunctionMode):
        seen: list[str] = []  # noqa: RUF012

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if isinstance(func, torch._ops.OpOverload):
                self.seen.append(func._opname)
            return func(*args, **(kwargs or {}))

    with FunctionWatcher() as watcher:
        _, out = scored(make_batch(), nullcontext())
    assert watcher.seen == FORWARD_OPS
    assert nodes_of_the_loss(out.loss) == 2


class Labelled(Tensor):
    """A tensor subclass that adds nothing but its type."""


def test_the_results_have_the_type_of_a_subclass() -> None:
    batch = make_batch()
    leaf = batch.logits.clone().requires_grad_()
    for logits, labels in (
        (leaf.as_subclass(Labelled), batch.labels),
        (leaf, batch.labels.as_subclass(Labelled)),
    ):
        out = simpo_loss(logits, labels)
        assert all(type(x) is Labelled for x in tuple(out))
        assert nodes_of_the_loss(out.loss) == 2


def test_a_wrapper_subclass_uses_the_ops() -> None:
    batch = make_batch()
    with FakeTensorMode() as mode:
        leaf, labels = mode.from_tensor(batch.logits).requires_grad_(), mode.from_tensor(batch[1])
    out = simpo_loss(leaf, labels)  # outside the fake mode
    assert nodes_of_the_loss(out.loss) == 2
    out.loss.backward()
    assert type(leaf.grad) is type(out.loss) is type(leaf)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_ops_and_differentiates() -> None:
    batch = make_batch()
    leaf = batch.logits.clone().requires_grad_()
    traced = torch.jit.trace(lambda x: simpo_loss(x, batch.labels).loss, leaf)
    assert [f"simpo_ext::{name}" in str(traced.graph) for name in FORWARD_OPS] == [True, True]
    other = Batch(make_batch(seed=1).logits.requires_grad_(), batch.labels)
    loss = traced(other.logits)
    assert_same(loss, simpo_loss(*other).loss)
    want = gradient(*scored(other, nullcontext()))
    assert_same(torch.autograd.grad(loss, other.logits)[0], want)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_maps_the_ops_and_keeps_the_gradient() -> None:
    batch = make_batch(pairs=4)
    leaf = batch.logits.clone().requires_grad_()
    halves, labels = leaf.view(2, 4, *leaf.shape[1:]), batch.labels.view(2, 4, -1)
    losses = torch.func.vmap(lambda x, y: simpo_loss(x, y).loss)(halves, labels)
    want = torch.stack([simpo_loss(x, y).loss for x, y in zip(halves, labels, strict=True)])
    assert_same(losses, want)
    got = torch.autograd.grad(losses.sum(), leaf)
    assert_same(got, torch.autograd.grad(want.sum(), leaf))


def dual_call(loss: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with forward_ad.dual_level():
        loss(forward_ad.make_dual(x, x))


@pytest.mark.parametrize(
    "transform",
    [
        lambda loss, x: torch.func.grad(loss)(x),
        lambda loss, x: torch.func.vjp(loss, x),
        lambda loss, x: torch.func.jacrev(loss)(x),
        lambda loss, x: torch.func.jvp(loss, (x,), (x,)),
        dual_call,
    ],
    ids=["grad", "vjp", "jacrev", "jvp", "dual"],
)
def test_transforms_are_refused(transform: Callable[..., Any]) -> None:
    batch = make_batch()
    with pytest.raises((NotImplementedError, RuntimeError), match=r"setup_context|forward-mode"):
        transform(lambda x: simpo_loss(x, batch.labels).loss, batch.logits)


def test_a_dual_level_without_a_tangent_keeps_the_gradient() -> None:
    batch = make_batch()
    leaf, out = scored(batch, forward_ad.dual_level())
    assert_same(gradient(leaf, out), gradient(*scored(batch, nullcontext())))


# ---- autograd features ---------------------------------------------------------------------------


def test_both_paths_save_the_same_tensors() -> None:
    def saved(context: AbstractContextManager[Any]) -> list[tuple[torch.Size, torch.dtype]]:
        packed: list[Tensor] = []
        with saved_tensors_hooks(lambda x: packed.append(x) or x.clone(), lambda x: x):
            leaf, out = scored(make_batch(), context)
        out.loss.backward()
        assert leaf.grad.any()
        return [(x.shape, x.dtype) for x in packed]

    assert saved(nullcontext()) == saved(Watcher())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("first", [nullcontext, Watcher])
@pytest.mark.parametrize("again", [nullcontext, Watcher])
def test_a_checkpoint_may_recompute_on_the_other_path(first: Any, again: Any, inplace: Any) -> None:
    batch = make_batch()
    want = gradient(*scored(batch, nullcontext()))
    leaf = batch.logits.clone().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return simpo_loss(x * 1, batch.labels, inplace_backward=inplace).loss

    with first():
        out = checkpoint(loss, leaf, use_reentrant=False)
    with again():
        out.backward()
    assert_same(leaf.grad, want)


def test_a_graph_that_is_retained_runs_again() -> None:
    leaf, out = scored(make_batch(), nullcontext())
    out.loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    out.loss.backward()
    assert_same(leaf.grad, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.loss.backward()


def test_hooks_of_outputs_and_logits_see_and_change_gradients() -> None:
    batch = make_batch()
    want = gradient(*scored(batch, nullcontext()))
    leaf = batch.logits.clone().requires_grad_()
    logits = leaf * 1
    of_logits: list[Tensor] = []
    logits.register_hook(of_logits.append)
    out = simpo_loss(logits, batch.labels)
    out.loss.register_hook(lambda grad: grad * 2)
    out.loss.backward()
    assert_same(leaf.grad, 2 * want)
    assert_same(of_logits, [2 * want])


def test_outputs_may_be_changed_in_place() -> None:
    batch = make_batch()
    results = []
    for context in (nullcontext(), Watcher()):
        leaf, out = scored(batch, context)
        out.chosen_rewards.zero_()
        (out.loss.mul_(3) + out.chosen_logps.mul_(2).sum() + out.losses.mul_(0.5).sum()).backward()
        results.append(leaf.grad)
    assert_same(*results)


def test_batched_gradients_agree() -> None:
    results = []
    for context in (nullcontext(), Watcher()):
        leaf, out = scored(make_batch(), context)
        results += torch.autograd.grad(out.losses, leaf, torch.eye(2), is_grads_batched=True)
    assert_same(*results)


@pytest.mark.parametrize("inplace", [False, True])
def test_create_graph_is_refused(inplace: bool) -> None:
    for context in (nullcontext(), Watcher()):
        leaf, out = scored(make_batch(), context, inplace_backward=inplace)
        with pytest.raises(RuntimeError, match="does not implement double backward"):
            torch.autograd.grad(out.loss, leaf, create_graph=True)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.cpu_only
def test_the_backward_of_an_eager_forward_compiles(inplace: bool) -> None:
    torch.compiler.reset()
    leaf, out = scored(make_batch(), nullcontext(), inplace_backward=inplace)
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        out.loss.backward()
    assert_same(leaf.grad, gradient(*scored(make_batch(), nullcontext())))


# ---- cached options ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("beta", 1.0, True),
        ("beta", 1, True),
        ("shift", True, 1),
        ("average_log_prob", False, 0.0),
        ("ignore_index", -100, -100.0),
        ("logit_scale", 1, True),
        ("softcap", 1.0, True),
    ],
)
def test_a_bad_value_that_equals_a_good_one_is_refused(name: str, good: Any, bad: Any) -> None:
    batch = make_batch()
    for value, raises in ((good, False), (bad, True), (good, False)):
        with pytest.raises(TypeError, match=name) if raises else nullcontext():
            simpo_loss(*batch, **{name: value})


def test_a_repeated_error_has_no_context() -> None:
    for _ in range(2):
        with pytest.raises(TypeError, match="beta: expected a number, got list") as error:
            simpo_loss(*make_batch(), beta=[1.0])  # not hashable
        assert error.value.__context__ is None


def test_the_module_follows_its_attributes() -> None:
    batch = make_batch()
    module = SimPOLoss()
    module(*batch)
    module.beta, module.reduction = 5.0, "none"
    want = simpo_loss(*batch, beta=5.0, reduction="none")
    assert_same(tuple(module(*batch)), tuple(want))
    module.beta = -1.0
    with pytest.raises(ValueError, match="beta: expected"):
        module(*batch)
