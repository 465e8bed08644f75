"""Outputs and gradients of losses, and their comparison with each other and with the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from simpo_ext import SimPOOutput, simpo_loss
from support import oracle

OUTPUTS = (
    "loss",
    "losses",
    "chosen_logps",
    "rejected_logps",
    "chosen_rewards",
    "rejected_rewards",
    "sft_loss",
)
DIFFERENTIABLE = ("loss", "losses", "chosen_logps", "rejected_logps", "sft_loss")


def assert_same(got: Any, want: Any) -> None:
    """Compares nested tensors bit for bit. NaN equals NaN."""
    leaves, expected = tree_leaves(got), tree_leaves(want)
    assert [x for x in leaves if isinstance(x, str)] == [x for x in expected if isinstance(x, str)]
    torch.testing.assert_close(
        [x for x in leaves if not isinstance(x, str)],
        [x for x in expected if not isinstance(x, str)],
        rtol=0.0,
        atol=0.0,
        equal_nan=True,
    )


def assert_outputs_match(
    out: SimPOOutput, want: oracle.Preference, rtol: float, atol: float | None = None
) -> None:
    """Compares all outputs with the oracle's. The default of ``atol`` is ``rtol``."""
    atol = rtol if atol is None else atol
    for name in OUTPUTS:
        got, expected = getattr(out, name).detach().double().numpy(), getattr(want, name)
        assert got.shape == np.shape(expected), name  # allclose would broadcast
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol, err_msg=name)


def loss_and_gradient(
    logits: Tensor, labels: Tensor, **options: Any
) -> tuple[SimPOOutput, list[Tensor]]:
    """The outputs, the gradient of the loss, and that of the outputs of each pair."""
    leaf = logits.detach().requires_grad_()
    out = simpo_loss(leaf, labels, **options)
    per_pair = sum((getattr(out, name).nan_to_num() * 0.7).sum() for name in DIFFERENTIABLE[1:4])
    return out, [
        torch.autograd.grad(result, leaf, retain_graph=True)[0]
        for result in (out.loss.sum(), per_pair)
    ]


def reduced_weights(result: Tensor) -> Tensor:
    """An incoming gradient of a result, with both signs."""
    weights = torch.linspace(1.25, -0.5, max(result.numel(), 1), dtype=result.dtype)
    return weights[: result.numel()].view(result.shape)


def gradients_by_the_oracle(names: Sequence[str], out: Any) -> dict[str, Any]:
    """`reduced_weights` of these results as keywords of the oracle."""
    given = {f"grad_{name}": reduced_weights(getattr(out, name)).double() for name in names}
    return {"grad_loss": 0.0, **{name: grad.numpy() for name, grad in given.items()}}
