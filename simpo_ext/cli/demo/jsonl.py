"""Reads the user's own preference pairs from a JSONL file."""

from __future__ import annotations

import codecs
import json
import sys
from pathlib import Path
from typing import Any

from .batches import Pair
from .messages import DemoError, count

FIELDS = ("prompt", "chosen", "rejected")
MOST_SHOWN = 20


def read(path: Path, skip_bad: bool) -> list[Pair]:
    """Read the pairs of `path`. Report bad lines on stderr, and skip them if `skip_bad`."""
    pairs: list[Pair] = []
    bad = 0
    try:
        with path.open("rb") as file:
            # Text mode decodes a block at a time, and its errors have no line number. Bytes split
            # at \n give the line numbers of an editor.
            for number, line in enumerate(file, start=1):
                raw = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not raw.strip():
                    continue
                try:
                    pairs.append(parse(raw))
                except ValueError as error:
                    bad += 1
                    if bad <= MOST_SHOWN:
                        print(f"{path}:{number}: {error}", file=sys.stderr)
    except OSError as error:
        raise DemoError(f"cannot read {path}: {error.strerror}") from error
    if bad > MOST_SHOWN:
        print(f"{path}: and {count(bad - MOST_SHOWN, 'more bad line')}", file=sys.stderr)
    if bad and not skip_bad:
        raise DemoError(
            f"{path} has {count(bad, 'bad line')} and {len(pairs)} good; "
            "fix the bad ones, or skip them with --skip-bad"
        )
    if bad:
        print(
            f"{path}: {count(bad, 'bad line')} skipped, {count(len(pairs), 'pair')} read",
            file=sys.stderr,
        )
    if not pairs:
        raise DemoError(f"{path} has no usable pairs")
    return pairs


def parse(line: bytes) -> Pair:
    """Parse one line. The message of the ValueError gives its fault."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:  # the JSON is too deep, or a number is too long
        raise ValueError(f"not usable JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {_kind(record)}")
    missing = [field for field in FIELDS if field not in record]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    for field in FIELDS:
        _check(field, record[field])

    prompt, chosen, rejected = (record[field] for field in FIELDS)
    pair = Pair(
        _text(prompt),
        _text(_without_prompt(chosen, prompt)),
        _text(_without_prompt(rejected, prompt)),
    )
    for field in ("chosen", "rejected"):
        if _is_empty(getattr(pair, field), record[field]):
            raise ValueError(f"{field} is empty")
    if pair.chosen == pair.rejected:
        raise ValueError("chosen and rejected are the same")
    return pair


def _check(field: str, value: object) -> None:
    if isinstance(value, str):
        _check_encodable(field, value)
        return
    if not isinstance(value, list):
        raise ValueError(f"{field}: expected a string or a list of messages, got {_kind(value)}")
    for position, message in enumerate(value, start=1):
        where = f"{field}, message {position}"
        if not isinstance(message, dict):
            raise ValueError(f"{where}: expected an object, got {_kind(message)}")
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(f"{where}: missing {key}")
            if not isinstance(message[key], str):
                raise ValueError(f"{where}: {key}: expected a string, got {_kind(message[key])}")
            _check_encodable(f"{where}: {key}", message[key])


def _check_encodable(where: str, text: str) -> None:
    # A \u escape in JSON can encode half of a surrogate pair, which UTF-8 cannot encode.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: expected text that UTF-8 can encode, got half of a surrogate pair"
        ) from None


def _without_prompt(completion: Any, prompt: Any) -> Any:
    """Drop the prompt's messages from a completion that repeats them."""
    opening = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if isinstance(completion, list) and completion[: len(opening)] == opening:
        return completion[len(opening) :]
    return completion


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "".join(f"{message['role']}: {message['content']}\n" for message in value)


def _is_empty(text: str, value: Any) -> bool:
    if isinstance(value, list):
        return not text or not any(message["content"].strip() for message in value)
    return not text.strip()


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
