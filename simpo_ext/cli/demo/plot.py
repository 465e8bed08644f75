"""Plots the margin and accuracy of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .messages import DemoError, require
from .train import Result

SMOOTHING = 0.9
TRAINING, HELD_OUT, REFERENCE = "#9aa5b1", "#c2410c", "#6b7280"


def smooth(values: Sequence[float]) -> list[float]:
    """The exponential moving average, with a correction for its start at zero."""
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(average / weight)
    return smoothed


def draw(result: Result, path: Path) -> None:
    """Draw the margin and accuracy of a run into the file `path`."""
    # pyplot would need a display and change global state; a Figure does neither.
    figure = require("matplotlib.figure").Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = range(1, result.steps + 1)
    for axes, title, training, held_out, scale in (
        (left, "Reward margin", result.margins, [s.margin for s in result.scores], 1),
        (right, "Reward accuracy (%)", result.accuracies, [s.accuracy for s in result.scores], 100),
    ):
        axes.plot(
            steps,
            [scale * value for value in smooth(training)],
            color=TRAINING,
            linewidth=1.5,
            label="training batches, smoothed",
        )
        axes.plot(
            result.scored_steps,
            [scale * value for value in held_out],
            color=HELD_OUT,
            linewidth=2,
            marker="o",
            markersize=5,
            label="held-out pairs",
        )
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    target = result.settings.beta * result.settings.gamma_beta_ratio
    _reference(left, target, "target margin (gamma)", "left")
    _reference(right, 50, "chance", "right")
    right.set_ylim(top=102)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise DemoError(f"cannot write the plot {path}: {error.strerror}") from error


def _reference(axes: Any, level: float, name: str, side: str) -> None:
    """Draw a horizontal line with its name under one end, on the side without curves."""
    axes.axhline(level, color=REFERENCE, linewidth=1, linestyle="--", zorder=1)
    axes.annotate(
        name,
        (0.01 if side == "left" else 0.99, level),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, -4),
        textcoords="offset points",
        ha=side,
        va="top",
        fontsize=9,
        color=REFERENCE,
    )
