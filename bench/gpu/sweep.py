"""Variants of the kernels of token_logps as candidates: threads times loads in flight."""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common.cases import IGNORE_INDEX, following
from bench.common.peers import Candidate, Forward, pair_loss


class _TokenLogps(torch.autograd.Function):
    """Log-probabilities [B, T] of bfloat16 logits [B, T, V] and labels that are not shifted."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, library: ctypes.CDLL, variant: int
    ) -> Tensor:
        logps = logits.new_full(labels.shape, torch.nan, dtype=torch.float32)
        saved = logits, labels, logps.clone(), logps.double()  # largest logit, sum of exponentials
        _call(library.token_logps, variant, *saved[:2], logps, *saved[2:])
        ctx.save_for_backward(*saved)
        ctx.library, ctx.variant = library, variant
        return logps

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, largest, sum_exp = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        tensors = (logits, labels, grad_logps.contiguous(), largest, sum_exp, gradient)
        _call(ctx.library.token_logps_backward, ctx.variant, *tensors)
        return gradient, None, None, None


def _call(function: Any, variant: int, logits: Tensor, *others: Tensor) -> None:
    """Calls a function of cuda/sweep.cu on the current stream."""
    stream = torch.cuda.current_stream().cuda_stream if logits.is_cuda else 0
    sizes = map(ctypes.c_int64, logits.shape)
    pointers = [ctypes.c_void_p(each.data_ptr()) for each in (logits, *others)]
    error = function(variant, *sizes, *pointers, ctypes.c_void_p(stream))
    if error:
        raise RuntimeError(f"the launch failed with cudaError_t {error}")


def _loss(library: ctypes.CDLL, variant: int) -> Forward:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        logps = _TokenLogps.apply(logits, labels, library, variant)
        return pair_loss(logps.double().sum(1) / (following(labels) != IGNORE_INDEX).sum(1))

    return loss


def variants(library: Path) -> list[Candidate]:
    """Those that cuda/sweep.cu was compiled with."""
    loaded = ctypes.CDLL(str(library))
    return [
        Candidate(
            f"{loaded.threads_of(index)} threads x {loaded.unroll_of(index)}",
            "sequence_loss",
            partial(_loss, loaded, index),
            is_ours=True,
        )
        for index in range(loaded.num_variants())
    ]
