"""Peak memory of a candidate beyond its batch, by the resident pages of a fresh process.

The process makes the batch, lets the candidate work on a small one so that code and threads are
loaded, and notes what is resident. It then resets the kernel's record of the peak, or where that
is not permitted, relies on the peak so far not being above it, and runs forward and backward.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.workers import ROOT, environment, first_line

# Of the small batch: enough logits for every thread to take part.
WARM_TIME, WARM_VOCABULARY = 16, 8192


def peak_extra_mib(batch: dict[str, Any], candidate: str) -> dict[str, Any]:
    """Measures in a new process, with the allocator as it comes.

    Args:
        batch: As :meth:`bench.cases.Batch.to_json` gives it.
        candidate: A name.

    Returns:
        ``forward_mib`` and ``forward_backward_mib`` over the whole of both, and ``method``; or
        ``reason`` why not.
    """
    return measured_apart("bench.memory", {"fields": batch, "name": candidate})


def measured_apart(module: str, request: dict[str, Any]) -> dict[str, Any]:
    """What a new process of the module answers (answer_request); or ``reason`` why it does not."""
    result = subprocess.run(
        [sys.executable, "-m", module, json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
        env=environment({}),
        cwd=ROOT,
    )
    if result.returncode != 0:
        words = result.stderr.strip().splitlines()
        reason = f"exit status {result.returncode}: {words[-1] if words else 'no output'}"
        return {"reason": reason}
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


# ---- in the fresh process --------------------------------------------------------------------


def _kib(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"^{field}:\s*(\d+) kB", status, re.MULTILINE)
    assert found is not None, field
    return int(found[1])


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def _give_back_free_memory() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@dataclass(frozen=True)
class Baseline:
    """What is resident before a candidate is at work."""

    kib: int
    is_peak_reset: bool

    @classmethod
    def take(cls) -> Baseline:
        """Of now, without what is free."""
        _give_back_free_memory()
        return cls(is_peak_reset=_reset_peak(), kib=_kib("VmRSS"))

    @property
    def reason(self) -> str | None:
        """Why peaks cannot be told from here on."""
        if not self.is_peak_reset and _kib("VmHWM") > self.kib + 1024:
            return "the kernel does not let the peak be reset"
        return None

    @property
    def method(self) -> str:
        """For the results."""
        return "VmHWM after reset" if self.is_peak_reset else "VmHWM"

    def peak_extra_mib(self) -> float:
        """Of what came since."""
        return max(0, _kib("VmHWM") - self.kib) / 1024


def _measure(fields: dict[str, Any], name: str) -> dict[str, Any]:
    import torch

    from bench.cases import Batch, make_labels, make_logits, masked, synthetic
    from bench.laps import as_model_output
    from bench.trainers import loss_candidates

    batch = Batch.from_json(fields)
    candidate = {each.name: each for each in loss_candidates()}[name]
    can_run, reason = candidate.available(torch.device("cpu"))
    if not can_run:
        return {"reason": reason}
    small = synthetic(batch.batch, WARM_TIME, WARM_VOCABULARY, batch.dtype)
    # Compiled code is of one shape, which has to be compiled before anything is measured.
    for each in (batch,) if candidate.kind == "compile" else (small,):
        labels = make_labels(each)
        logits = as_model_output(make_logits(each, labels))
        loss = candidate.forward(logits, masked(labels, each.prompts, each.ends))
        torch.autograd.grad(loss, logits)
        del labels, logits, loss

    labels = make_labels(batch)
    logits = as_model_output(make_logits(batch, labels))
    labels = masked(labels, batch.prompts, batch.ends)
    baseline = Baseline.take()
    if baseline.reason is not None:
        return {"reason": baseline.reason}

    loss = candidate.forward(logits, labels)
    forward_mib = baseline.peak_extra_mib()
    gradient = torch.autograd.grad(loss, logits)
    forward_backward_mib = baseline.peak_extra_mib()
    del gradient
    return {
        "forward_mib": forward_mib,
        "forward_backward_mib": forward_backward_mib,
        "method": baseline.method,
    }


def answer_request(measure: Callable[..., dict[str, Any]]) -> None:
    """Calls measure with the command line's JSON, and prints one line of JSON."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        answer = measure(**json.loads(sys.argv[1]))
    except Exception as error:  # of a foreign package, whatever it is
        answer = {"reason": first_line(error)}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    answer_request(_measure)
