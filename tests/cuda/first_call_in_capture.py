"""Calls simpo_ext for the first time while it captures a CUDA graph.

    python first_call_in_capture.py logits|logits-inplace|hidden

The program replays the graph on other batches, and compares loss and gradients with the oracle.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import simpo_ext
from support.batches import Batch, make_batch
from support.float64_checks import LossAndGradients, check_of_hidden_states, check_of_logits
from support.linear_batches import LinearBatch, make_linear_batch

DEVICE = "cuda"
DTYPE = torch.bfloat16
OPTIONS: dict[str, Any] = {"sft_weight": 0.2}


class Case(NamedTuple):
    make: Callable[[int], Any]  # makes the batch of a seed
    step: Callable[[Any], LossAndGradients]
    check: Callable[..., None]
    warm: Callable[[Any], None]  # runs what torch must initialize before a capture


def logits_batch(seed: int) -> Batch:
    batch = make_batch(pairs=3, time=33, vocabulary=5003, dtype=DTYPE, seed=seed)
    return Batch(*(tensor.to(DEVICE) for tensor in batch))


def hidden_batch(seed: int) -> LinearBatch:
    # Two chunks of 8192 columns. The number of scored tokens may differ from the capture's.
    batch = make_linear_batch(
        time=12, vocabulary=16384, width=64, dtype=DTYPE, seed=seed, bias=False
    )
    batch.labels[seed, :3] = -100
    return LinearBatch(*(None if x is None else x.to(DEVICE) for x in batch))


def logits_step(inplace: bool) -> Callable[[Batch], LossAndGradients]:
    def step(batch: Batch) -> LossAndGradients:
        leaf = batch.logits.detach().requires_grad_()
        out = simpo_ext.simpo_loss(leaf * 1, batch.labels, inplace_backward=inplace, **OPTIONS)
        return LossAndGradients(out.loss.detach(), torch.autograd.grad(out.loss, leaf))

    return step


def hidden_step(batch: LinearBatch) -> LossAndGradients:
    hidden, weight = (x.detach().requires_grad_() for x in (batch.hidden, batch.weight))
    out = simpo_ext.linear_simpo_loss(hidden, weight, batch.labels, **OPTIONS)
    return LossAndGradients(out.loss.detach(), torch.autograd.grad(out.loss, (hidden, weight)))


def warm_autograd(batch: Batch) -> None:
    """Starts autograd's thread for the GPU, as the first backward does."""
    leaf = batch.logits.detach().requires_grad_()
    torch.autograd.grad((leaf * 1).sum(), leaf)


class Products(torch.autograd.Function):
    """Torch's products of the shapes in hidden_step, forward and backward.

    Each thread creates its own cuBLAS handle, and cuBLAS loads the code of a product at its first
    call. Neither is allowed in a capture.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return rows @ weight.t()

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight = ctx.saved_tensors
        total = torch.mm(dlogits, weight, out_dtype=torch.float32)
        total = torch.addmm(total, dlogits, weight, out_dtype=torch.float32)
        return total.to(rows.dtype), dlogits.t() @ rows + (rows @ weight.t()).t() @ rows


def warm_products(batch: LinearBatch) -> None:
    most = batch.labels[:, 1:].numel()  # Without a count, a capture has rows for all tokens.
    rows = batch.hidden.flatten(0, 1)[:most].detach().requires_grad_()
    weight = batch.weight[:8192].detach().requires_grad_()
    torch.autograd.grad(Products.apply(rows, weight).sum(), (rows, weight))


CASES = {
    "logits": Case(logits_batch, logits_step(False), check_of_logits, warm_autograd),
    "logits-inplace": Case(logits_batch, logits_step(True), check_of_logits, warm_autograd),
    "hidden": Case(hidden_batch, hidden_step, check_of_hidden_states, warm_products),
}


def main(name: str) -> None:
    case = CASES[name]
    static = case.make(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case.warm(static)
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.step(static)  # the first call of simpo_ext

    for seed in (1, 2, 0):
        batch = case.make(seed)
        for destination, source in zip(static, batch, strict=True):
            if source is not None:
                destination.copy_(source)
        graph.replay()
        case.check(captured, batch, **OPTIONS)


if __name__ == "__main__":
    main(*sys.argv[1:])
