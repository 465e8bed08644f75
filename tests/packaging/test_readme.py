"""README's code runs as printed."""

from __future__ import annotations

import re

import pytest
import torch

from simpo_ext.__main__ import main
from support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


# Whose examples run with trainers, and in several processes: test_readme_trainers.py and
# test_readme_scaling.py.
ELSEWHERE = re.compile(r"^## (In your trainer|Scaling out)\n.*?(?=^## )", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    text = ELSEWHERE.sub("", README)
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_python_examples_run_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert "'rewards/accuracies'" in capsys.readouterr().out
    assert names["packed"].grad is not None


def test_the_first_two_commands_are_the_demo_and_the_tests() -> None:
    commands = blocks("bash")
    assert "python -m simpo_ext demo" in commands[0]
    assert "pytest" in commands[1]
    assert all(len(command.splitlines()) == 1 for command in commands[:2])


def test_the_settings_that_the_printed_demo_names_are_the_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    (printed,) = (text for text in blocks("text") if "Held-out pairs" in text)
    steps = re.search(r"after (\d+) steps", printed).group(1)
    assert f"--steps N default: {steps}" in text
