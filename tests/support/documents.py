"""The repository's documents and their code blocks."""

from __future__ import annotations

import re
from typing import NamedTuple

from support.paths import ROOT

DOCUMENTS = (
    "README.md",
    "simpo_ext/README.md",
    "simpo_ext/integrations/README.md",
    "simpo_ext/distributed/README.md",
    "csrc/README.md",
    "tests/README.md",
    "tests/cuda/emulation/README.md",
    "tests/cuda/ptx/README.md",
    "bench/README.md",
    "bench/data/README.md",
    "CHANGELOG.md",
)


class Block(NamedTuple):
    """A fenced block of code."""

    language: str
    text: str


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str) -> list[Block]:
    """The fenced blocks of a document, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text_of(document), re.MULTILINE | re.DOTALL)
    return [Block(*each) for each in found]


def code(document: str, language: str = "python") -> list[str]:
    """The blocks of a document in one language."""
    return [block.text for block in blocks(document) if block.language == language]
