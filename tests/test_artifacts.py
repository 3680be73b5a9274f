"""Whole files or none; every failure one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from aqnfx.artifacts import check_output_dir, read_json, write_json, write_text
from aqnfx.errors import ArtifactError, InputError


def only_file(directory: Path, name: str) -> None:
    assert [entry.name for entry in directory.iterdir()] == [name]


def test_round_trip(tmp_path: Path) -> None:
    record = {"schema": "x/1", "a": [1, 2.5, None, True], "ä": "π | \\ \n"}
    assert write_json(tmp_path / "r.json", record) == tmp_path / "r.json"
    assert read_json(tmp_path / "r.json", schema="x/1") == record
    only_file(tmp_path, "r.json")


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    written = write_text(tmp_path / "written", "x")
    assert written.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_refused_and_the_old_file_stands(tmp_path: Path, bad: float) -> None:
    path = write_json(tmp_path / "r.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON cannot express"):
        write_json(path, {"a": {"b": [bad]}})
    assert read_json(path) == {"a": 1}
    only_file(tmp_path, "r.json")


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("crash", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_crash_in_the_middle_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, crash: BaseException
) -> None:
    path = write_text(tmp_path / "report.md", "old")

    def fail(*_: Any) -> None:
        raise crash

    monkeypatch.setattr(os, step, fail)
    expected = InputError if isinstance(crash, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_text(path, "new" * 1000)
    monkeypatch.undo()
    assert path.read_text() == "old"
    only_file(tmp_path, "report.md")


def test_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_unwritable_places_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "missing" / "r.json", tmp_path / "file" / "r.json", tmp_path, Path("/dev/null")):
        with pytest.raises(InputError, match="cannot write") as caught:
            write_json(path, {})
        assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "x"


def test_file_names_that_are_not_utf8_can_be_written(tmp_path: Path) -> None:
    record = {"path": os.fsdecode(b"caf\xe9")}
    assert read_json(write_json(tmp_path / "r.json", record)) == record
    assert "udce9" in write_text(tmp_path / "r.md", record["path"]).read_text()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot read"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "truncated or not JSON"),
        (b'{"schema": "x/1", "a": [1, 2', "truncated or not JSON"),
        (b'{"schema": "x/1", "a": NaN}', "NaN is not JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b'{"schema": "x/2"}', "expected schema 'x/1', found 'x/2'"),
        (b'{"a": 1}', "names no schema"),
        (b"[" * 100_000, "truncated or not JSON"),
    ],
)
def test_foreign_content(tmp_path: Path, payload: bytes, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(payload)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_json(path, schema="x/1")
    assert "\n" not in str(caught.value)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    text = json.dumps({"schema": "x/1", "a": [1, {"b": "c"}]})
    path = tmp_path / "r.json"
    for end in range(len(text)):
        path.write_text(text[:end])
        with pytest.raises(ArtifactError):
            read_json(path, schema="x/1")


def test_output_dir(tmp_path: Path) -> None:
    found = check_output_dir(tmp_path / "a" / "b")
    assert found.is_dir()
    assert list(found.iterdir()) == []
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "sub"):
        with pytest.raises(InputError, match="in the way"):
            check_output_dir(path)


def test_output_dir_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match="is not writable: Permission denied"):
        check_output_dir(tmp_path)
