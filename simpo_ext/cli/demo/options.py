"""The demo's command line: its options, their checks, and the steps of a run."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .messages import DemoError, count, require

if TYPE_CHECKING:
    from .batches import Example

PLOT_SUFFIXES = (".png", ".pdf", ".svg")
INTERRUPTED = 130  # the exit code that shells report after Ctrl-C


def _integer(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, got {value}")
        return value

    return parse


def _number(
    *, above: float = -math.inf, low: float = -math.inf, high: float = math.inf
) -> Callable[[str], float]:
    bounds = [f"above {above:g}"] if above > -math.inf else []
    bounds += [f"at least {low:g}"] if low > -math.inf else []
    bounds += [f"at most {high:g}"] if high < math.inf else []

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not math.isfinite(value) or value <= above or not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"expected a finite number {' and '.join(bounds)}, got {text}"
            )
        return value

    return parse


def _plot_path(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise argparse.ArgumentTypeError(
            f"expected a name ending in {', '.join(PLOT_SUFFIXES)}, got {text!r}"
        )
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to `parser`."""
    loss = parser.add_argument_group("loss")
    loss.add_argument(
        "--beta", type=_number(above=0), default=2.0, help="reward scale (default: %(default)s)"
    )
    margin = loss.add_mutually_exclusive_group()
    margin.add_argument(
        "--gamma-beta-ratio",
        type=_number(low=0),
        default=0.5,
        metavar="RATIO",
        help="target margin over beta (default: %(default)s)",
    )
    margin.add_argument("--gamma", type=_number(low=0), help="target margin, instead of the ratio")
    loss.add_argument(
        "--loss-type",
        choices=("sigmoid", "hinge"),
        default="sigmoid",
        help="default: %(default)s",
    )
    loss.add_argument(
        "--label-smoothing",
        type=_number(low=0, high=0.5),
        default=0.0,
        metavar="EPS",
        help="assumed share of flipped preferences, for sigmoid (default: %(default)s)",
    )
    loss.add_argument(
        "--sft-weight",
        type=_number(low=0),
        default=1.0,
        metavar="WEIGHT",
        help="weight of the language-modelling term on chosen texts; the model needs this term "
        "because it starts from random weights (default: %(default)s)",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--steps", type=_integer(1), default=240, metavar="N", help="default: %(default)s"
    )
    training.add_argument(
        "--batch-pairs",
        type=_integer(1, 4096),
        default=16,
        metavar="N",
        help="pairs per step (default: %(default)s)",
    )
    training.add_argument(
        "--lr",
        type=_number(above=0),
        default=2e-3,
        help="peak learning rate (default: %(default)s)",
    )
    training.add_argument(
        "--context",
        type=_integer(16, 8192),
        default=128,
        metavar="BYTES",
        help="longest text; the demo cuts off the start of a longer prompt and the end of a longer "
        "completion (default: %(default)s)",
    )
    training.add_argument(
        "--seed", type=_integer(0, 2**32 - 1), default=0, metavar="N", help="default: %(default)s"
    )
    training.add_argument(
        "--threads", type=_integer(1, 1024), metavar="N", help="CPU threads (default: PyTorch's)"
    )

    files = parser.add_argument_group("files")
    files.add_argument(
        "--data",
        type=Path,
        metavar="FILE.jsonl",
        help="your own pairs: one JSON object on each line, with the fields prompt, chosen and "
        "rejected; a field is a string, or a list of messages with role and content, which "
        "become lines 'role: content'",
    )
    files.add_argument(
        "--skip-bad", action="store_true", help="skip bad lines of --data instead of stopping"
    )
    files.add_argument(
        "--plot",
        type=_plot_path,
        metavar="FILE.png",
        help="draw the margin and accuracy curves (png, pdf or svg)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo with parsed options. Return the exit code."""
    try:
        return _run(args)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(args: argparse.Namespace) -> int:
    if args.loss_type == "hinge" and args.label_smoothing > 0:
        raise DemoError(
            f"--label-smoothing: expected 0 with --loss-type hinge, got {args.label_smoothing:g}",
            code=2,
        )
    if args.skip_bad and args.data is None:
        raise DemoError("--skip-bad: expected --data, too", code=2)
    # A missing package or an unwritable plot should fail now, not after training.
    for module in ("tqdm", "rich"):
        require(module)
    if args.plot is not None:
        require("matplotlib")
        _check_writable(args.plot)

    import torch

    threads = torch.get_num_threads()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        return _train_and_report(args)
    finally:
        torch.set_num_threads(threads)


def _check_writable(path: Path) -> None:
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise DemoError(f"cannot write the plot {path}: {error.strerror}") from error


def _train_and_report(args: argparse.Namespace) -> int:
    import torch

    from . import compare, plot, report, train
    from .model import ByteTransformer

    settings = train.Settings(
        steps=args.steps,
        batch_pairs=args.batch_pairs,
        lr=args.lr,
        beta=args.beta,
        gamma_beta_ratio=(args.gamma_beta_ratio if args.gamma is None else args.gamma / args.beta),
        loss_type=args.loss_type,
        label_smoothing=args.label_smoothing,
        sft_weight=args.sft_weight,
        seed=args.seed,
    )
    training, held_out = _examples(args)
    torch.manual_seed(args.seed)
    model = ByteTransformer(args.context)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{count(len(training), 'training pair')}, {len(held_out)} held out; "
        f"byte-level transformer with {parameters / 1e6:.2f} M parameters from random "
        f"weights; seed {args.seed}, {count(torch.get_num_threads(), 'thread')}"
    )
    result = train.train(model, training, held_out, settings)
    report.print_training(result)
    if args.plot is not None:
        plot.draw(result, args.plot)
        print(f"plot: {args.plot}")
    if result.interrupted:
        return INTERRUPTED
    report.print_comparison(compare.compare())
    return 0


def _examples(args: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """Return the encoded training and held-out pairs, and print their source."""
    from . import batches, documentation, jsonl

    if args.data is None:
        split = documentation.pairs(args.seed)
        training = batches.encode(split.train, args.context)
        held_out = batches.encode(split.held_out, args.context)
        print(
            f"data: Python's help() texts, {split.held_out_topics} of {split.topics} topics held "
            "out;\nrejected completions have their words shuffled:"
        )
        # The terminal may support ASCII only.
        sample = next((p for p in split.held_out if p.chosen.isascii()), split.train[0])
        for field in ("prompt", "chosen", "rejected"):
            print(f"  {field:8} {getattr(sample, field)!a}")
        examples = training + held_out
    else:
        examples = batches.encode(jsonl.read(args.data, args.skip_bad), args.context)
        training, held_out = batches.split(examples, args.seed)
        print(f"data: {args.data}; pairs with the same prompt are all held out or all trained on")
    truncated = sum(example.truncated for example in examples)
    if truncated:
        print(
            f"{truncated} of {count(len(examples), 'pair')} truncated to {args.context} bytes "
            "(--context)"
        )
    return training, held_out
