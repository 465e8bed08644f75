"""Batches of hidden states, the eager computation, and a recorder of the ops' calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import simpo_ext
from simpo_ext._ops import logits_plan
from support.batches import make_batch

OPS = torch.ops.simpo_ext
# The largest number of columns in a chunk: 4096 on CPUs, and 8192 if cuda_routing.py sends
# tensors to a GPU.
CHUNK = logits_plan.CHUNK_COLUMNS["cpu"]
# More than the logits of any test's batch.
UNLIMITED = 2**62


class LinearBatch(NamedTuple):
    """The positional arguments of the functions in their order, and the bias."""

    hidden: Tensor  # [2P, T, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [2P, T]
    bias: Tensor | None  # [V]

    def doubles(self) -> tuple[npt.NDArray[Any], ...]:
        """hidden, weight and labels for the oracle."""
        return (
            self.hidden.detach().double().numpy(),
            self.weight.detach().double().numpy(),
            self.labels.numpy(),
        )

    def double_bias(self) -> npt.NDArray[np.float64] | None:
        return None if self.bias is None else self.bias.detach().double().numpy()

    def leaves(self, needs: tuple[bool, bool, bool] = (True, True, True)) -> LinearBatch:
        """The batch with copies of the inputs. ``needs`` says which ones require gradients."""
        hidden, weight, labels, bias = self
        return LinearBatch(
            hidden.detach().clone().requires_grad_(needs[0]),
            weight.detach().clone().requires_grad_(needs[1]),
            labels,
            None if bias is None else bias.detach().clone().requires_grad_(needs[2]),
        )

    def inputs(self) -> list[Tensor]:
        """hidden, weight and, if there is one, bias."""
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]


def make_linear_batch(
    pairs: int = 2,
    time: int = 8,
    vocabulary: int = 50,
    width: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    bias: bool = True,
) -> LinearBatch:
    """A batch of sequences of different lengths, with masked prompts and padding.

    Most hidden states point along the weight row of their label, and some along another token's. So
    a few logits of a row are large, as those of a trained model.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = make_batch(pairs, time, vocabulary, seed=seed).labels
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    weight = torch.randn(vocabulary, width, **options)
    hidden = torch.randn(2 * pairs, time, width, **options) / width**0.5
    tokens = torch.randint(vocabulary, labels.shape, generator=generator)
    right = (labels[:, 1:] >= 0) & (torch.rand(labels[:, 1:].shape, **options) < 0.75)
    tokens[:, :-1] = torch.where(right, labels[:, 1:], tokens[:, :-1])
    heights = torch.rand(*labels.shape, 1, **options) * 12.0
    rows = weight[tokens]
    hidden += heights * rows / (rows.square().sum(-1, keepdim=True) + 0.1)
    offsets = torch.randn(vocabulary, **options)
    return LinearBatch(
        hidden.to(dtype), weight.to(dtype), labels, offsets.to(dtype) if bias else None
    )


def dense_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The eager computation: all logits in the inputs' dtype, then in float32 or float64."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    targets = torch.full_like(labels, ignore_index)
    targets[:, : labels.shape[1] - shift] = labels[:, int(shift) :]
    valid = targets != ignore_index
    gathered = z.log_softmax(-1).gather(2, targets.where(valid, 0).unsqueeze(2)).squeeze(2)
    return gathered.where(valid, 0.0)


def upstream_of(labels: Tensor) -> Tensor:
    """A gradient of the log-probabilities, [B, T] float64, of both signs."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(labels.shape, generator=generator, dtype=torch.float64) * 1.5 - 0.5


def logps_and_gradients(
    function: Callable[..., Tensor],
    batch: LinearBatch,
    needs: tuple[bool, bool, bool] = (True, True, True),
    **options: Any,
) -> list[Tensor | None]:
    """logps, then the gradients of hidden, weight and bias, or None."""
    leaf = batch.leaves(needs)
    logps = function(*leaf[:3], bias=leaf.bias, **options)
    if logps.requires_grad:
        logps.backward(upstream_of(batch.labels).to(logps.dtype))
    gradients = [None if x is None else x.grad for x in (leaf.hidden, leaf.weight, leaf.bias)]
    return [logps.detach(), *gradients]


def logps_op(batch: LinearBatch, budget: int = 0, num_valid_tokens: int = -1) -> tuple[Tensor, ...]:
    """The results of the op: logps [B, T], max [R], sum_exp [R], kept_logits [kept, R, width]."""
    hidden, weight, labels, bias = batch
    options = (-100, True, 1.0, 0.0, budget, num_valid_tokens)
    results: tuple[Tensor, ...] = OPS.linear_token_logps(hidden, weight, bias, labels, *options)
    return results


class Watcher(TorchDispatchMode):
    """Records the library's ops that are dispatched, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "simpo_ext":
            self.calls.append((func._opname, args, result))
        return result

    def named(self, name: str) -> tuple[tuple[Any, ...], Any]:
        """The arguments and results of the only call of the op."""
        (call,) = [(args, result) for op, args, result in self.calls if op == name]
        return call


def watched_logps(batch: LinearBatch, **options: Any) -> tuple[Tensor, Watcher]:
    """linear_token_logps, and the record of its ops."""
    with Watcher() as watcher:
        logps = simpo_ext.linear_token_logps(*batch[:3], bias=batch.bias, **options)
    return logps, watcher
