"""The benchmark of what surrounds the work: what it verifies and prints, not its times."""

from __future__ import annotations

import pytest
import torch

import simpo_ext

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_tiny_run_goes_all_the_way(load, capsys: pytest.CaptureFixture[str]) -> None:
    assert load("overhead").main(["--quick", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    for text in ("2x16x5003 bfloat16", "2x16x64x5003 bfloat16", "logits_all", "calls in a row",
                 "after other work", "Princeton float32"):  # fmt: skip
        assert text in printed


def test_a_wrong_report_ends_the_program(load) -> None:
    overhead = load("overhead")
    logits, labels = torch.randn(2, 6, 11), torch.randint(11, (2, 6))
    expected = overhead.eager_metrics(logits, labels)

    def call(report):
        return simpo_ext.simpo_loss(logits, labels, report=report)

    overhead.verify_reports(call, expected, 1e-5)
    for name, value in expected.items():
        with pytest.raises(SystemExit, match=name):
            overhead.verify_reports(call, {**expected, name: value + 0.01}, 1e-5)
    with pytest.raises(SystemExit, match="with a report"):
        overhead.verify_reports(
            lambda report: simpo_ext.simpo_loss(
                logits * (1.1 if report else 1.0), labels, report=report
            ),
            expected,
            1e-5,
        )
