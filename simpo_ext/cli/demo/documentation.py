"""Makes preference pairs from the English text of `help()`, which every CPython contains."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from .batches import Pair
from .messages import DemoError

PASSAGE_BYTES = 126
MIN_PASSAGE_BYTES = 72
PROMPT_BYTES = 32
MIN_WORDS = 6
HELD_OUT = 0.12
SHINGLE = 40


@dataclass(frozen=True)
class Split:
    """Training pairs, and held-out pairs from other topics."""

    train: list[Pair]
    held_out: list[Pair]
    topics: int
    held_out_topics: int


def pairs(seed: int) -> Split:
    """Make the pairs and split them by topic.

    The prompt is the start of a passage, and the chosen completion is the rest of it. The rejected
    completion has the same words in another order, so only the order distinguishes the two.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DemoError(
            f"this Python has no help() topics ({error}); "
            "pass your own pairs with --data FILE.jsonl"
        ) from error

    rng = random.Random(seed)
    passages = {name: list(_passages(topics[name])) for name in sorted(topics)}
    names = list(passages)
    rng.shuffle(names)
    wanted = HELD_OUT * sum(map(len, passages.values()))
    held_out_names: set[str] = set()
    held_out: dict[str, None] = {}  # a set that keeps its order
    for name in names:
        if len(held_out) + len(passages[name]) <= wanted:
            held_out_names.add(name)
            held_out.update(dict.fromkeys(passages[name]))

    # Topics quote each other, sometimes with a word changed. A passage that shares SHINGLE
    # consecutive characters with a held-out passage is therefore not used for training.
    seen = {shingle for passage in held_out for shingle in _shingles(passage)}
    train = dict.fromkeys(
        passage
        for name in names
        if name not in held_out_names
        for passage in passages[name]
        if seen.isdisjoint(_shingles(passage))
    )
    if not train or not held_out:
        raise DemoError(
            "this Python's help() topics have no text; pass your own pairs with --data FILE.jsonl"
        )
    return Split(
        [_pair(passage, rng) for passage in train],
        [_pair(passage, rng) for passage in held_out],
        len(names),
        len(held_out_names),
    )


def _passages(text: str) -> Iterator[str]:
    """Yield passages of prose of at most PASSAGE_BYTES, cut between words."""
    for paragraph in text.split("\n\n"):
        words = paragraph.split()
        flat = " ".join(words)
        if sum(c.isalpha() or c == " " for c in flat) < 0.85 * len(flat):
            continue  # a grammar rule, a table or code
        passage = ""
        for word in words:
            longer = f"{passage} {word}" if passage else word
            if len(longer.encode()) <= PASSAGE_BYTES:
                passage = longer
                continue
            if _usable(passage):
                yield passage
            passage = word
        if _usable(passage):
            yield passage


def _usable(passage: str) -> bool:
    words = set(_cut(passage)[1].split())
    return MIN_PASSAGE_BYTES <= len(passage.encode()) <= PASSAGE_BYTES and len(words) >= MIN_WORDS


def _cut(passage: str) -> tuple[str, str]:
    """Split off the first words. The rest starts with a space."""
    end = max(passage.rfind(" ", 0, PROMPT_BYTES), 0)
    return passage[:end], passage[end:]


def _shingles(passage: str) -> Iterator[str]:
    return (passage[i : i + SHINGLE] for i in range(len(passage) - SHINGLE + 1))


def _pair(passage: str, rng: random.Random) -> Pair:
    prompt, chosen = _cut(passage)
    words = chosen.split()
    shuffled = words[:]
    while shuffled == words:
        rng.shuffle(shuffled)
    lead = " " if prompt else ""
    return Pair(prompt, chosen, lead + " ".join(shuffled))
