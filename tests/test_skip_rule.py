"""The rule of conftest.py that a skip without an expiry condition fails the session."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def test_a(): pass", 0),
        ("def test_a(): pytest.skip('until the exporter exists')", 0),
        ("def test_a(): pytest.skip('no reason')", 1),
        ("pytest.skip('the model is absent', allow_module_level=True)", 5),
        ("pytest.skip('later', allow_module_level=True)", 1),
        ("@pytest.mark.xfail\ndef test_a(): assert False", 0),
    ],
)
def test_skip_rule(tmp_path: Path, source: str, expected: int) -> None:
    check(tmp_path, source, expected)


def test_skips_of_parallel_workers_count_too(tmp_path: Path) -> None:
    check(tmp_path, "def test_a(): pytest.skip('no reason')", 1, "-p", "xdist", "-n", "2")


def check(tmp_path: Path, source: str, expected: int, *options: str) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_one.py").write_text(f"import pytest\n{source}\n")
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), "-c", "/dev/null", str(tmp_path)]
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=900, env=alone)
    assert done.returncode == expected, done.stdout + done.stderr
    assert ("without an expiry condition" in done.stdout) == ("no reason" in source or "later" in source)
