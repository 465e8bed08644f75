"""Numerical checks of the installed build, on the CPU and on a GPU if there is one.

One check compares float64 gradients with central differences of the loss. The others compare values
and gradients in every dtype with the same loss in plain PyTorch operations and float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import build_info, functional

# Relative bounds for float32 sums of a few thousand terms and one rounding to the gradient's dtype.
_LOSS_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2e-6,
    torch.float16: 2e-6,
}
_GRADIENT_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-10,
}

_VARIANTS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid, label smoothing": {"label_smoothing": 0.1},
    "sigmoid, SFT per sequence": {"sft_weight": 0.3},
    "sigmoid, SFT per token": {"sft_weight": 0.3, "sft_reduction": "token"},
    "sigmoid, sums of log-probs": {"average_log_prob": False, "beta": 0.1},
    "hinge": {"loss_type": "hinge"},
    "scale and softcap": {"logit_scale": 0.7, "softcap": 5.0},
}


class Check(NamedTuple):
    """One comparison. It passes if error <= bound."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound. NaN is not."""
        return self.error <= self.bound


def run() -> int:
    """Runs and prints every check.

    Returns:
        0 if all passed, else 1.
    """
    failures = 0
    for check in _all_checks():
        failures += not check.passed
        verdict = "ok" if check.passed else "FAILED"
        print(f"{verdict:6s}  {check.name:62s} error {check.error:8.1e}  bound {check.bound:.1e}")
    print(f"{failures} failed" if failures else "all passed")
    return 1 if failures else 0


def _all_checks() -> Iterator[Check]:
    for device in _devices():
        for name, options in _VARIANTS.items():
            yield _finite_differences(name, options, device)
        for dtype in _LOSS_TOLERANCE:
            for name, options in _VARIANTS.items():
                yield from _against_float64(name, options, dtype, device)
            yield _in_place(dtype, device)
            yield from _linear(dtype, device)


def _devices() -> tuple[str, ...]:
    has_kernels = build_info()["cuda_runtime_version"] and torch.version.hip is None
    return ("cpu", "cuda") if has_kernels and torch.cuda.is_available() else ("cpu",)


def _batch(dtype: torch.dtype, vocabulary: int, device: str) -> tuple[Tensor, Tensor]:
    """Two pairs of six positions, two of them prompt, with logits that favour a few tokens."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, 6, vocabulary)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 2.0
    labels = torch.randint(vocabulary, shape[:2], generator=generator)
    logits.scatter_add_(2, labels.roll(-1, 1).unsqueeze(2), torch.full((4, 6, 1), 3.0).double())
    labels[:, :2] = -100
    labels[1, -1] = -100
    return logits.to(device, dtype), labels.to(device)


def _finite_differences(name: str, options: dict[str, Any], device: str) -> Check:
    logits, labels = _batch(torch.float64, 5, device)

    def loss(x: Tensor) -> Tensor:
        return functional.simpo_loss(x, labels, **options).loss

    _, gradient = _value_and_gradient(loss, logits)
    differences = torch.zeros_like(logits)
    for index in range(logits.numel()):
        step = torch.zeros_like(logits)
        step.view(-1)[index] = 1e-5
        differences.view(-1)[index] = (loss(logits + step) - loss(logits - step)).item() / 2e-5
    error = (gradient - differences).abs().max() / gradient.abs().max()
    # The differences have two errors: the rounding of the loss divided by the step, 1e-16 / 1e-5,
    # and the third derivative times the squared step, 1e-10.
    return Check(f"{device}: gradient and central differences, {name}", error.item(), 1e-8)


def _written_out(
    logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.5,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    sft_reduction: str = "sequence",
    average_log_prob: bool = True,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The loss in plain PyTorch operations, for batches without empty sequences."""
    z = logits[:, :-1] * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    targets = labels[:, 1:]
    valid = targets != -100
    token_logps = z.log_softmax(-1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2) * valid
    logps = token_logps.sum(1)
    if average_log_prob:
        logps = logps / valid.sum(1)
    chosen, rejected = logps.chunk(2)
    margin = beta * (chosen - rejected - gamma_beta_ratio)
    if loss_type == "hinge":
        loss = torch.relu(1 - margin).mean()
    else:
        losses = -F.logsigmoid(margin) * (1 - label_smoothing)
        loss = (losses - F.logsigmoid(-margin) * label_smoothing).mean()
    if sft_reduction == "token":
        sft = -token_logps.chunk(2)[0].sum() / valid.chunk(2)[0].sum()
    else:
        sft = -chosen.mean()
    return loss + sft_weight * sft


def _value_and_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach().double(), gradient.double()


def _against_float64(
    name: str, options: dict[str, Any], dtype: torch.dtype, device: str
) -> Iterator[Check]:
    logits, labels = _batch(dtype, 2051, device)  # several blocks and a partial one
    value, gradient = _value_and_gradient(
        lambda x: functional.simpo_loss(x, labels, **options).loss, logits
    )
    expected_value, expected_gradient = _value_and_gradient(
        lambda x: _written_out(x, labels, **options), logits.double()
    )
    value_error = ((value - expected_value).abs() / expected_value.abs().clamp(min=1.0)).item()
    largest = expected_gradient.abs().max()
    gradient_error = ((gradient - expected_gradient).abs().max() / largest).item()
    where = f"{str(dtype).removeprefix('torch.')}, {name}"
    yield Check(f"{device}: loss, {where}", value_error, _LOSS_TOLERANCE[dtype])
    yield Check(f"{device}: gradient, {where}", gradient_error, _GRADIENT_TOLERANCE[dtype])


def _in_place(dtype: torch.dtype, device: str) -> Check:
    logits, labels = _batch(dtype, 2051, device)
    _, expected = _value_and_gradient(lambda x: functional.simpo_loss(x, labels).loss, logits)
    _, gradient = _value_and_gradient(
        lambda x: functional.simpo_loss(x * 1, labels, inplace_backward=True).loss, logits
    )
    where = str(dtype).removeprefix("torch.")
    return Check(
        f"{device}: in-place gradient, {where}", (gradient - expected).abs().max().item(), 0.0
    )


def _linear(dtype: torch.dtype, device: str) -> Iterator[Check]:
    generator = torch.Generator().manual_seed(0)
    vocabulary, size = 9001, 32  # several chunks, the last one narrower
    _, labels = _batch(dtype, vocabulary, device)
    hidden = torch.randn(*labels.shape, size, generator=generator).to(device, dtype)
    weight = (torch.randn(vocabulary, size, generator=generator) * 0.5).to(device, dtype)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    out = functional.linear_simpo_loss(*leaves, labels, logits_budget_bytes=0)
    gradients = torch.autograd.grad(out.loss, leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = F.linear(*exact)
    expected = torch.autograd.grad(_written_out(logits, labels), exact)
    # The logits, their gradient and its products are each rounded to the dtype.
    bound = 4 * _GRADIENT_TOLERANCE[dtype]
    where = str(dtype).removeprefix("torch.")
    for name, ours, theirs in zip(("hidden", "weight"), gradients, expected, strict=True):
        error = ((ours.double() - theirs).norm() / theirs.norm()).item()
        yield Check(f"{device}: linear gradient of {name}, {where}", error, bound)
