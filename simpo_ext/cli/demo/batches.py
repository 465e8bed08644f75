"""Encodes preference pairs as token ids: bytes, and tokens for begin, end and padding."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .messages import DemoError, count

BOS, EOS, PAD = 256, 257, 258
VOCAB_SIZE = 259
IGNORE_INDEX = -100

HELD_OUT = 0.1
MOST_HELD_OUT = 256  # bounds the time, because a run evaluates the held-out pairs several times


@dataclass(frozen=True)
class Pair:
    """A prompt and two completions. `chosen` is the better one."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Example:
    """An encoded pair: token ids of the prompt, which starts with BOS, and the completions."""

    text: str  # the prompt before truncation
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    truncated: bool


def encode_pair(pair: Pair, context: int) -> Example:
    """Encode a pair so that the prompt and the longer completion fit `context` tokens.

    A truncated prompt keeps its end and gets at least a quarter of the context. A truncated
    completion keeps its start and has no EOS.
    """
    prompt = list(pair.prompt.encode())
    chosen = [*pair.chosen.encode(), EOS]
    rejected = [*pair.rejected.encode(), EOS]
    room = context - 1
    longest = max(len(chosen), len(rejected))
    kept = min(len(prompt), max(room - longest, room // 4))
    limit = room - kept
    return Example(
        pair.prompt,
        [BOS, *prompt[len(prompt) - kept :]],
        chosen[:limit],
        rejected[:limit],
        truncated=kept < len(prompt) or limit < longest,
    )


def encode(pairs: Iterable[Pair], context: int) -> list[Example]:
    """Encode pairs. Leave out pairs whose truncated completions are equal."""
    examples = [encode_pair(pair, context) for pair in pairs]
    distinct = [example for example in examples if example.chosen != example.rejected]
    same = len(examples) - len(distinct)
    if same:
        print(
            f"{count(same, 'pair')} left out: completions equal within {context} bytes (--context)"
        )
    return distinct


def split(examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Split into training and held-out examples. Examples with the same prompt stay together."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(" ".join(example.text.split()), []).append(example)
    if len(groups) < 2:
        raise DemoError(
            f"too few pairs: {len(examples)} usable, with {count(len(groups), 'distinct prompt')}; "
            "the demo needs at least 2 prompts, one to train on and one to hold out"
        )
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    wanted = max(1, min(MOST_HELD_OUT, round(HELD_OUT * len(examples))))
    training: list[Example] = []
    held_out: list[Example] = []
    for group in order:
        side = held_out if len(held_out) + len(group) <= wanted else training
        side.extend(group)
    if not held_out:  # every prompt has more pairs than wanted
        held_out = min(order, key=len)
        training = [example for group in order if group is not held_out for example in group]
    return training, held_out


def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Stack P examples as ids and labels, both [2P, T]: chosen rows first, then rejected.

    The labels of prompt and padding are IGNORE_INDEX. The labels are not shifted, because the loss
    shifts them.
    """
    rows = [(e.prompt, e.chosen) for e in examples] + [(e.prompt, e.rejected) for e in examples]
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.full((len(rows), longest), PAD)
    labels = torch.full((len(rows), longest), IGNORE_INDEX)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return ids, labels
