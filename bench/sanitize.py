"""Runs every kernel on small tensors at the edge of their memory, for compute-sanitizer to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m bench.sanitize

Every tensor of logits ends where its allocation ends, and starts at an odd element of it; without
torch's caching allocator, an access beyond is one that memcheck sees. Inputs are made on the CPU,
so that few kernels but this project's run. Results are held against float64.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import simpo_ext

IGNORE_INDEX = -100
BATCH, TIME = 4, 3


class Layout(NamedTuple):
    """Where rows of V logits lie in their allocation, in elements."""

    vocabulary: int
    offset: int
    padding: int  # between rows


LAYOUTS = (
    Layout(1, 1, 0),  # less than a vector
    Layout(7, 3, 0),
    Layout(130, 1, 1),  # a head and a tail in every row, each alignment in turn
    Layout(1000, 0, 0),  # whole vectors, all aligned
    Layout(4099, 5, 0),  # more than a pass of a small block; rows drift through the alignments
    Layout(20003, 1, 2),  # a large block
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Of the results in units of their largest: float32 sums of V terms; the rounding of the gradient.
VALUE_TOLERANCE = {torch.float64: 1e-12}
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}
DEFAULT_TOLERANCE = 2e-6


def _place(values: Tensor, layout: Layout, device: torch.device) -> Tensor:
    """Values [B, T, V] in an allocation of their own, which ends with the last of them."""
    stride = layout.vocabulary + layout.padding
    strides = (TIME * stride, stride, 1)
    length = layout.offset + (BATCH * TIME - 1) * stride + layout.vocabulary
    storage = torch.zeros(length, dtype=values.dtype)
    storage.as_strided(values.shape, strides, layout.offset).copy_(values)
    return storage.to(device).as_strided(values.shape, strides, layout.offset)


def _formula(logits: Tensor, labels: Tensor, loss_type: str) -> tuple[Tensor, Tensor]:
    """Token log-probabilities [B, T] and the SimPO loss [], in plain PyTorch."""
    mask = labels != IGNORE_INDEX
    logps = logits.log_softmax(-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2) * mask
    chosen, rejected = (logps.sum(1) / mask.sum(1)).chunk(2)
    z = chosen - rejected - 0.5
    losses = torch.relu(1.0 - 2.0 * z) if loss_type == "hinge" else -logsigmoid(2.0 * z)
    return logps, losses.mean()


def _check(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    difference = (actual.detach().cpu().double() - expected).abs().max().item()
    is_right = difference <= tolerance * max(1e-3, expected.abs().max().item())
    if not is_right:
        print(f"{what}: expected an error of at most {tolerance:g}, got {difference:g}")
    return is_right


def run(layout: Layout, dtype: torch.dtype, device: torch.device) -> bool:
    """Forward, backward and in-place backward of log-probabilities and losses; whether right."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, TIME, layout.vocabulary)
    values = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3.0).to(dtype)
    labels = torch.randint(layout.vocabulary, shape[:2], generator=generator)
    labels[0, 0] = labels[2, 1] = labels[3, 2] = IGNORE_INDEX
    upstream = torch.randn(shape[:2], generator=generator, dtype=torch.float64).float()
    upstream[1, 1] = 0.0
    on_device = labels.to(device)

    value_tolerance = VALUE_TOLERANCE.get(dtype, DEFAULT_TOLERANCE)
    gradient_tolerance = GRADIENT_TOLERANCE.get(dtype, DEFAULT_TOLERANCE)
    all_right = True
    for loss_type, inplace in itertools.product(("none", "sigmoid", "hinge"), (False, True)):
        truth = values.double().requires_grad_()
        logits = _place(values, layout, device)
        if inplace:
            logits = logits.detach().add_(
                torch.zeros((), dtype=dtype, device=device, requires_grad=True)
            )
        else:
            logits = logits.detach().requires_grad_()
        logps, loss = _formula(truth, labels, loss_type)
        if loss_type == "none":
            expected, weight = logps, upstream.double()
            actual = simpo_ext.token_logps(logits, on_device, shift=False, inplace_backward=inplace)
            actual_weight = upstream.to(device, actual.dtype)
        else:
            expected, weight, actual_weight = loss, None, None
            actual = simpo_ext.simpo_loss(
                logits, on_device, loss_type=loss_type, shift=False, inplace_backward=inplace
            ).loss
        (expected_gradient,) = torch.autograd.grad(expected, truth, weight)
        (gradient,) = torch.autograd.grad(actual, logits, actual_weight)
        where = f"{layout} {dtype} {loss_type} {'in place' if inplace else 'out of place'}"
        all_right &= _check(f"values, {where}", actual, expected.detach(), value_tolerance)
        all_right &= _check(f"gradient, {where}", gradient, expected_gradient, gradient_tolerance)
    return all_right


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all layouts and dtypes.

    Returns:
        0 if all results were right, else 1.
    """
    parser = argparse.ArgumentParser(description="Every kernel, at the edge of its memory.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = torch.device(parser.parse_args(arguments).device)
    results = [run(layout, dtype, device) for layout in LAYOUTS for dtype in DTYPES]
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{sum(results)} of {len(results)} layouts and dtypes right on {device.type}")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
