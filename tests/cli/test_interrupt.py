"""Ctrl-C: exit code 130, what is finished is reported, and --resume ends where an undisturbed run ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from aqnfx.cli.session import run_session
from aqnfx.probes.measure import measure as real_measure
from tests.cli.conftest import Aqnfx, Place

SEEDS = 10
WAIT = 900  # seconds; nothing here is about how fast anything is, and the machine may be busy
# A shell that runs the tests in the background may have switched SIGINT off for its children.
START = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from aqnfx.cli.main import main; main()"
)


def options(place: Place, out: Path) -> list[str]:
    return [
        "diagnose", str(place.model), "--data", str(place.data), "--samples", "6", "--batch-size", "2", "--levels", "0.2",
        "--seeds", str(SEEDS), "--max-length", "24", "--ops", "linear", "--probes", "layer,window", "--window", "2",
        "--compile", "no", "--out", str(out),
    ]  # fmt: skip


def saved(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "sensitivity_map.json").read_text(encoding="utf-8"))
    return record


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_and_resume(aqnfx: Aqnfx, place: Place, tmp_path: Path, sent: signal.Signals, code: int) -> None:
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    command = options(place, out)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", START, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    journal, deadline = out / "journal.jsonl", time.monotonic() + WAIT
    try:
        # 5 probes × 10 seeds × 3 batches: stop after the first probe, long before the end.
        while not journal.exists() or journal.read_bytes().count(b"\n") < 2 * SEEDS:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(sent)
        stdout, stderr = process.communicate(timeout=WAIT)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code, stderr
    assert "Traceback" not in stdout + stderr
    assert stderr.splitlines() == [
        f"aqnfx: interrupted; what is finished is in {out}; --resume with the same options continues"
    ]
    partial = saved(out)
    assert partial["partial"] is True
    assert 1 <= len(partial["per_layer"]) <= 3
    assert journal.exists()
    assert "partial" in (out / "report.md").read_text(encoding="utf-8").lower()

    if sent is signal.SIGTERM:  # what is left is the same after either
        return
    before = journal.read_bytes()
    assert aqnfx(*command).code == 2  # without --resume
    ended = aqnfx(*command, "--resume", "--seed", "1")
    assert ended.code == 2
    assert "seeds was" in ended.err
    assert journal.read_bytes() == before

    assert aqnfx(*command, "--resume").code == 0
    assert not journal.exists()
    assert aqnfx(*options(place, undisturbed)).code == 0
    resumed, whole = saved(out), saved(undisturbed)
    provenance = resumed.pop("provenance")
    assert provenance["resumed_items"] >= 2 * SEEDS - 2
    assert whole.pop("provenance")["resumed_items"] == 0
    assert resumed == whole
    assert resumed["partial"] is False


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Make measuring stop as by Ctrl-C once ``after`` items are done."""

    def measure(*args: Any, progress: Any = None, **kwargs: Any) -> Any:
        def stop(done: int, total: int) -> None:
            progress(done, total)
            if done >= after:
                raise KeyboardInterrupt

        return real_measure(*args, progress=stop, **kwargs)

    monkeypatch.setattr("aqnfx.diagnosis.diagnose.measure", measure)


def test_interrupted_before_the_first_probe_was_finished(
    aqnfx: Aqnfx, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ["diagnose", place.model, *place.quick, "--out", out]
    with monkeypatch.context() as patch:
        interrupt(patch, after=2)
        ended = aqnfx(*command)
    assert ended.code == 130
    assert len(ended.err.splitlines()) == 1
    assert "--resume" in ended.err
    assert [p.name for p in out.iterdir()] == ["journal.jsonl"]
    assert aqnfx(*command, "--resume").code == 0
    assert saved(out)["provenance"]["resumed_items"] == 2


def test_interrupted_while_loading_leaves_nothing(
    aqnfx: Aqnfx, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_args: Any, **_options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("aqnfx.probes.prepare.load_model", stop)
    ended = aqnfx("diagnose", place.model, *place.quick, "--out", tmp_path / "a" / "b")
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert not (tmp_path / "a").exists()


def test_a_resumed_run_compiles_what_the_first_part_compiled(
    aqnfx: Aqnfx, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["diagnose", place.model, *place.quick, "--out", tmp_path, "--compile", "auto"]
    with monkeypatch.context() as patch:
        patch.setattr("aqnfx.diagnosis.diagnose.what_to_compile", lambda *_a, **_k: "none")
        interrupt(patch, after=6)
        assert aqnfx(*command).code == 130
    monkeypatch.setattr("aqnfx.diagnosis.diagnose.what_to_compile", lambda *_a, **_k: "blocks")  # another timing
    ended = aqnfx(*command, "--resume")
    assert ended.code == 0, ended.err
    assert saved(tmp_path)["provenance"]["compile"] == "none"


def test_an_interrupted_demo_does_not_speak_of_resuming(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(monkeypatch, after=9)
    values = {
        "levels": (0.1,),
        "samples": 2,
        "seeds": 2,
        "compile": "no",
        "ops": "linear",
        "max_length": 24,
        "window": 2,
    }
    with pytest.raises(typer.Exit) as ended:
        run_session(str(place.model), place.data, values, out=tmp_path, resume=False, json_output=True, fresh=True)
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"aqnfx: interrupted; what is finished is in {tmp_path}"
    assert saved(tmp_path)["partial"] is True
