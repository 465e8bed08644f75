"""The documents: their code runs as printed, their links are valid, and README is short."""

from __future__ import annotations

import re

import pytest
import torch

from simpo_ext.__main__ import main
from support.documents import DOCUMENTS, blocks, code, text_of
from support.paths import ROOT

# test_documents_of_trainers.py and test_documents_of_ranks.py run the examples of these.
RUN_ELSEWHERE = ("simpo_ext/integrations/README.md", "simpo_ext/distributed/README.md")
LANGUAGES = {"bash", "cmake", "cpp", "python", "text", "yaml"}


@pytest.mark.parametrize("document", [each for each in DOCUMENTS if each not in RUN_ELSEWHERE])
def test_the_python_examples_run_one_after_the_other(
    document: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in code(document):
        exec(compile(block, document, "exec"), names)
    if document == "README.md":
        assert "'rewards/accuracies'" in capsys.readouterr().out
    if document == "simpo_ext/README.md":
        assert names["packed"].grad is not None
        assert names["hidden"].grad is not None


def test_most_documents_have_examples() -> None:
    assert len([each for each in DOCUMENTS if code(each)]) >= 4


def test_the_first_two_commands_are_the_demo_and_the_tests() -> None:
    commands = code("README.md", "bash")
    assert "python -m simpo_ext demo" in commands[0]
    assert "pytest" in commands[1]
    assert all(len(command.splitlines()) == 1 for command in commands[:2])


def test_the_printed_demo_uses_the_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    (printed,) = (text for text in code("simpo_ext/README.md", "text") if "Held-out pairs" in text)
    steps = re.search(r"after (\d+) steps", printed).group(1)
    assert f"--steps N default: {steps}" in text


def test_readme_is_short() -> None:
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 200
    assert not [line for line in lines if len(line) > 120]


def anchors(document: str) -> set[str]:
    """The headings of a document in the form of link targets."""
    headings = re.findall(r"^#+ (.+)$", text_of(document), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_are_valid(document: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.relative_to(ROOT).as_posix()), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_a_document_exist(document: str) -> None:
    named = re.findall(
        r"`((?:tests|bench|csrc|simpo_ext)/[\w./-]+?)(?:::[^`]*)?`", text_of(document)
    )
    assert not [path for path in named if not (ROOT / path.rstrip("/")).exists()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_has_a_language(document: str) -> None:
    assert {block.language for block in blocks(document)} <= LANGUAGES
