"""Measures steps of TRL's CPOTrainer and of this project's SimPOTrainer on this machine's CPU.

    python -m bench trl [--quick] [--samples N] [--cases TEXT ...] [--output FILE.json]
    python -m bench trl --readme FILE.json

Subjects (trl_subjects.py): stock CPOTrainer, SimPOTrainer from logits, and SimPOTrainer from hidden
states and lm_head, all on one small Llama with V = 128256, H = 512 and 2 layers, and on one batch
of 500 MiB of logits, of which 60 % is scored. A step is an evaluation's, or one of training without
its optimizer's.

A subject is verified before it is timed: losses, metrics and gradients are stock TRL's, within the
rounding of the dtype. Steps are interleaved; peak memory is that of a step in a process of its own,
above model and batch, with the gradients.

Results are written after every case, tables come to the screen, and everything to
bench/results/trl-MACHINE.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import compress
from pathlib import Path
from typing import Any

import torch

import simpo_ext
from bench import program, trl_memory, trl_report, trl_subjects
from bench.machine import describe_cpu, version
from bench.timing import CpuClock, Subject, interleaved
from bench.trl_subjects import PHASES, STOCK, SUBJECTS, Geometry

SAMPLES, QUICK_SAMPLES = 7, 1
CASES = (
    Geometry(pairs=2, time=512, hidden=512, vocabulary=128256, dtype="bfloat16"),
    Geometry(pairs=2, time=256, hidden=512, vocabulary=128256, dtype="float32"),
)
QUICK_CASES = (
    Geometry(pairs=2, time=24, hidden=64, vocabulary=600, dtype="float32"),
    Geometry(pairs=2, time=24, hidden=64, vocabulary=600, dtype="bfloat16"),
)


def _verify(trainers: dict[str, Any], batch: dict[str, Any], dtype: str) -> list[dict[str, Any]]:
    """A row for each subject, with what its numbers are beside stock TRL's."""
    stock = trl_subjects.find(trainers[STOCK], batch)
    rows = []
    for name, trainer in trainers.items():
        found = stock if name == STOCK else trl_subjects.find(trainer, batch)
        rows.append({"name": name, **trl_subjects.compare(found, stock, dtype)})
    return rows


def _verify_and_time(each: Geometry, samples: int) -> dict[str, Any]:
    """A case without memory, which is measured when what this makes is gone."""
    model = trl_subjects.make_model(each)
    batch = trl_subjects.make_batch(each)
    trainers = {name: trl_subjects.make_trainer(name, model) for name in SUBJECTS}
    rows = _verify(trainers, batch, each.dtype)

    def prepare() -> None:
        model.zero_grad(set_to_none=True)

    subjects = {
        row["name"]: Subject(prepare, trl_subjects.laps(trainers[row["name"]], batch))
        for row in rows
        if row["status"] == "right"
    }
    times = interleaved(subjects, CpuClock(), samples)
    for row in rows:
        row |= {phase: asdict(found) for phase, found in times.get(row["name"], {}).items()}
    return {
        "name": each.name,
        **each.to_json(),
        "logits_bytes": each.logits_bytes,
        "gradient_bytes": trl_subjects.gradient_bytes(model),
        "rows": rows,
    }


def measure_case(each: Geometry, samples: int) -> dict[str, Any]:
    """Verifies, times and measures all subjects."""
    case = _verify_and_time(each, samples)
    gc.collect()
    for row in case["rows"]:
        if row["status"] == "right":
            row["memory"] = trl_memory.peak_extra_mib(each, row["name"])
    trl_report.add_derived(case)
    return case


def _describe_software() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        **{package: version(package) for package in ("trl", "transformers", "accelerate")},
        "simpo_ext": str(simpo_ext.build_info()["version"]),
        "level": simpo_ext.cpu_capability(),
        "threads": torch.get_num_threads(),
        "commit": program.commit(),
    }


def measure(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Everything, as JSON holds it from the first case on."""
    began = time.monotonic()
    results: dict[str, Any] = {
        "kind": options.kind,
        "machine": describe_cpu(),
        "software": _describe_software(),
        "phases": list(PHASES),
        "samples": options.samples,
        "cases": [],
    }
    for each in options.geometries:
        case = measure_case(each, options.samples)
        results["cases"].append(case)
        results["seconds"] = time.monotonic() - began
        text = json.dumps(results, indent=1, allow_nan=False) + "\n"
        output.write_text(text, encoding="utf-8")
        trl_report.print_case(case)
    return results


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = program.make_parser(
        "bench trl", "Times steps of TRL's trainer and of this project's.", has_plot=False
    )
    options = program.parse(parser, arguments)
    geometries = QUICK_CASES if options.quick else CASES
    chosen = program.check_cases(parser, options, [each.name for each in geometries])
    options.geometries = tuple(compress(geometries, chosen))
    options.samples = options.samples or (QUICK_SAMPLES if options.quick else SAMPLES)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes what the command line asks for.

    Returns:
        0 if all subjects were right, else 1.
    """
    options = _parse(arguments)
    if options.readme is not None:
        print(trl_report.markdown(json.loads(options.readme.read_text(encoding="utf-8"))))
        return 0
    output = options.output or program.default_output("trl", options.kind, describe_cpu())
    output.parent.mkdir(parents=True, exist_ok=True)
    results = measure(options, output)
    trl_report.print_summary(results)
    print(trl_report.markdown(results))
    print(f"results: {output}")
    rows = [row for case in results["cases"] for row in case["rows"]]
    return 0 if all(row["status"] == "right" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
