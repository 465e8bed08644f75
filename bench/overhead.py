"""What a call costs: forward and backward of the loss of almost nothing, on one thread.

At [2, 8, 64] there is no work to speak of; what is left is Python, dispatch and autograd. Called
again and again, their code and data stay in the caches; between two steps of a training loop
something else goes through them, so a call is also timed after a buffer larger than they are.

    python -m bench overhead [SAMPLES]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from bench.workers import ROOT, environment

BATCH, TIME, VOCABULARY = 2, 8, 64
SAMPLES, CALLS = 60, 50
WARM_CALLS = 50
TOLERANCE = 1e-5
EVICTING_ELEMENTS = 2**25  # of float32: several times any cache


def measure(samples: int = SAMPLES) -> dict[str, Any]:
    """Median microseconds of a call in a fresh process: this project's and the eager formula's.

    ``registered_ops`` is this project's without its fast path, which makes one node of two.

    ``ratio`` is of those in a row; those with ``cold`` in their name are out of cold caches.
    """
    result = subprocess.run(
        [sys.executable, "-m", "bench.overhead", str(samples)],
        capture_output=True,
        text=True,
        check=True,
        env=environment({}),
        cwd=ROOT,
    )
    return json.loads(result.stdout.splitlines()[-1])


def _measure(samples: int) -> dict[str, Any]:
    import torch

    from bench.cases import make_labels, make_logits, masked, synthetic
    from bench.trainers import OURS, loss_candidates
    from simpo_ext._ops import fast_path
    from simpo_ext._ops.fast_path import is_plain_call

    torch.set_num_threads(1)
    batch = synthetic(BATCH, TIME, VOCABULARY, "float32", 0.5)
    labels = make_labels(batch)
    leaf = make_logits(batch, labels).requires_grad_()
    labels = masked(labels, batch.prompts, batch.ends)
    candidates = {each.name: each for each in loss_candidates()}

    def call_of(name: str) -> Callable[[], torch.Tensor]:
        candidate = candidates[name]

        def call() -> torch.Tensor:
            (gradient,) = torch.autograd.grad(candidate.forward(leaf, labels), leaf)
            return gradient

        return call

    def by_registered_ops(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def slow_call() -> torch.Tensor:
            fast_path.is_plain_call = lambda *_: False
            try:
                return call()
            finally:
                fast_path.is_plain_call = is_plain_call

        return slow_call

    ours, eager = call_of(OURS), call_of("Princeton float32")
    calls = {"simpo_ext": ours, "registered_ops": by_registered_ops(ours), "eager": eager}
    expected = eager()
    for name, call in calls.items():
        difference = (call() - expected).abs().max().item()
        if not difference <= TOLERANCE:
            raise AssertionError(f"{name}: the gradient differs by {difference}")
    for call in calls.values():
        for _ in range(WARM_CALLS):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(samples):
        for name, call in calls.items():
            began = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - began) / CALLS * 1e6)
    evicting = torch.ones(EVICTING_ELEMENTS)
    cold: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(samples):
        for name, call in calls.items():
            evicting.add_(1.0)
            began = time.perf_counter()
            call()
            cold[name].append((time.perf_counter() - began) * 1e6)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "shape": [BATCH, TIME, VOCABULARY],
        "simpo_ext_us": medians["simpo_ext"],
        "registered_ops_us": medians["registered_ops"],
        "eager_us": medians["eager"],
        "ratio": medians["simpo_ext"] / medians["eager"],
        "simpo_ext_cold_us": statistics.median(cold["simpo_ext"]),
        "eager_cold_us": statistics.median(cold["eager"]),
    }


if __name__ == "__main__":
    print(json.dumps(_measure(int(sys.argv[1]) if sys.argv[1:] else SAMPLES)))
