"""Commands as processes of their own: signals at any time, readers that go away, full disks, terminals that know ASCII only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Place

COMMAND = [sys.executable, "-m", "aqnfx"]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100", **more}


def test_help_needs_ascii_only_and_names_the_exit_codes() -> None:
    for arguments in ([], ["diagnose"]):
        ended = subprocess.run(
            [*COMMAND, *arguments, "--help"], env=environment(PYTHONIOENCODING="ascii", LANG="C"), capture_output=True
        )
        assert ended.returncode == 0
        assert not ended.stderr
        assert ended.stdout.isascii()
        assert arguments or b"70 a fault of aqnfx itself" in ended.stdout


def test_a_full_disk_under_stdout() -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run([*COMMAND, "--help"], env=environment(), stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("aqnfx: cannot write standard output")
    assert ended.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_finished_run_whose_reader_went_away(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [*COMMAND, "diagnose", str(place.model), *map(str, place.quick), "--out", str(out)]
    for code, words in ((0, ""), (2, "aqnfx: cannot write standard output")):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "wb") as gone, open("/dev/full", "wb") as full:
            ended = subprocess.run(
                arguments, env=environment(), stdout=full if code else gone, stderr=subprocess.PIPE, text=True
            )
        assert ended.returncode == code, ended.stderr
        assert ended.stderr.startswith(words)
        assert ended.stderr.count("\n") == (1 if words else 0)
        assert sorted(p.name for p in out.iterdir()) == ["report.json", "report.md", "sensitivity_map.json"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["trace", "{model}"], ["opt", "{model}", "--out", "{out}/g.txt"], ["analyze", "{model}", "--out", "{out}"],
        ["scan", "{model}", "--data", "{data}", "--out", "{out}"],
        ["plan", "{model}", "--data", "{data}", "--avg-bits", "5", "--out", "{out}/p.json"],
        ["diagnose", "{model}", "--data", "{data}", "--out", "{out}"],
    ],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_sigterm_before_anything_is_measured(arguments: list[str], place: Place, tmp_path: Path) -> None:
    names = {"{model}": place.model, "{data}": place.data, "{out}": tmp_path / "out"}
    for name, value in names.items():
        arguments = [part.replace(name, str(value)) for part in arguments]
    # Says that the handler stands: what is under way then is importing, loading or tracing.
    code = (
        "import threading; from aqnfx.cli.main import main;"
        "threading.Timer(1, print, ['ready'], dict(flush=True)).start(); main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 143, (out, err)
    assert err.startswith("aqnfx: interrupted")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_model_is_one_line_and_no_word_of_other_packages() -> None:
    ended = subprocess.run(
        [*COMMAND, "trace", "nobody/has-this-model"], env=environment(HF_HUB_OFFLINE="1"), capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("aqnfx: cannot load model 'nobody/has-this-model'")
    assert ended.stderr.count("\n") == 1
