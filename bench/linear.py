"""Measures the loss from hidden states on this machine's CPU, beside its peers and the floor.

    python -m bench linear [--quick] [--samples N] [--cases TEXT ...] [--output FILE.json]
    python -m bench linear --readme FILE.json

Subjects (linear_subjects.py): this project's linear_simpo_loss with the default budget of logits,
with none and with no limit; F.linear and the trainers' formula; F.linear_cross_entropy; Liger's
fused linear SimPO loss. The floor (linear_floor.py) is the bare matrix products of the valid rows,
called in the way that is fastest on the case. Batches (linear_batch.py) are N = 2048 and 4096
tokens, H = 1024 and 2048, V = 32000 and 128256, float32 and bfloat16, all tokens valid or the last
40 % of each sequence, and the real batch of the logits benchmark in bfloat16 with H = 2048.

A candidate is verified before it is timed: its loss, and every element of its gradients, against
float64 (linear_reference.py). One that is wrong, or not installed, is reported and not timed. The
forward is an evaluation's, without gradients; forward and backward give the gradients of hidden
states and weight. Samples are interleaved and taken between canaries (gate.py).

Memory is as everyone gets it: the floor's has been written to before; of this project, logits and
gradients take that of the lap before (csrc/cpu/pages.h); peers have what the allocator hands
out. On a virtual machine whose host takes free pages back, that is a good part of their time.

What a lap costs decides how often it is timed (linear_plan.py): the longest, over four seconds,
while they are verified, and not again. Left out, because it would take an hour more and tell
nothing new:

- peers with 40 % valid, since their work does not depend on it: their times, verified and measured
  with all tokens valid, stand for it, in brackets. On the smallest shape of each dtype they are
  measured with 40 % too. Forward alone of a peer whose forward and backward take over four seconds,
  and of this project with other budgets, since none keeps anything then;
- Liger compiled but on the smallest shape of each dtype, with all tokens valid;
- in float32 with V = 128256: N = 4096 with H = 2048; for N = 4096 with H = 1024 all but the
  default budget, none, and F.linear with all tokens valid; and for N = 2048 with H = 2048 Liger and
  the unlimited budget;
- memory but on the smallest shape in bfloat16 with V = 128256 and in float32 with V = 32000, and on
  the real batch; of Liger on the first of these, and with 40 % valid of this project on it.

A full run takes over half an hour on two cores. Results are written after every case, tables come
to the screen, everything to bench/results/linear-MACHINE.json, and a plot to
bench/results/linear.png.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import simpo_ext
from bench import linear_floor, linear_laps, linear_memory, linear_report, program
from bench.floor import FloorError, Probes
from bench.gate import SAMPLES_PER_TURN, Gate, GatedTimes
from bench.linear_floor import Floor
from bench.linear_laps import FORWARD, FORWARD_BACKWARD, LinearLaps, LinearTurn
from bench.linear_plan import (
    QUICK_SAMPLES,
    SAMPLES,
    WARMED_MS,
    Case,
    Plan,
    estimate_seconds,
    full_plan,
    quick_plan,
    takes_turns,
    times_forward,
)
from bench.linear_subjects import LinearCandidate, linear_candidates
from bench.machine import describe_cpu, version
from bench.report import RESULTS

CPU = torch.device("cpu")

# ---- measuring -------------------------------------------------------------------------------


class _Run:
    """The gate, and the cases one after another."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._probes = Probes(torch.get_num_threads(), plan.probe_bytes)
        self.gate = Gate(
            self._probes.canaries,
            tolerance=plan.tolerance,
            calibration_samples=plan.calibration_samples,
        )
        self._candidates = linear_candidates()

    def close(self) -> None:
        """Frees what the canaries read."""
        self._probes.close()

    def measure(
        self, laps: LinearLaps, case: Case, widest: dict[str, Any] | None
    ) -> dict[str, Any]:
        """One case; ``widest`` is that of the same tensors with all tokens valid."""
        laps.set_mask(case.each)
        chosen = [each for each in self._candidates if each.name in case.names]
        rows = [linear_laps.first_row(laps, each, CPU) for each in chosen]
        times, floor_ms = self._times(laps, [*zip(chosen, rows, strict=True)])
        for row in rows:
            for phase in (FORWARD, FORWARD_BACKWARD):
                if (row["name"], phase) in times:
                    row[phase] = asdict(times[row["name"], phase])
        if case.borrows and widest is not None:
            rows += _borrowed(widest, case.names)
        result = {
            **linear_laps.describe(case.each, CPU),
            "floor": linear_floor.describe(floor_ms, case.each.flops(case.each.batch.valid_rows)),
            "rows": rows,
        }
        for row in rows:
            if row["name"] in case.memory and row["status"] == "right":
                row["memory"] = linear_memory.peak_extra_mib(case.each.to_json(), row["name"])
        linear_report.add_derived(result)
        return result

    def _times(
        self, laps: LinearLaps, chosen: Sequence[tuple[LinearCandidate, dict[str, Any]]]
    ) -> tuple[dict[tuple[str, str], GatedTimes], dict[int, tuple[float, float]]]:
        """Of the candidates' phases, and of the floor's variants."""
        floor = laps.make_floor()
        forward_ms: dict[int, list[float]] = {block: [] for block in linear_floor.BLOCKS}
        turns: dict[Any, LinearTurn] = {}
        times: dict[Any, GatedTimes] = {}
        for block, forwards in forward_ms.items():
            # The shortest of the subjects': what this takes is not known before.
            lap_ms = min((row["lap_ms"] for _, row in chosen if "lap_ms" in row), default=0.0)
            turns[block] = self._turn(partial(_run_floor, floor, block, forwards), lap_ms)
        for candidate, row in chosen:
            if row["status"] != "right":
                continue
            name, lap_ms = candidate.name, row["lap_ms"]
            if takes_turns(name, lap_ms):
                run = partial(laps.run, candidate, FORWARD_BACKWARD)
                turns[name, FORWARD_BACKWARD] = self._turn(run, lap_ms)
            else:
                times[name, FORWARD_BACKWARD] = GatedTimes(lap_ms, lap_ms, lap_ms, 1)
            if times_forward(name, lap_ms):
                share = 1.0 if candidate.gradients_in_forward else 1.0 / 3.0
                run = partial(laps.run, candidate, FORWARD)
                turns[name, FORWARD] = self._turn(run, share * lap_ms)
        self.gate.allow(self._plan.patience_seconds)
        times.update(linear_laps.alternate(turns, self.gate))
        floor_ms = {
            block: (statistics.median(forwards), times.pop(block).median_ms)
            for block, forwards in forward_ms.items()
        }
        return times, floor_ms

    def _turn(self, run: Callable[[], float], lap_ms: float) -> LinearTurn:
        def warm() -> None:
            run()

        is_warmed = lap_ms <= WARMED_MS
        return LinearTurn(
            warm=warm,
            prepare=lambda: None,
            run=run,
            samples=self._plan.samples_for(lap_ms),
            samples_a_turn=SAMPLES_PER_TURN if is_warmed else 1,
            is_warmed=is_warmed,
        )


