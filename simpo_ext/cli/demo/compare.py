"""Compares time and peak memory of the loss with the eager formula.

`python -m simpo_ext.cli.demo.compare VARIANT THREADS 2P T V` measures the peak memory of one
variant and prints it as JSON. Each variant needs its own process, because a process cannot reset
its peak.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import simpo_ext

from .batches import IGNORE_INDEX
from .messages import DemoError

SHAPE = (8, 128, 32000)  # [2P, T, V]: four pairs under a Llama-2 vocabulary
PROMPT_TOKENS = 32
BETA, GAMMA_BETA_RATIO = 2.0, 0.5
REPEATS = 5
CHILD_TIMEOUT_S = 120


@dataclass(frozen=True)
class Comparison:
    """Median seconds and peak bytes beyond the logits by variant; None if not measured."""

    shape: tuple[int, int, int]
    logits_bytes: int
    threads: int
    repeats: int
    seconds: dict[str, float]
    peak_bytes: dict[str, int | None]


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss as trainers compute it, from logits [2P, T, V] and labels [2P, T] to a scalar."""
    labels = labels[:, 1:]
    counted = labels != IGNORE_INDEX
    token_logps = (
        logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    )
    logps = (token_logps * counted).sum(-1) / counted.sum(-1)
    chosen, rejected = logps.chunk(2)
    return -logsigmoid(BETA * (chosen - rejected - GAMMA_BETA_RATIO)).mean()


def _simpo(logits: Tensor, labels: Tensor, *, inplace: bool) -> Tensor:
    return simpo_ext.simpo_loss(
        logits,
        labels,
        beta=BETA,
        gamma_beta_ratio=GAMMA_BETA_RATIO,
        inplace_backward=inplace,
    ).loss


VARIANTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "eager": eager,
    "simpo_ext": lambda logits, labels: _simpo(logits, labels, inplace=False),
    "inplace": lambda logits, labels: _simpo(logits, labels, inplace=True),
}


def compare(shape: tuple[int, int, int] = SHAPE) -> Comparison:
    """Measure the variants. Raise DemoError if their results differ."""
    seconds = _median_seconds(shape)
    with ThreadPoolExecutor(len(VARIANTS)) as pool:
        peaks = pool.map(lambda variant: _peak_in_child(variant, shape), VARIANTS)
        peak_bytes = dict(zip(VARIANTS, peaks, strict=True))
    return Comparison(
        shape=shape,
        logits_bytes=4 * math.prod(shape),
        threads=torch.get_num_threads(),
        repeats=REPEATS,
        seconds=seconds,
        peak_bytes=peak_bytes,
    )


def _median_seconds(shape: tuple[int, int, int]) -> dict[str, float]:
    """Check that the variants agree, then time forward and backward of each in turn."""
    source, labels = _inputs(shape)
    buffer = torch.empty_like(source)

    def once(variant: str) -> tuple[float, Tensor, Tensor]:
        buffer.copy_(source)  # the in-place variant has overwritten it
        logits = _as_model_output(buffer)
        started = time.perf_counter()
        loss = VARIANTS[variant](logits, labels)
        (gradient,) = torch.autograd.grad(loss, logits)
        return time.perf_counter() - started, loss.detach(), gradient

    _, true_loss, true_gradient = once("eager")
    for variant in ("simpo_ext", "inplace"):  # these calls also warm them up
        _, loss, gradient = once(variant)
        _check_agreement(variant, loss, true_loss, gradient, true_gradient)
    del true_gradient, gradient

    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(REPEATS):
        for variant, measured in times.items():
            measured.append(once(variant)[0])
    return {variant: statistics.median(measured) for variant, measured in times.items()}


def _check_agreement(
    variant: str, loss: Tensor, true_loss: Tensor, gradient: Tensor, true_gradient: Tensor
) -> None:
    scale = true_gradient.abs().max().item()
    error = (gradient - true_gradient).abs().max().item()
    if abs(loss.item() - true_loss.item()) > 1e-5 * abs(true_loss.item()) or error > 1e-4 * scale:
        raise DemoError(
            f"{variant} and the eager formula differ: loss {loss.item():.7g} and "
            f"{true_loss.item():.7g}, gradients by up to {error:.3g} of {scale:.3g}"
        )


def _inputs(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Random logits [2P, T, V] and labels [2P, T], with IGNORE_INDEX over the prompt."""
    generator = torch.Generator().manual_seed(0)
    # A temporary would raise the peak before the measurement, so this fills in place.
    logits = torch.empty(shape).normal_(std=2.0, generator=generator)
    labels = torch.randint(shape[2], shape[:2], generator=generator)
    labels[:, : min(PROMPT_TOKENS, shape[1] // 4)] = IGNORE_INDEX
    return logits, labels


def _as_model_output(logits: Tensor) -> Tensor:
    """Make `logits` a non-leaf of a graph without a copy: autograd forbids overwriting a leaf."""
    return logits.detach().add_(torch.zeros((), requires_grad=True))


def _peak_in_child(variant: str, shape: tuple[int, int, int]) -> int | None:
    if _status_bytes("VmHWM") is None:
        return None
    # The child must import this copy of the package, even if sys.path was changed at run time.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, "-m", __name__, variant, str(torch.get_num_threads())]
    try:
        child = subprocess.run(
            [*command, *map(str, shape)],
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONPATH": path},
            timeout=CHILD_TIMEOUT_S,
        )
        peak = json.loads(child.stdout)["peak_bytes"]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        print(f"cannot measure the peak memory of {variant}: {error}", file=sys.stderr)
        return None
    return None if peak is None else int(peak)


def peak_bytes(variant: str, shape: tuple[int, int, int]) -> int | None:
    """The peak of this process's memory during one run, minus its memory with the logits."""
    # The first call loads libraries and allocates once. That memory is not part of the loss.
    small, small_labels = _inputs((2, 4, 64))
    small = _as_model_output(small)
    torch.autograd.grad(VARIANTS[variant](small, small_labels), small)

    logits, labels = _inputs(shape)
    logits = _as_model_output(logits)
    before = _status_bytes("VmRSS")
    torch.autograd.grad(VARIANTS[variant](logits, labels), logits)
    # VmHWM is the peak of this address space. The peak of getrusage starts at the parent's value.
    peak = _status_bytes("VmHWM")
    return None if before is None or peak is None else peak - before


def _status_bytes(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _main(arguments: list[str]) -> None:
    variant, threads, pairs, time_steps, vocabulary = arguments
    torch.set_num_threads(int(threads))
    shape = (int(pairs), int(time_steps), int(vocabulary))
    print(json.dumps({"peak_bytes": peak_bytes(variant, shape)}))


if __name__ == "__main__":
    _main(sys.argv[1:])
