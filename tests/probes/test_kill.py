"""SIGKILL at random moments of a sweep: every resume completes, with the scores of an undisturbed run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is absent on this platform")
def test_killed_sweeps_lose_only_the_item_in_flight(repo_root: Path) -> None:
    """A few kills of what ``examples/bench/kill.py`` does a hundred times."""
    script = repo_root / "examples" / "bench" / "kill.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, str(script), "--kills", "15", "--seed", "7"],
        capture_output=True, text=True, env=environment, check=False, timeout=900,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("15 kills over")
    assert "every resume completed, scores identical, no item twice" in ended.stdout
