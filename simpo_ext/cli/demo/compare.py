"""Time and peak memory of the loss beside the eager formula.

`python -m simpo_ext.demo.compare VARIANT THREADS` measures the peak memory of one variant and
prints it as JSON: a process remembers its peak, so each variant gets a process of its own.
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
    """Median seconds and peak bytes beyond the logits by variant; None where unmeasurable."""

    shape: tuple[int, int, int]
    logits_bytes: int
    threads: int
    repeats: int
    seconds: dict[str, float]
    peak_bytes: dict[str, int | None]


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss as trainers write it: logits [2P, T, V], labels [2P, T] -> 0-d."""
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
    """Verify that the variants agree, then measure them; DemoError where they differ."""
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
    """Forward and backward of the variants, timed in turn once they are known to agree."""
    source, labels = _inputs(shape)
    buffer = torch.empty_like(source)

    def once(variant: str) -> tuple[float, Tensor, Tensor]:
        buffer.copy_(source)  # in place, the gradient has overwritten it
        logits = _as_model_output(buffer)
        started = time.perf_counter()
        loss = VARIANTS[variant](logits, labels)
        (gradient,) = torch.autograd.grad(loss, logits)
        return time.perf_counter() - started, loss.detach(), gradient

    _, true_loss, true_gradient = once("eager")
    for variant in ("simpo_ext", "inplace"):  # which also warms them up
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
    """Logits [2P, T, V] and labels [2P, T], the latter ignored over the prompt."""
    generator = torch.Generator().manual_seed(0)
    # Filled in place: a temporary would raise the peak before it is measured.
    logits = torch.empty(shape).normal_(std=2.0, generator=generator)
    labels = torch.randint(shape[2], shape[:2], generator=generator)
    labels[:, : min(PROMPT_TOKENS, shape[1] // 4)] = IGNORE_INDEX
    return logits, labels


def _as_model_output(logits: Tensor) -> Tensor:
    """Make `logits` part of a graph without a copy, as a leaf may not be overwritten."""
    return logits.detach().add_(torch.zeros((), requires_grad=True))


def _peak_in_child(variant: str, shape: tuple[int, int, int]) -> int | None:
    if _status_bytes("VmHWM") is None:
        return None
    # The child is to find this very package, however sys.path came by it.
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
        print(f"peak memory of {variant} not measured: {error}", file=sys.stderr)
        return None
    return None if peak is None else int(peak)


def peak_bytes(variant: str, shape: tuple[int, int, int]) -> int | None:
    """The growth of this process's memory over the logits' at the peak of one run."""
    # Whatever a first call loads or allocates once is no part of the loss.
    small, small_labels = _inputs((2, 4, 64))
    small = _as_model_output(small)
    torch.autograd.grad(VARIANTS[variant](small, small_labels), small)

    logits, labels = _inputs(shape)
    logits = _as_model_output(logits)
    before = _status_bytes("VmRSS")
    torch.autograd.grad(VARIANTS[variant](logits, labels), logits)
    # The high-water mark of this address space. That of getrusage starts from the parent's.
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
