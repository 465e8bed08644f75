"""Prints the tables at the end of the demo."""

from __future__ import annotations

from .compare import Comparison
from .messages import count, require
from .train import Result


def print_training(result: Result) -> None:
    """Print the held-out scores before and after training."""
    settings = result.settings
    table = require("rich.table").Table()
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold")
    before, after = result.scores[0], result.scores[-1]
    table.add_row("reward accuracy", f"{before.accuracy:.1%}", f"{after.accuracy:.1%}")
    for name, attribute in (
        ("reward margin", "margin"),
        ("log-prob per byte, chosen", "chosen_logps"),
        ("log-prob per byte, rejected", "rejected_logps"),
        ("SimPO loss (no SFT term)", "loss"),
    ):
        table.add_row(name, *(f"{getattr(scores, attribute):.3f}" for scores in (before, after)))
    stopped = f" of {settings.steps}, stopped early," if result.interrupted else ""
    _print(
        f"Held-out pairs before and after {count(result.steps, 'step')}{stopped} "
        f"in {result.seconds:.0f} s",
        table,
        f"reward = beta x log-prob per byte; beta {settings.beta:g}, "
        f"gamma/beta {settings.gamma_beta_ratio:g}, {settings.loss_type}, "
        f"sft weight {settings.sft_weight:g}",
    )


def print_comparison(comparison: Comparison) -> None:
    """Print time and memory of the loss and of the eager formula."""
    shape = ", ".join(map(str, comparison.shape))
    table = require("rich.table").Table()
    table.add_column("")
    table.add_column("forward + backward", justify="right")
    table.add_column("peak extra memory", justify="right")
    eager = comparison.seconds["eager"]
    for variant, name in (
        ("eager", "eager log_softmax, gather"),
        ("simpo_ext", "simpo_ext"),
        ("inplace", "simpo_ext, in place"),
    ):
        seconds, peak = comparison.seconds[variant], comparison.peak_bytes[variant]
        speed = "" if variant == "eager" else f"  ({eager / seconds:.1f}x)"
        table.add_row(
            name,
            f"{seconds * 1e3:.0f} ms{speed}",
            "n/a" if peak is None else f"{peak / 1e6:.1f} MB",
        )
    _print(
        f"SimPO loss on logits [{shape}] float32, {comparison.logits_bytes / 1e6:.0f} MB",
        table,
        f"loss and gradient agree; median of {comparison.repeats} interleaved runs with "
        f"{count(comparison.threads, 'thread')};\nmemory beyond the logits, each in a process",
    )


def _print(title: str, table: object, note: str) -> None:
    console = require("rich.console").Console(highlight=False, markup=False)
    console.print()
    console.print(title, style="bold")
    console.print(table)
    console.print(note, style="dim")
