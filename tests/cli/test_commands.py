"""The commands info and check of ``python -m simpo_ext``."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import simpo_ext
from simpo_ext import functional
from simpo_ext.__main__ import main
from simpo_ext.cli import check


def test_info_prints_the_build_and_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for expected in (simpo_ext.__version__, torch.__version__, "compiler", "threads", "CPU"):
        assert expected in printed


def test_check_passes_here() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "simpo_ext", "check"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1] == "all passed"
    assert "FAILED" not in run.stdout


@pytest.mark.parametrize("factor", [1.0 + 1e-4, float("nan")])
def test_check_fails_on_a_wrong_loss(
    factor: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = functional.simpo_loss

    def wrong(*args: object, **options: object) -> functional.SimPOOutput:
        out = right(*args, **options)
        return out._replace(loss=out.loss * factor)

    monkeypatch.setattr(functional, "simpo_loss", wrong)
    assert check.run() == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_command_is_required() -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([])
    assert exit_info.value.code == 2
