"""One linear batch with everything needed to verify a candidate on it and to run a timed lap."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.cases import masked
from bench.gate import Gate, GatedTimes, Samples, Turn
from bench.laps import WAKE_ELEMENTS_PER_THREAD
from bench.linear_batch import LinearBatch, make_tensors
from bench.linear_floor import Floor
from bench.linear_reference import LinearReference, Truth
from bench.linear_subjects import LIGER_COMPILED, LinearCandidate
from bench.workers import first_line
from bench.workload import IGNORE_INDEX
from simpo_ext._ops.logits_plan import default_logits_budget

FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"

Gradients = tuple[Tensor, ...]


class LinearLaps:
    """Tensors, of which the mask may change, and the candidates' laps over them."""

    def __init__(self, each: LinearBatch, device: torch.device) -> None:
        self._device = device
        self._tensors = make_tensors(each, device)
        self._reference = LinearReference(self._tensors)
        self._wake = torch.ones(WAKE_ELEMENTS_PER_THREAD * torch.get_num_threads())
        self.set_mask(each)

    def set_mask(self, each: LinearBatch) -> None:
        """From now on scores what ``each`` scores."""
        batch = each.batch
        self._labels = masked(self._tensors.labels, batch.prompts, batch.ends)
        # A trainer's collator knows the number, and on a GPU it saves a wait.
        self._valid = batch.valid_rows if self._device.type == "cuda" else None
        self._truths: dict[str, Truth] = {}

    def make_floor(self) -> Floor:
        """The products over what is scored now."""
        following = torch.full_like(self._labels, IGNORE_INDEX)
        following[:, :-1] = self._labels[:, 1:]
        rows = self._tensors.hidden.detach()[following != IGNORE_INDEX]
        return Floor(rows, self._tensors.weight.detach(), self._synchronize)

    def run(self, candidate: LinearCandidate, phase: str) -> float:
        """Milliseconds of one lap. What it made is freed after the clock has stopped."""
        self._wake.add_(1.0)
        self._synchronize()
        began = time.perf_counter()
        held = self.lap(candidate, phase)
        self._synchronize()
        milliseconds = (time.perf_counter() - began) * 1e3
        del held
        return milliseconds

    def lap(self, candidate: LinearCandidate, phase: str) -> tuple[Tensor, Gradients]:
        """The loss, and the gradients of hidden and weight.

        The forward is an evaluation's: without gradients, though its inputs require them.
        """
        inputs = (self._tensors.hidden, self._tensors.weight)
        if phase == FORWARD:
            with torch.no_grad():
                return candidate.loss(*inputs, self._labels, self._valid), ()
        loss = candidate.loss(*inputs, self._labels, self._valid)
        return loss.detach(), torch.autograd.grad(loss, inputs)

    def check(self, candidate: LinearCandidate) -> dict[str, Any]:
        """Errors against float64, and whether they are allowed.

        ``lap_ms`` is what this first lap took, its compilation, if there is one, included.
        """
        if candidate.work not in self._truths:
            self._truths[candidate.work] = self._reference.truth(self._labels, candidate.work)
        self._synchronize()
        began = time.perf_counter()
        loss, gradients = self.lap(candidate, FORWARD_BACKWARD)
        self._synchronize()
        lap_ms = (time.perf_counter() - began) * 1e3
        errors = self._reference.errors(self._truths[candidate.work], loss, *gradients)
        del gradients
        tolerance = candidate.tolerance(self._tensors.hidden.dtype)
        is_right = (
            errors.loss <= tolerance.loss
            and errors.gradient <= tolerance.gradient
            and errors.norm <= tolerance.norm
        )
        figures = {
            "value_error": errors.loss,
            "value_tolerance": tolerance.loss,
            "gradient_error": errors.gradient,
            "gradient_tolerance": tolerance.gradient,
            "norm_error": errors.norm,
            "norm_tolerance": tolerance.norm,
        }
        return {
            "status": "right" if is_right else "wrong",
            "reason": "" if is_right else "differs from float64 by too much",
            # JSON knows neither NaN nor infinity.
            **{name: x if math.isfinite(x) else str(x) for name, x in figures.items()},
            "lap_ms": lap_ms,
        }

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def describe(each: LinearBatch, device: torch.device) -> dict[str, Any]:
    """The geometry of a case, as its results hold it."""
    batch = each.batch
    return {
        "name": each.name,
        "batch": batch.batch,
        "time": batch.time,
        "hidden": each.hidden,
        "vocabulary": batch.vocabulary,
        "dtype": batch.dtype,
        "share": batch.share,
        "tokens": each.tokens,
        "valid_rows": batch.valid_rows,
        "valid_fraction": batch.valid_fraction,
        "logits_bytes": batch.logits_bytes,
        "gradient_bytes": each.hidden_bytes + each.weight_bytes,
        "compacted_bytes": each.compacted_bytes,
        "default_budget": default_logits_budget(device),
    }


def first_row(laps: LinearLaps, candidate: LinearCandidate, device: torch.device) -> dict[str, Any]:
    """What a candidate is, and how its verification went; only status "right" is timed."""
    row = {
        "name": candidate.name,
        "kind": "ours" if candidate.is_ours else "peer",
        "work": candidate.work,
    }
    can_run, reason = candidate.available(device)
    if not can_run:
        return {**row, "status": "unavailable", "reason": reason}
    try:
        row.update(laps.check(candidate))
        if candidate.name == LIGER_COMPILED and row["status"] == "right":  # the first one compiled
            row["lap_ms"] = laps.run(candidate, FORWARD_BACKWARD)
    except Exception as error:  # of a foreign package, whatever it is
        row.update(status="failed", reason=first_line(error))
    gc.collect()
    return row


# ---- turns -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearTurn(Turn):
    """A subject's turns, and how many samples each of them takes."""

    samples_a_turn: int = 1
    is_warmed: bool = False  # a run that is not timed comes first


def alternate(turns: dict[Any, LinearTurn], gate: Gate) -> dict[Any, GatedTimes]:
    """As gate.take_turns, with slow subjects that are not warmed and change after each sample."""
    samples: dict[Any, Samples] = {key: Samples() for key in turns}
    left = {key: turn.samples for key, turn in turns.items()}
    while any(left.values()):
        for key, turn in turns.items():
            if left[key] == 0:
                continue
            if turn.is_warmed:
                turn.warm()
            for _ in range(min(turn.samples_a_turn, left[key])):
                gc.collect(0)
                gate.sample(turn.prepare, turn.run, samples[key])
                left[key] -= 1
    return {key: samples[key].times(turn.samples) for key, turn in turns.items()}
