"""How first light compares: tensors at the end of their memory, errors and their bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

# ---- comparison ------------------------------------------------------------------------------


class Bound(NamedTuple):
    """The largest errors that are allowed, in units of the largest expected element."""

    value: float
    gradient: float


# For results from logits. Sums are float32 or better; the gradient is rounded to its dtype.
FROM_LOGITS = {
    torch.float64: Bound(1e-12, 1e-12),
    torch.float32: Bound(2e-6, 4e-6),
    torch.bfloat16: Bound(2e-6, 2.0**-7),
    torch.float16: Bound(2e-6, 2.0**-9),
}
# For results from hidden states. A matrix product that sums in another order can round a logit
# differently, which changes the probability of its token.
FROM_HIDDEN = {
    torch.float64: Bound(1e-11, 1e-11),
    torch.float32: Bound(1e-5, 5e-5),
    torch.bfloat16: Bound(2.0**-7, 2.0**-4),
    torch.float16: Bound(2.0**-10, 2.0**-7),
}


@dataclass(frozen=True)
class Check:
    """One tensor compared with the truth."""

    name: str
    error: float
    bound: float

    @property
    def is_right(self) -> bool:
        """False for NaN, too."""
        return self.error <= self.bound


def compare(name: str, actual: Tensor, expected: Tensor, bound: float, least: float) -> Check:
    """The largest error in units of the largest expected element, at least ``least``.

    Where exactly 0 is expected, as in the gradient of a masked token, the result must be exactly 0.
    """
    found = actual.detach().cpu().double().reshape(expected.shape)
    expected = expected.detach()
    error = (found - expected).abs().max().item() / max(least, expected.abs().max().item())
    if found[expected == 0.0].ne(0.0).any():
        error = torch.inf
    return Check(name, error, bound)


# ---- placement -------------------------------------------------------------------------------


def place(values: Tensor, device: torch.device, offset: int = 1, padding: int = 0) -> Tensor:
    """Copies values to an allocation of their own, after ``offset`` elements and up to its end."""
    *outer, columns = values.shape
    strides = [1]
    for size in reversed([*outer[1:], columns + padding]):
        strides.insert(0, strides[0] * size)
    strides = strides[-values.dim() :]
    length = offset + 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
    storage = torch.zeros(length, dtype=values.dtype)
    storage.as_strided(values.shape, strides, offset).copy_(values)
    return storage.to(device).as_strided(values.shape, strides, offset)


# ---- problems --------------------------------------------------------------------------------


class Given(NamedTuple):
    """What each side of a comparison gets: this project on the device, the truth in float64."""

    inputs: Mapping[str, Tensor]
    labels: Tensor
    others: Mapping[str, Tensor]
    dtype: torch.dtype  # of the inputs on the device


@dataclass(frozen=True)
class Problem:
    """What this project computes, and the truth to compare it with."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]  # of the inputs, which are all differentiable
    labels: Tensor
    ours: Callable[[Given], Mapping[str, Tensor]]
    truth: Callable[[Given], Mapping[str, Tensor]]
    others: Mapping[str, Tensor] = field(default_factory=dict)
    layout: tuple[int, int] = (1, 0)  # of the first input: offset and padding
    inplace: bool = False  # the gradient of the first input overwrites it
    for_sanitizer: bool = True
    dtypes: tuple[torch.dtype, ...] = tuple(FROM_LOGITS)

    def values(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Random inputs in float64 that the dtype represents."""
        values = {}
        for seed, (name, shape) in enumerate(self.shapes.items()):
            std = {"logits": 3.0, "weight": 2.0 * shape[-1] ** -0.5}.get(name, 1.0)
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * std
            values[name] = drawn.to(dtype).double()
        return values


@dataclass(frozen=True)
class Case:
    """A problem in one dtype."""

    problem: Problem
    dtype: torch.dtype

    def checks(self, device: torch.device) -> list[Check]:
        """Every output and every gradient compared with the truth."""
        problem, dtype = self.problem, self.dtype
        bound = (FROM_HIDDEN if "hidden" in problem.shapes else FROM_LOGITS)[dtype]
        values = problem.values(dtype)
        leaves: dict[str, Tensor] = {}
        for index, (name, each) in enumerate(values.items()):
            layout = problem.layout if index == 0 else (1, 0)
            leaves[name] = place(each.to(dtype), device, *layout).requires_grad_()
        first = next(iter(leaves))
        if problem.inplace:
            # Part of a graph without a copy, as a leaf cannot be overwritten.
            zero = torch.zeros((), dtype=dtype, device=device, requires_grad=True)
            leaves[first] = leaves[first].detach().add_(zero)
        exact = {name: each.requires_grad_() for name, each in values.items()}
        others = {name: each.to(device) for name, each in problem.others.items()}

        actual = problem.ours(Given(leaves, problem.labels.to(device), others, dtype))
        expected = problem.truth(Given(exact, problem.labels, problem.others, dtype))
        checks = [
            compare(name, actual[name], expected[name], bound.value, least=1.0) for name in expected
        ]
        random = torch.Generator().manual_seed(1)
        outputs, upstreams, exact_outputs, exact_upstreams = [], [], [], []
        for name, output in actual.items():
            if not output.requires_grad:
                continue
            upstream = torch.randn(expected[name].shape, generator=random)
            upstream.view(-1)[1:2] = 0.0  # kernels do not read a row whose gradient is 0
            outputs.append(output)
            upstreams.append(upstream.to(device, output.dtype).view(output.shape))
            exact_outputs.append(expected[name])
            exact_upstreams.append(upstream.double())
        gradients = torch.autograd.grad(outputs, list(leaves.values()), upstreams)
        truths = torch.autograd.grad(exact_outputs, list(exact.values()), exact_upstreams)
        if problem.inplace and gradients[0].data_ptr() != leaves[first].data_ptr():
            raise AssertionError("inplace_backward: expected the gradient in the input's memory")
        for name, gradient, truth in zip(leaves, gradients, truths, strict=True):
            checks.append(compare(f"d{name}", gradient, truth, bound.gradient, least=1e-6))
        return checks
