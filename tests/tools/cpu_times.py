"""A pytest plugin that says what each test costs in CPU time, children included, which other load changes little.

    python -m pytest -p tests.tools.cpu_times --cpu-times FILE tests/passes

writes one line per test, ``SECONDS FILE::TEST``, its fixtures counted with the first test that needs them, and prints the sum.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-times", type=Path, default=None, help="File for the CPU time of every test.")


def used() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


class Recorder:
    def __init__(self, file: Path) -> None:
        self.file, self.total = file, 0.0
        file.write_text("", encoding="utf-8")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        before = used()
        result = yield
        took = used() - before
        self.total += took
        with self.file.open("a", encoding="utf-8") as out:
            out.write(f"{took:.2f} {item.nodeid}\n")
        return result

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(f"CPU time of the tests: {self.total / 60:.1f} minutes; by test in {self.file}")


def pytest_configure(config: pytest.Config) -> None:
    if (file := config.getoption("--cpu-times")) is not None:
        config.pluginmanager.register(Recorder(file), "cpu-times")
