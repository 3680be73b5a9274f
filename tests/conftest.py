"""Fixtures for every test, and the rule that a skip says when it will go away."""

from __future__ import annotations

import os

# Before anything imports torch or transformers: no network, no spinning threads on a busy machine.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import contextlib
import gc
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.exports import Exports

ROOT = Path(__file__).resolve().parents[1]
# Graphs are many small objects that live for a test: by default the collector walks all of them, again and again.
gc.set_threshold(100_000, 20, 20)

# A run that was started in the background, or by nohup, ignores these signals, and so would every process that a test starts.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(_number, _handler)

SKIP_WORDS = ("until", "absent")
_NO_CALL = SimpleNamespace(params={})
_unexplained_key = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def tinygsm_path() -> Path:
    """The directory of the embedded model."""
    from aqnfx.data import embedded_model

    return embedded_model()


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The directory of further test models beside the checkout; skips where there is none."""
    models = ROOT.parent / "shared" / "models"
    if not models.is_dir():
        pytest.skip("../shared/models is absent: it is not part of the repository")
    return models


@pytest.fixture(scope="session", autouse=True)
def shared_exports() -> Iterator[Exports | None]:
    """``torch.export.export`` records a Hugging Face model of one description once; see ``tests/exports.py``."""
    if not Path(__file__).with_name("exports.py").exists():  # the rule below is tested with a copy of this file alone
        yield None
        return
    import torch

    from tests.exports import Exports

    with pytest.MonkeyPatch.context() as patch:
        exports = Exports(torch.export.export)
        patch.setattr(torch.export, "export", exports)
        yield exports


@pytest.fixture
def own_exports(shared_exports: Exports | None) -> Iterator[None]:
    """For tests of tracing itself: every export is made anew."""
    assert shared_exports is not None
    shared_exports.fresh = True
    yield
    shared_exports.fresh = False


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let Inductor write scalar code but where a test is for vectors: compiling these takes it most of a minute."""
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "compiler"):
        from torch._inductor import config

        config.cpp.simdlen = None if item.get_closest_marker("vectors") else 1


@pytest.hookimpl(tryfirst=True)  # before -m leaves tests out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Call a test slow for the families that are not quick, where it is also for one that is."""
    if (families := sys.modules.get("tests.families")) is None:
        return
    of_test: dict[str, list[tuple[pytest.Item, set[str]]]] = {}
    for item in items:
        values = {v for v in getattr(item, "callspec", _NO_CALL).params.values() if isinstance(v, str)}
        if named := values & families.FAMILIES.keys():
            of_test.setdefault(item.nodeid.partition("[")[0], []).append((item, named))
    for found in of_test.values():
        if any(named & {*families.QUICK} for _, named in found):
            for item, named in found:
                if not named & {*families.QUICK}:
                    item.add_marker(pytest.mark.slow)


# A skip without an expiry condition fails the session ----------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_SkipRule(config), "aqnfx-skip-rule")


class _SkipRule:
    """Notes skips from their reports, which reach the main process from parallel workers too."""

    def __init__(self, config: pytest.Config) -> None:
        self.found: list[str] = []
        config.stash[_unexplained_key] = self.found

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, (tuple, list)) else str(report.longrepr)
        line = f"{report.nodeid}: {reason}"
        if not any(word in reason for word in SKIP_WORDS) and line not in self.found:
            self.found.append(line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    unexplained = session.config.stash[_unexplained_key]
    if unexplained and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    unexplained = config.stash[_unexplained_key]
    if unexplained:
        terminalreporter.section("skips without an expiry condition", red=True)
        for line in unexplained:
            terminalreporter.line(line)
        terminalreporter.line(f"Say in the reason until when, or what is absent (one of: {', '.join(SKIP_WORDS)}).")
