"""What escapes a command becomes one line and a documented exit code; signals are never lost; no output replaces an input."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from aqnfx import artifacts
from aqnfx.artifacts import json_text, read_text, write_all
from aqnfx.cli.boundary import EPILOG, MEANING, Code, judge, run
from aqnfx.cli.places import check_outputs, claimed_directory, output_directory
from aqnfx.cli.signals import Signals
from aqnfx.errors import InputError, Interrupted


class OutOfMemoryError(RuntimeError):
    """As accelerators raise it."""


ESCAPED: list[tuple[BaseException, int, str]] = [
    (InputError("asked\nmore"), 2, "asked"),
    (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 2, "'/a/b': Permission denied"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000), 2, "xxx"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "cannot write standard output"),
    (FileExistsError(errno.EEXIST, "File exists", "a", None, "b"), 2, "'a' -> 'b': File exists"),
    (ConnectionError("no cluster at ray://nowhere\nand more"), 2, "no cluster at ray://nowhere"),
    (MemoryError(), 2, "not enough memory; try"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: 9 bytes"), 2, "not enough"),
    (OutOfMemoryError("CUDA out of memory"), 2, "not enough memory (CUDA out of memory)"),
    (OverflowError("int too large to convert to float"), 2, "a number is too large"),
    (KeyError("levels"), 70, "a fault of aqnfx itself, KeyError: 'levels'; please report"),
    (AssertionError(), 70, "AssertionError"),
    (RuntimeError("a \x1b[31mred\x1b[0m shape"), 70, "\\x1b[31mred"),
    (RecursionError("too deep"), 70, "RecursionError"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (Interrupted("nothing was finished"), 130, "nothing was finished"),
    (SystemExit(9), 70, "SystemExit"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "code", "words"), ESCAPED, ids=[type(e).__name__ for e, _, _ in ESCAPED])
def test_whatever_escapes_is_one_line(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command() -> None:
        raise error

    monkeypatch.delenv("AQNFX_DEBUG", raising=False)
    assert run(command) == code
    err = capsys.readouterr().err
    assert err.startswith("aqnfx: ")
    assert err.count("\n") == 1
    assert words in err
    assert len(err) < 2100
    assert "\x1b" not in err
    monkeypatch.setenv("AQNFX_DEBUG", "1")
    assert run(command) == code
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert words in err.splitlines()[-1]


def test_every_code_is_documented(repo_root: Path) -> None:
    guide = (repo_root / "docs" / "guide.md").read_text(encoding="utf-8")
    table = guide.split("## Exit codes")[1].split("##")[0]
    for code, meaning in MEANING.items():
        assert f"| {code.value} | {meaning}" in table
        assert f"{code.value} " in EPILOG


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_a_callback_swallowed_comes_again(number: signal.Signals) -> None:
    class Thing:
        pass

    def callback(_reference: object) -> None:
        signal.raise_signal(number)

    thing = Thing()
    reference = weakref.ref(thing, callback)
    with Signals() as signals:
        del thing  # the handler runs inside of the callback, whose exceptions Python throws away
        assert reference() is None
        with pytest.raises(KeyboardInterrupt):
            threading.Event().wait(20)
    assert signals.number == number
    expected = Code.INTERRUPTED if number == signal.SIGINT else Code.TERMINATED
    assert judge(KeyboardInterrupt(), number)[0] == expected
    wrapped = RuntimeError("a library ended")
    wrapped.__context__ = KeyboardInterrupt()
    assert judge(wrapped, number)[0] == expected
    assert judge(RecursionError("of a half-done import"), number)[0] == expected
    assert judge(InputError("a full disk, while the rest was written"), number)[0] == 2


def test_handlers_are_given_back_and_ignored_signals_stay_ignored() -> None:
    hook, before = sys.unraisablehook, signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
        assert signals.number is None
    finally:
        signal.signal(signal.SIGHUP, before)
    assert sys.unraisablehook is hook
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_waits_until_files_are_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        assert artifacts.moving()
        signal.raise_signal(signal.SIGTERM)
        real(source, target)

    monkeypatch.setattr("aqnfx.artifacts.os.replace", replace)

    def work() -> None:
        write_all({tmp_path / "a.json": "a", tmp_path / "a.md": "b"})
        time.sleep(20)

    with Signals() as signals, pytest.raises(KeyboardInterrupt):
        work()
    assert signals.number == signal.SIGTERM
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.json": "a", "a.md": "b"}


def test_a_full_disk_replaces_none_of_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {tmp_path / name: "new" for name in ("map.json", "report.json", "report.md")}
    write_all(dict.fromkeys(files, "old"))
    real, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("aqnfx.artifacts.os.fsync", fsync)
    with pytest.raises(InputError, match=r"report\.md: No space left"):
        write_all(files)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {path.name: "old" for path in files}


def test_one_run_at_a_time_has_a_directory(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with claimed_directory(out), pytest.raises(InputError, match="in use by another run"), claimed_directory(out):
        pass
    assert out.is_dir()  # whoever was refused removed nothing
    for place in (claimed_directory, output_directory):
        with pytest.raises(RuntimeError), place(tmp_path / "new" / "out"):
            raise RuntimeError
        assert not (tmp_path / "new").exists()


def test_outputs_that_would_replace_inputs(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (tmp_path / "data.jsonl").write_text("{}")
    os.link(tmp_path / "data.jsonl", tmp_path / "hard.json")
    (tmp_path / "soft.json").symlink_to(model / "config.json")
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "folder.md").mkdir()
    inputs = {"--data": tmp_path / "data.jsonl", "--map": None}
    for name, words in {
        "data.jsonl": "--data reads", "hard.json": "--data reads", "model/config.json": "a file of the model",
        "soft.json": "a file of the model", "notes.json": "also writes .*notes.md", "folder.json": "not a regular file",
        "x" * 254: "too long", f"{'y' * 251}.json": "too long",
    }.items():  # fmt: skip
        path = tmp_path / name
        with pytest.raises(InputError, match=words):
            check_outputs([path, path.with_suffix(".md")], inputs, model=str(model))
    for path in (tmp_path / "notes.json", model / "plan.json"):  # of an earlier run
        path.write_text(json_text(path, {"schema": "aqnfx.plan/1"}))
        check_outputs([path, path.with_suffix(".md")], inputs, model=str(model))


def test_devices_and_large_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_text("123456")
    for place, words in (
        ("/dev/zero", "regular"),
        (tmp_path / "fifo", "regular"),
        (tmp_path / "large", "more than 5 bytes"),
    ):
        with pytest.raises(InputError, match=words):
            read_text(place, most=5)
    assert read_text(tmp_path / "large", most=6) == "123456"
