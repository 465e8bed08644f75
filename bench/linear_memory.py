"""Peak memory of a linear candidate beyond its inputs, by the resident pages of a fresh process.

As memory.py does it for logits: the process makes the tensors, lets the candidate work on a small
batch so that code and threads are loaded, and notes what is resident. The forward runs without
gradients, as in an evaluation; forward and backward, whose gradients count, run in a process of
their own, where nobody holds memory of the forward for later.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from bench import memory
from bench.workers import ROOT, environment, first_line

# Of the small batch: enough for every thread to take part.
WARM_TIME, WARM_VOCABULARY, WARM_HIDDEN = 32, 4096, 256


PHASES = ("forward", "forward_backward")


def peak_extra_mib(batch: dict[str, Any], candidate: str) -> dict[str, Any]:
    """Measures in new processes.

    Args:
        batch: As :meth:`bench.linear_batch.LinearBatch.to_json` gives it.
        candidate: A name.

    Returns:
        ``forward_mib`` and ``forward_backward_mib``, and ``method``; or ``reason`` why not.
    """
    answer: dict[str, Any] = {}
    for phase in PHASES:
        answer |= _measured_apart({"batch": batch, "name": candidate, "phase": phase})
    return {"reason": answer["reason"]} if "reason" in answer else answer


def _measured_apart(request: dict[str, Any]) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-m", "bench.linear_memory", json.dumps(request)],
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


def _measure(fields: dict[str, Any], name: str, phase: str) -> dict[str, Any]:
    import torch

    from bench.cases import masked
    from bench.linear_batch import LinearBatch, make_tensors, synthetic
    from bench.linear_subjects import LIGER_COMPILED, linear_candidates

    each = LinearBatch.from_json(fields)
    cpu = torch.device("cpu")
    candidate = {each.name: each for each in linear_candidates()}[name]
    can_run, reason = candidate.available(cpu)
    if not can_run:
        return {"reason": reason}
    sizes = (each.batch.batch, WARM_TIME, WARM_HIDDEN, WARM_VOCABULARY)
    small = synthetic(*sizes, each.batch.dtype)
    # Compiled code is of one shape, which has to be compiled before anything is measured.
    warm = each if name == LIGER_COMPILED else small
    tensors = make_tensors(warm, cpu)
    labels = masked(tensors.labels, warm.batch.prompts, warm.batch.ends)
    loss = candidate.loss(tensors.hidden, tensors.weight, labels, None)
    torch.autograd.grad(loss, (tensors.hidden, tensors.weight))
    del tensors, labels, loss

    tensors = make_tensors(each, cpu)
    labels = masked(tensors.labels, each.batch.prompts, each.batch.ends)
    inputs = (tensors.hidden, tensors.weight)
    memory._give_back_free_memory()
    is_reset = memory._reset_peak()
    before = memory._kib("VmRSS")
    if not is_reset and memory._kib("VmHWM") > before + 1024:
        return {"reason": "the kernel does not let the peak be reset"}
    if phase == "forward":
        with torch.no_grad():
            loss = candidate.loss(*inputs, labels, None)
    else:
        loss = candidate.loss(*inputs, labels, None)
        gradients = torch.autograd.grad(loss, inputs)
        del gradients
    del loss
    return {
        f"{phase}_mib": max(0, memory._kib("VmHWM") - before) / 1024,
        "method": "VmHWM after reset" if is_reset else "VmHWM",
    }


def main() -> None:
    """Prints one line of JSON."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.loads(sys.argv[1])
    try:
        answer = _measure(request["batch"], request["name"], request["phase"])
    except Exception as error:  # of a foreign package, whatever it is
        answer = {"reason": first_line(error)}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
