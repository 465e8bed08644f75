"""A pytest plugin that records each test when it ends.

pytest -p bench.gpu.pytest_record --record FILE.jsonl --record-kind KIND
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import records


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds options for the file and the kind of the records."""
    parser.addoption("--record", type=Path, metavar="FILE.jsonl")
    parser.addoption("--record-kind", default="test")


def pytest_configure(config: pytest.Config) -> None:
    """Records only in the main process, to which the workers of pytest-xdist report."""
    if config.option.record is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(config))


class _Recorder:
    def __init__(self, config: pytest.Config) -> None:
        self._file = config.option.record
        self._kind = config.option.record_kind

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Records a test's call, and a setup or teardown that did not pass."""
        if report.when == "call" or not report.passed:
            self._write(report, round(report.duration, 3))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Records a file that cannot be imported."""
        if report.failed:
            self._write(report, 0.0)

    def _write(self, report: pytest.TestReport | pytest.CollectReport, seconds: float) -> None:
        record = {
            "kind": self._kind,
            "name": report.nodeid,
            "status": report.outcome,
            "seconds": seconds,
        }
        if report.failed:
            record["reason"] = report.longreprtext[-1500:]
        records.append(self._file, record)
