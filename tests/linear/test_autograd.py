"""The linear ops under PyTorch's own checks: gradcheck, opcheck, compile, export, autocast."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from simpo_ext import LinearSimPOLoss, linear_simpo_loss, linear_token_logps
from support.batches import DTYPES
from support.comparisons import assert_same
from support.linear_batches import (
    OPS,
    UNLIMITED,
    LinearBatch,
    logps_and_gradients,
    make_linear_batch,
)

pytestmark = pytest.mark.kernels

TOKEN_OPTIONS = (-100, True, 1.0, 0.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "smoothing": {"label_smoothing": 0.2},
    "sum": {"average_log_prob": False, "beta": 0.2, "reduction": "sum"},
    "sft_token": {"sft_weight": 0.5, "sft_reduction": "token"},
    "none": {"reduction": "none", "sft_weight": 0.5},
    "softcap": {"softcap": 4.0, "logit_scale": 0.8},
    # The margins of this batch are far from the kink at 1.
    "hinge": {"loss_type": "hinge"},
    "not_shifted": {"shift": False},
}


def small(bias: bool = True) -> LinearBatch:
    return make_linear_batch(time=6, vocabulary=6, width=3, dtype=torch.float64, bias=bias)


# ---- gradcheck -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "budget"), [*((name, 0) for name in VARIANTS), ("softcap", UNLIMITED)]
)
def test_gradcheck_of_linear_simpo_loss(name: str, budget: int) -> None:
    batch, options = small().leaves(), VARIANTS[name]
    if "loss_type" in options:
        losses = linear_simpo_loss(*batch[:3], bias=batch.bias, **options).losses
        assert ((losses == 0) | (losses > 1e-2)).all()
    assert torch.autograd.gradcheck(
        lambda h, w, b: (
            linear_simpo_loss(
                h, w, batch.labels, bias=b, logits_budget_bytes=budget, **options
            ).loss
        ),
        batch.inputs(),
    )


@pytest.mark.parametrize(
    ("options", "bias"),
    [({}, True), ({}, False), ({"softcap": 4.0}, True), ({"logit_scale": 1.7}, True),
     ({"shift": False}, True)],
    ids=str,
)  # fmt: skip
def test_gradcheck_of_linear_token_logps(options: dict[str, Any], bias: bool) -> None:
    batch = small(bias).leaves()
    assert torch.autograd.gradcheck(
        lambda h, w, b=None: linear_token_logps(h, w, batch.labels, bias=b, **options),
        batch.inputs(),
    )


# ---- opcheck -------------------------------------------------------------------------------------


# 128 fills one chunk. The other vocabularies leave a part of the last chunk empty.
OPCHECKED = [(torch.float32, 128, True), (torch.float64, 4099, False), (torch.bfloat16, 4099, True),
             (torch.float16, 50, False)]  # fmt: skip


@pytest.mark.parametrize("budget", [0, 2**24])
@pytest.mark.parametrize("num_valid_tokens", [-1, 30])
@pytest.mark.parametrize(("dtype", "vocabulary", "bias"), OPCHECKED)
def test_opcheck_of_linear_token_logps(
    dtype: torch.dtype, vocabulary: int, bias: bool, num_valid_tokens: int, budget: int
) -> None:
    hidden, weight, labels, offset = make_linear_batch(
        vocabulary=vocabulary, width=4, dtype=dtype, bias=bias
    ).leaves()
    args = (hidden, weight, offset, labels, *TOKEN_OPTIONS, budget, num_valid_tokens)
    torch.library.opcheck(OPS.linear_token_logps.default, args)


@pytest.mark.parametrize("budget", [0, 2**24])
@pytest.mark.parametrize(
    ("dtype", "vocabulary", "bias", "needs"),
    [*((*case, "hwb") for case in OPCHECKED), *((*OPCHECKED[0], needs) for needs in "hwb")],
)
def test_opcheck_of_linear_token_logps_backward(
    dtype: torch.dtype, vocabulary: int, bias: bool, needs: str, budget: int
) -> None:
    hidden, weight, labels, offset = make_linear_batch(
        vocabulary=vocabulary, width=4, dtype=dtype, bias=bias
    )
    inputs = (hidden, weight, offset, labels)
    logps, *rows = OPS.linear_token_logps(*inputs, *TOKEN_OPTIONS, budget, 30)
    asked_for = ("h" in needs, "w" in needs, bias and "b" in needs)
    args = (torch.ones_like(logps), *inputs, *rows, *TOKEN_OPTIONS, *asked_for)
    torch.library.opcheck(OPS.linear_token_logps_backward.default, args)


@pytest.mark.parametrize("num_valid_tokens", [-1, 30])
def test_opcheck_with_strides_and_frozen_inputs(num_valid_tokens: int) -> None:
    batch = make_linear_batch(vocabulary=131, width=4)
    hidden = batch.hidden.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    weight, labels = batch.weight.t().contiguous().t(), batch.labels.t().contiguous().t()
    for bias in (None, batch.bias.requires_grad_() if batch.bias is not None else None):
        args = (hidden, weight, bias, labels, *TOKEN_OPTIONS, 2**24, num_valid_tokens)
        torch.library.opcheck(OPS.linear_token_logps.default, args)


# ---- fake and meta tensors -----------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("num_valid_tokens", [None, 48])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_and_meta_tensors_give_shapes_and_dtypes(
    dtype: torch.dtype, num_valid_tokens: int | None, device: str
) -> None:
    batch = make_linear_batch(pairs=3, vocabulary=4099, width=3, dtype=dtype)
    options: dict[str, Any] = {"num_valid_tokens": num_valid_tokens}
    leaf = batch.leaves()
    want = linear_simpo_loss(*leaf[:3], bias=leaf.bias, **options)
    with FakeTensorMode() if device == "cpu" else nullcontext() as mode:
        move = mode.from_tensor if mode else lambda x: x.to("meta")
        hidden, weight, labels, bias = (move(x) for x in batch)
        inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
        got = linear_simpo_loss(hidden, weight, labels, bias=bias, **options)
        for ours, expected in zip(got, want, strict=True):
            assert ours.device.type == device
            assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
            assert ours.requires_grad == expected.requires_grad
        got.loss.backward()
        for x in inputs:
            assert (x.grad.shape, x.grad.dtype) == (x.shape, x.dtype)


# ---- compile and export --------------------------------------------------------------------------


def as_function(**options: Any) -> Any:
    """A sum of all outputs, with operations around the loss that the compiler may fuse."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
        out = linear_simpo_loss(hidden * 2, weight, labels, bias=bias, **options)
        return out.loss + 0.1 * out.losses.sum() + out.chosen_rewards.sum()

    return loss


