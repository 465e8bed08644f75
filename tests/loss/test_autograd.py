"""The ops under PyTorch's own checks: gradcheck, opcheck, compile, export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import simpo_ext
from support.batches import DTYPES, make_batch

pytestmark = pytest.mark.kernels

OPS = torch.ops.simpo_ext
TOKEN_OPTIONS = (-100, True, 1.0, 0.0)
# ignore_index, shift, average_log_prob, beta, gamma_beta_ratio, loss_type, label_smoothing, alpha,
# sft_weight, sft_reduction, reduction, empty
PREFERENCE_OPTIONS = (-100, True, True, 2.0, 0.5, 0, 0.1, 0.0, 0.2, 0, 1, 0)

VARIANTS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "smoothing": {"label_smoothing": 0.2},
    "sum": {"average_log_prob": False, "beta": 0.2, "reduction": "sum"},
    "sft_sequence": {"sft_weight": 0.5},
    "sft_token": {"sft_weight": 0.5, "sft_reduction": "token"},
    "none": {"reduction": "none", "sft_weight": 0.5},
    "softcap": {"softcap": 4.0, "logit_scale": 0.8},
    # Margins of these batches stay well away from the kink at 1.
    "hinge": {"loss_type": "hinge"},
    "hinge_saturated": {"loss_type": "hinge", "gamma_beta_ratio": -50.0},
    "not_shifted": {"shift": False},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_gradcheck_of_simpo_loss(options: dict[str, Any]) -> None:
    batch = make_batch(vocabulary=6, dtype=torch.float64)
    if "loss_type" in options:
        losses = simpo_ext.simpo_loss(*batch, **options).losses
        assert ((losses == 0) | (losses > 1e-2)).all()
    assert torch.autograd.gradcheck(
        lambda x: simpo_ext.simpo_loss(x, batch.labels, **options).loss,
        batch.logits.requires_grad_(),
    )


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}, {"logit_scale": 1.7}, {"shift": False}])
def test_gradcheck_of_token_logps(options: dict[str, Any]) -> None:
    batch = make_batch(vocabulary=6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: simpo_ext.token_logps(x, batch.labels, **options),
        batch.logits.requires_grad_(),
    )


@pytest.mark.parametrize("average", [True, False])
def test_gradcheck_of_sequence_logps(average: bool) -> None:
    batch = make_batch(vocabulary=6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: simpo_ext.sequence_logps(x, batch.labels, average_log_prob=average),
        batch.logits.requires_grad_(),
    )


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_gradcheck_of_simpo_loss_from_logps(loss_type: str) -> None:
    chosen = torch.tensor([-1.0, -2.0, -0.3], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-1.5, -0.5, -3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda c, r: simpo_ext.simpo_loss_from_logps(c, r, loss_type=loss_type)[0],
        (chosen, rejected),
    )


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_the_token_ops(dtype: torch.dtype, strided: bool) -> None:
    logits, labels = make_batch(dtype=dtype)
    if strided:
        logits = logits.transpose(0, 1).contiguous().transpose(0, 1)
        labels = labels.t().contiguous().t()
    logps, *rows = OPS.token_logps(logits, labels, *TOKEN_OPTIONS)
    saved = (logits, labels, *rows, *TOKEN_OPTIONS)
    torch.library.opcheck(
        OPS.token_logps.default, (logits.clone().requires_grad_(), labels, *TOKEN_OPTIONS)
    )
    torch.library.opcheck(OPS.token_logps_backward.default, (torch.ones_like(logps), *saved))
    torch.library.opcheck(OPS.token_logps_backward_.default, (torch.ones_like(logps), *saved))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_of_the_sequence_ops(dtype: torch.dtype) -> None:
    _, labels = make_batch()
    token_logps = -torch.rand(labels.shape, dtype=dtype)
    logps, counts = OPS.sequence_logps(token_logps, labels, None, -100, True, True)
    torch.library.opcheck(
        OPS.sequence_logps.default, (token_logps.requires_grad_(), labels, None, -100, True, True)
    )
    torch.library.opcheck(
        OPS.sequence_logps_backward.default,
        (logps.detach(), labels, None, counts, -100, True, True),
    )


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_of_the_preference_ops(dtype: torch.dtype, reduction: int) -> None:
    _, labels = make_batch()
    token_logps = -torch.rand(labels.shape, dtype=dtype)
    options = list(PREFERENCE_OPTIONS)
    options[10] = reduction
    layout = (None, None, None)
    out = OPS.preference_loss(token_logps, labels, *layout, *options)
    torch.library.opcheck(
        OPS.preference_loss.default, (token_logps.requires_grad_(), labels, *layout, *options)
    )
    loss, losses, logps, _, sft_loss, _, slopes, counts = (tensor.detach() for tensor in out)
    saved = (labels, *layout, slopes, counts, *options[:3], *options[8:])
    for grads in ((loss, losses, logps, sft_loss), (loss, None, None, None)):
        torch.library.opcheck(OPS.preference_loss_backward.default, (*grads, *saved))


def both_ways(
    function: Callable[[Tensor, Tensor], Tensor], compiled: Any, logits: Tensor, labels: Tensor
) -> None:
    """Compares the value and the gradient of the compiled function with the eager function's."""
    gradients = []
    values = []
    for call in (function, compiled):
        leaf = logits.clone().requires_grad_()
        value = call(leaf, labels)
        value.sum().backward()
        values.append(value.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"sft_weight": 0.5, "inplace_backward": True}], ids=str)