def _run_floor(floor: Floor, block: int, forwards: list[float]) -> float:
    """Milliseconds of all products; those of the forward are noted, warm-up included."""
    forward, both = floor.run(block)
    forwards.append(forward)
    return both


def _borrowed(widest: dict[str, Any], timed: frozenset[str]) -> list[dict[str, Any]]:
    """Rows of peers that are not timed here, as they are with all tokens valid."""
    rows = []
    for row in widest["rows"]:
        if row["kind"] != "peer" or row["name"] in timed or row["status"] != "right":
            continue
        copy = {key: value for key, value in row.items() if key != "memory"}
        for phase in (FORWARD, FORWARD_BACKWARD):
            if phase in copy:
                copy[phase] = {**copy[phase], "borrowed": True}
        rows.append(copy)
    return rows


# ---- the run ---------------------------------------------------------------------------------


def _describe_software() -> dict[str, Any]:
    info = simpo_ext.build_info()
    return {
        "torch": torch.__version__,
        "liger-kernel": version("liger-kernel"),
        "simpo_ext": str(info["version"]),
        "level": simpo_ext.cpu_capability(),
        "compiler": str(info["compiler"]),
        "threads": torch.get_num_threads(),
        "commit": program.commit(),
    }


def _write(results: dict[str, Any], path: Path) -> None:
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8")


def measure(plan: Plan, kind: str, output: Path) -> dict[str, Any]:
    """Everything, as JSON holds it from the first case on."""
    began = time.monotonic()
    results: dict[str, Any] = {
        "kind": kind,
        "machine": describe_cpu(),
        "software": _describe_software(),
        "samples": plan.samples,
        "estimated_seconds": estimate_seconds(plan),
        "cases": [],
    }
    run = _Run(plan)
    try:
        with tqdm(total=len(list(plan.cases())), unit="case", dynamic_ncols=True) as progress:
            for group in plan.groups:
                progress.set_postfix_str(group[0].each.name)
                laps = LinearLaps(group[0].each, CPU)
                widest = None
                for case in group:
                    result = run.measure(laps, case, widest)
                    widest = widest or result
                    results["cases"].append(result)
                    results["canaries"] = {"kept": run.gate.kept, "dropped": run.gate.dropped}
                    results["seconds"] = time.monotonic() - began
                    _write(results, output)
                    with tqdm.external_write_mode():
                        linear_report.print_case(result)
                    progress.update()
                del laps
                torch._dynamo.reset()
                gc.collect()
    finally:
        run.close()
    return results


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = program.make_parser(
        "bench linear", "Times the loss from hidden states beside its peers."
    )
    options = program.parse(parser, arguments)
    if options.quick:
        plan = quick_plan(options.samples or QUICK_SAMPLES)
    else:
        plan = full_plan(options.samples or SAMPLES)
    names = [group[0].each.name for group in plan.groups]
    chosen = program.check_cases(parser, options, names)
    options.plan = replace(plan, groups=tuple(compress(plan.groups, chosen)))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes what the command line asks for.

    Returns:
        0 if all of this project's candidates were right and timed, else 1.
    """
    options = _parse(arguments)
    if options.readme is not None:
        print(linear_report.markdown(json.loads(options.readme.read_text(encoding="utf-8"))))
        return 0
    output = options.output or program.default_output("linear", options.kind, describe_cpu())
    output.parent.mkdir(parents=True, exist_ok=True)
    minutes = estimate_seconds(options.plan) / 60
    print(f"{len(list(options.plan.cases()))} cases, about {minutes:.0f} minutes; to {output}")
    try:
        results = measure(options.plan, options.kind, output)
    except FloorError as error:
        print(f"the canaries cannot be compiled: {error}", file=sys.stderr)
        return 1
    linear_report.print_summary(results)
    is_kept = options.output is None and options.kind == "full"
    picture = RESULTS / "linear.png" if is_kept else output.with_suffix(".png")
    linear_report.plot(results, picture)
    print(f"results: {output}\nplot: {picture}")
    ours = [row for case in results["cases"] for row in case["rows"] if row["kind"] == "ours"]
    return 0 if all(row["status"] == "right" for row in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
