"""One batch with everything needed to verify a candidate on it and to run a timed lap."""

from __future__ import annotations

import gc
import math
import time
from typing import Any

import torch
from torch import Tensor

from bench.cases import Batch, make_labels, make_logits, masked
from bench.reference import LossTruth, SequenceReference
from bench.trainers import LossCandidate

PHASES = ("forward", "forward_backward")

# One parallel region of this many elements reaches every thread of torch's pool.
WAKE_ELEMENTS_PER_THREAD = 2**15


class _Computed(torch.autograd.Function):
    """Values that count as computed from another tensor, without a pass over them.

    A model's logits are no leaf, and only such may be overwritten by the backward.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient.sum()


def as_model_output(values: Tensor) -> Tensor:
    """The same memory as a tensor that requires grad and is no leaf."""
    anchor = torch.zeros((), dtype=values.dtype, requires_grad=True)
    return _Computed.apply(values.detach(), anchor)


class Laps:
    """A batch, of which the mask may change, and the candidates' laps over it."""

    def __init__(self, batch: Batch) -> None:
        """Makes the logits, and the truth about the positions that ``batch`` scores."""
        self._labels = make_labels(batch)
        self._logits = make_logits(batch, self._labels)
        scored = masked(self._labels, batch.prompts, batch.ends)
        self._reference = SequenceReference(self._logits, scored)
        self._buffer: Tensor | None = None  # what candidates in place overwrite
        self._wake = torch.ones(WAKE_ELEMENTS_PER_THREAD * torch.get_num_threads())
        self.set_mask(batch)
        self._prepared: Tensor | None = None

    def set_mask(self, batch: Batch) -> None:
        """From now on scores what ``batch`` scores: no more than the first one did."""
        self._batch = batch
        self._masked_labels = masked(self._labels, batch.prompts, batch.ends)
        self._truth: LossTruth = self._reference.truth(batch.prompts, batch.ends)

    def prepare(self, candidate: LossCandidate) -> None:
        """Logits as a model would hand them over."""
        self._prepared = None
        if candidate.is_inplace:
            if self._buffer is None:
                self._buffer = torch.empty_like(self._logits)
            self._buffer.copy_(self._logits)
            self._prepared = as_model_output(self._buffer)
        else:
            self._prepared = as_model_output(self._logits)
        gc.collect(0)

    def run(self, candidate: LossCandidate, phase: str) -> float:
        """Milliseconds of one lap over the prepared logits.

        ``forward`` ends with the loss, and with all that its backward would need in memory.
        ``forward_backward`` ends with the gradient of the logits. What either holds is freed
        after the clock has stopped.
        """
        self._wake.add_(1.0)
        began = time.perf_counter()
        held = self._lap(candidate, phase)
        milliseconds = (time.perf_counter() - began) * 1e3
        del held
        self._prepared = None
        return milliseconds

    def check(self, candidate: LossCandidate) -> dict[str, Any]:
        """Errors of the loss and the gradient against float64, and whether they are allowed.

        ``lap_ms`` is about what a lap takes: this first one, or if that compiled, another.
        """
        self.prepare(candidate)
        began = time.perf_counter()
        loss, gradient = self._lap(candidate, "forward_backward")
        lap_ms = (time.perf_counter() - began) * 1e3
        self._prepared = None
        assert gradient is not None
        scale = max(1.0, abs(self._truth.loss))
        value_error = abs(loss.item() - self._truth.loss) / scale
        gradient_error = self._reference.gradient_error(gradient, self._truth)
        value_tolerance, gradient_tolerance = candidate.tolerances(self._logits.dtype)
        del gradient
        if candidate.kind == "compile":
            self.prepare(candidate)
            lap_ms = self.run(candidate, "forward_backward")
        is_right = value_error <= value_tolerance and gradient_error <= gradient_tolerance
        # JSON knows neither NaN nor infinity.
        return {
            "status": "right" if is_right else "wrong",
            "reason": "" if is_right else "differs from float64 by too much",
            "value_error": value_error if math.isfinite(value_error) else str(value_error),
            "value_tolerance": value_tolerance,
            "gradient_error": (
                gradient_error if math.isfinite(gradient_error) else str(gradient_error)
            ),
            "gradient_tolerance": gradient_tolerance,
            "lap_ms": lap_ms,
        }

    def _lap(self, candidate: LossCandidate, phase: str) -> tuple[Tensor, Tensor | None]:
        assert self._prepared is not None
        loss = candidate.forward(self._prepared, self._masked_labels)
        if phase == "forward":
            return loss, None
        (gradient,) = torch.autograd.grad(loss, self._prepared)
        return loss.detach(), gradient