def both_ways(function: Any, compiled: Any, batch: LinearBatch) -> None:
    """Compares the value and the gradients of the compiled function with the eager function's."""
    results = []
    for call in (function, compiled):
        leaf = batch.leaves()
        value = call(*leaf)
        value.sum().backward()
        results.append([value.detach(), *(x.grad for x in leaf.inputs())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


COMPILED: list[dict[str, Any]] = [
    {},
    {"logits_budget_bytes": 0, "sft_weight": 0.5, "inplace_backward": True},
    {"num_valid_tokens": 30, "softcap": 9.0},
]


@pytest.mark.parametrize(
    ("options", "bias"), [*((options, True) for options in COMPILED), ({}, False)], ids=str
)
@pytest.mark.cpu_only
def test_compiles_without_graph_break(options: dict[str, Any], bias: bool) -> None:
    loss = as_function(**options)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    both_ways(loss, compiled, make_linear_batch(vocabulary=4099, width=5, bias=bias))


@pytest.mark.cpu_only
def test_compiles_with_inductor() -> None:
    loss = as_function()
    torch.compiler.reset()
    both_ways(loss, torch.compile(loss, fullgraph=True), make_linear_batch(vocabulary=77))


@pytest.mark.parametrize("options", COMPILED[:2], ids=str)
@pytest.mark.cpu_only
def test_compiles_with_dynamic_shapes(options: dict[str, Any]) -> None:
    loss = as_function(**options)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 8, 50, 16), (3, 5, 4099, 3), (2, 8, 12293, 2)):
        both_ways(loss, compiled, make_linear_batch(*shape))


