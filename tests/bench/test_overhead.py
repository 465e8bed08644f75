"""The benchmark of what surrounds the work: what it verifies and prints, not its times."""

from __future__ import annotations

from collections import Counter

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


def test_without_its_fast_path_is_what_it_says(load) -> None:
    overhead, peers = load("overhead"), load("common.peers")
    before = overhead.fast_path.is_plain_call
    seen = peers.Candidate("a", "work", lambda: lambda: overhead.fast_path.is_plain_call is before)
    assert (seen.forward(), overhead._by_registered_ops(seen).forward()) == (True, False)
    assert overhead.fast_path.is_plain_call is before


def test_each_subject_is_what_its_row_says(load, monkeypatch: pytest.MonkeyPatch) -> None:
    overhead, tables = load("overhead"), []
    laps: Counter[str] = Counter()
    monkeypatch.setattr(overhead, "_print", lambda *table: tables.append(table))
    overhead.measure_calls(1)
    count = lambda self, candidate, *_: laps.update([candidate.name])  # noqa: E731
    monkeypatch.setattr(overhead.LogitsProblem, "lap", count)
    for _, subjects, _, _, scale in tables:
        for name, subject in subjects.items():
            laps.clear()
            subject.phases["call"](None)
            assert list(laps) == [name]
            assert laps[name] * scale == pytest.approx(1e3)  # microseconds of one call

    reports, right = [], overhead.simpo_loss
    loss = lambda *inputs, report: reports.append(report) or right(*inputs, report=report)  # noqa: E731
    monkeypatch.setattr(overhead, "simpo_loss", loss)
    overhead.measure_reports(overhead.QUICK_BATCHES[0], 1)
    for name, subject in tables[-1][1].items():
        subject.phases["call"](None)
        assert reports[-1] == overhead.REPORTS[name]
