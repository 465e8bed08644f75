"""What the timing programs of the GPU run share: options, and memory between candidates."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def release_memory(device: torch.device) -> None:
    """Returns to the GPU what torch keeps for later tensors."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Adds the device, the number of rounds, the candidates and where to record results."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument(
        "--candidates", nargs="+", metavar="NAME", help="only these, instead of all"
    )
    parser.add_argument("--record", type=Path, metavar="FILE.jsonl")


def check_options(
    parser: argparse.ArgumentParser, options: argparse.Namespace, candidates: Iterable[Any]
) -> None:
    """Refuses wrong values of these options, and puts candidates in the place of their names."""
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a CUDA device, torch finds none; use --device cpu")
    known = {candidate.name: candidate for candidate in candidates}
    unknown = [name for name in options.candidates or () if name not in known]
    if unknown:
        parser.error(f"--candidates: expected some of {list(known)}, got {unknown}")
    options.candidates = [known[name] for name in options.candidates or known]