@pytest.mark.cpu_only
def test_a_compiled_loss_takes_a_new_count_and_normalizer_every_step() -> None:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, count: int, pairs: float) -> Tensor:
        return linear_simpo_loss(
            hidden, weight, labels, num_valid_tokens=count, normalizer=pairs
        ).loss

    batch = make_linear_batch(pairs=3)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    # More values than torch.compile's limit of recompilations.
    for step in range(12):
        args = (*batch[:3], 36 + step, step + 0.5)
        torch.testing.assert_close(compiled(*args), loss(*args))


@pytest.mark.cpu_only
def test_the_module_compiles_and_exports() -> None:
    hidden, weight, labels, _ = make_linear_batch()
    module = LinearSimPOLoss(sft_weight=0.1)
    want = module(hidden, weight, labels)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(tuple(compiled(hidden, weight, labels)), tuple(want))
    assert compiled(hidden, weight, labels).metrics() == want.metrics()
    exported = torch.export.export(module, (hidden, weight, labels)).module()
    assert_same(exported(hidden, weight, labels).loss, want.loss)


# ---- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("vocabulary", [131, 4099])
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_inputs(
    vocabulary: int, bias: bool, dtype: torch.dtype
) -> None:
    batch = make_linear_batch(vocabulary=vocabulary, bias=bias)
    hidden, weight, labels, offset = batch
    short = LinearBatch(hidden.to(dtype), weight.to(dtype), labels, None)
    short = short if offset is None else short._replace(bias=offset.to(dtype))
    want = logps_and_gradients(linear_token_logps, short)

    def under_autocast(*args: Any, **options: Any) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return linear_token_logps(*args, **options)

    got = logps_and_gradients(under_autocast, batch)
    assert got[0] is not None and got[0].dtype == torch.float32
    for ours, theirs in zip(got, want, strict=True):
        assert_same(ours, None if theirs is None else theirs.float())
    # Earlier layers return hidden states of the short dtype, but the weight is float32.
    mixed = logps_and_gradients(under_autocast, batch._replace(hidden=short.hidden))
    assert_same(mixed[0], want[0])
    assert_same(mixed[1], want[1])
    assert mixed[2] is not None and mixed[2].dtype == torch.float32


def test_the_loss_under_autocast_is_float32() -> None:
    hidden, weight, labels, bias = make_linear_batch()
    want = linear_simpo_loss(
        hidden.bfloat16(), weight.bfloat16(), labels, bias=bias.bfloat16(), sft_weight=0.1
    )
    module = LinearSimPOLoss(sft_weight=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(tuple(module(hidden, weight, labels, bias=bias)), tuple(want))
    assert want.loss.dtype == torch.float32


def test_autocast_does_not_cast_float64() -> None:
    batch = make_linear_batch(dtype=torch.float64)
    want = logps_and_gradients(linear_token_logps, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logps_and_gradients(linear_token_logps, batch)
    assert_same(got, want)


def test_disabled_autocast_casts_nothing() -> None:
    batch = make_linear_batch(bias=False)
    want = linear_token_logps(*batch[:3])
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert_same(linear_token_logps(*batch[:3]), want)
        with pytest.raises(TypeError, match=r"weight: expected dtype .*bfloat16.* got .*float32"):
            linear_token_logps(batch.hidden.bfloat16(), *batch[1:3])


@pytest.mark.cpu_only
def test_autocast_compiles() -> None:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear_simpo_loss(hidden, weight, labels, bias=bias).loss

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    both_ways(loss, compiled, make_linear_batch())
