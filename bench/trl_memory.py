"""Peak memory of a trainer's step beyond model and batch, by the resident pages of a fresh process.

As memory.py does it for logits: the process makes the model, lets the trainer work on a small batch
so that code and threads are loaded, and notes what is resident. An evaluation and a step of
training, whose gradients count, have a process each.
"""

from __future__ import annotations

from typing import Any

from bench import memory
from bench.trl_subjects import PHASES, Geometry


def peak_extra_mib(each: Geometry, subject: str) -> dict[str, Any]:
    """Measures in new processes.

    Returns:
        ``evaluation_mib``, ``training_mib`` and ``method``; or ``reason`` why not.
    """
    answer: dict[str, Any] = {}
    for phase in PHASES:
        request = {"fields": each.to_json(), "name": subject, "phase": phase}
        answer |= memory.measured_apart("bench.trl_memory", request)
    return {"reason": answer["reason"]} if "reason" in answer else answer


# ---- in the fresh process --------------------------------------------------------------------


def _measure(fields: dict[str, Any], name: str, phase: str) -> dict[str, Any]:
    from bench.trl_subjects import free_gradients, make_batch, make_model, make_trainer

    each = Geometry(**fields)
    trainer = make_trainer(name, make_model(each))
    PHASES[phase](trainer, make_batch(each.warming()))
    free_gradients(trainer)
    batch = make_batch(each)
    baseline = memory.Baseline.take()
    if baseline.reason is not None:
        return {"reason": baseline.reason}
    PHASES[phase](trainer, batch)
    return {f"{phase}_mib": baseline.peak_extra_mib(), "method": baseline.method}


if __name__ == "__main__":
    memory.answer_request(_measure)
