"""Peak memory of a linear candidate beyond its inputs, by the resident pages of a fresh process.

As memory.py does it for logits: the process makes the tensors, lets the candidate work on a small
batch so that code and threads are loaded, and notes what is resident. The forward runs without
gradients, as in an evaluation; forward and backward, whose gradients count, run in a process of
their own, where nobody holds memory of the forward for later.
"""

from __future__ import annotations

from typing import Any

from bench import memory

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
        request = {"fields": batch, "name": candidate, "phase": phase}
        answer |= memory.measured_apart("bench.linear_memory", request)
    return {"reason": answer["reason"]} if "reason" in answer else answer


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
    baseline = memory.Baseline.take()
    if baseline.reason is not None:
        return {"reason": baseline.reason}
    if phase == "forward":
        with torch.no_grad():
            loss = candidate.loss(*inputs, labels, None)
    else:
        loss = candidate.loss(*inputs, labels, None)
        gradients = torch.autograd.grad(loss, inputs)
        del gradients
    del loss
    return {f"{phase}_mib": baseline.peak_extra_mib(), "method": baseline.method}


if __name__ == "__main__":
    memory.answer_request(_measure)