@pytest.mark.cpu_only
def test_compiles_without_graph_break(options: dict[str, Any]) -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        out = simpo_ext.simpo_loss(x * 2, y, **options)
        return out.loss + 0.1 * out.losses.sum() + out.chosen_rewards.sum()

    torch.compiler.reset()
    both_ways(loss, torch.compile(loss, fullgraph=True), *make_batch(vocabulary=77))


@pytest.mark.cpu_only
def test_compiles_with_dynamic_shapes() -> None:
    def logps(x: Tensor, y: Tensor) -> Tensor:
        return simpo_ext.sequence_logps(x.float() * 2, y) + simpo_ext.simpo_loss(x, y).loss

    torch.compiler.reset()
    compiled = torch.compile(logps, fullgraph=True, dynamic=True)
    for pairs, time, vocabulary in ((2, 8, 50), (3, 5, 33), (1, 11, 129)):
        both_ways(logps, compiled, *make_batch(pairs, time, vocabulary))


@pytest.mark.cpu_only
def test_a_compiled_loss_takes_a_new_normalizer_every_step() -> None:
    batch = make_batch(pairs=3)
    module = simpo_ext.SimPOLoss(sft_weight=0.3, sft_reduction="token")
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True)
    # More values than torch.compile's limit of recompilations.
    for step in range(1, 13):
        normalizer = (step + 0.5, 7.0 * step)
        torch.testing.assert_close(
            compiled(*batch, normalizer=normalizer).loss, module(*batch, normalizer=normalizer).loss
        )


@pytest.mark.cpu_only
def test_the_module_compiles_and_exports() -> None:
    batch = make_batch()
    module = simpo_ext.SimPOLoss(sft_weight=0.1)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True)
    assert torch.equal(compiled(*batch).loss, module(*batch).loss)
    assert compiled(*batch).metrics() == module(*batch).metrics()
    exported = torch.export.export(module, tuple(batch)).module()
    assert torch.equal(exported(*batch).loss, module(*batch).loss)


def test_meta_tensors_give_shapes_and_dtypes() -> None:
    batch = make_batch(pairs=3, dtype=torch.bfloat16)
    for ours, expected in zip(
        simpo_ext.simpo_loss(batch.logits.to("meta"), batch.labels.to("meta")),
        simpo_ext.simpo_loss(*batch),
        strict=True,
    ):
        assert ours.device.type == "meta"
        assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)


def test_autocast_leaves_the_loss_in_float32() -> None:
    batch = make_batch()
    weight = torch.randn(50, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = torch.nn.functional.linear(torch.randn(4, 8, 16), weight)
        assert logits.dtype == torch.bfloat16
        assert simpo_ext.simpo_loss(logits, batch.labels).loss.dtype == torch.float32
