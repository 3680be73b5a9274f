"""Every example runs with ``--quick`` and says something."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# Each example is a first user of the package in a child of its own; what they all import of others is imported once.
FIRST_USERS = """
import os, runpy, sys, traceback
import torch, transformers
for name in sys.argv[1:]:
    child = os.fork()
    if child:
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{name} --help failed")
        continue
    try:
        sys.argv = [name, "--help"]
        runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        os._exit(int(end.code or 0))
    except BaseException:
        traceback.print_exc()
    os._exit(1)
"""


def test_there_are_examples() -> None:
    assert EXAMPLES, "examples/ holds no *.py"


@pytest.fixture
def settings_of_the_process() -> Iterator[None]:
    """Put back what examples set for their process."""
    from transformers.utils import logging

    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    shown = logging.is_progress_bar_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # as in a process of its own
@pytest.mark.usefixtures("settings_of_the_process")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_quickly(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "--quick" in example.read_text(encoding="utf-8"), f"{example.name} has no --quick"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(example.parent)
    monkeypatch.setattr(sys, "argv", [str(example), "--quick"])
    code = None
    try:
        runpy.run_path(str(example), run_name="__main__")
    except SystemExit as end:
        code = end.code
    assert not code, f"{example.name} exited with {code}"
    assert capfd.readouterr().out.strip(), f"{example.name} printed nothing"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is absent on this platform")
def test_examples_import_what_they_use(tmp_path: Path) -> None:
    """In a process in which nothing has imported the package before."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USERS, *map(str, EXAMPLES)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("--quick") >= 2 * len(EXAMPLES)  # usage and description
