"""The journal: what was finished survives any kill, and nothing else is taken for it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from aqnfx.errors import ArtifactError, InputError
from aqnfx.probes.journal import Item, Journal, discard, recorded_identity

IDENTITY: dict[str, Any] = {"model": "ab12", "levels": [0.1, 0.2], "data": "cd34", "batch_size": 8}
ITEMS: dict[Item, dict[str, list[float]]] = {
    (0, 0, 0, 0): {"kl": [0.1, 1e-9], "top1": [3.0, 4.0]},
    (0, 0, 1, 0): {"kl": [1 / 3, 2.0], "top1": [1.0, 0.0]},
    (1, 2, 0, 1): {"kl": [0.0, 5e300], "top1": [1.0, 2.0]},
}


def write(path: Path) -> bytes:
    """Write a journal of all items and return its bytes."""
    with Journal(path, IDENTITY) as journal:
        for item, scores in ITEMS.items():
            journal.add(item, scores)
    return path.read_bytes()


def test_items_come_back_exactly(tmp_path: Path) -> None:
    before = write(tmp_path / "j")
    with Journal(tmp_path / "j", IDENTITY) as journal:
        assert journal.items == ITEMS
    assert (tmp_path / "j").read_bytes() == before


def test_parts_number_their_items_anew(tmp_path: Path) -> None:
    item, scores = next(iter(ITEMS.items()))
    write(tmp_path / "j")
    with Journal(tmp_path / "j", IDENTITY) as journal:
        journal.part("a").add(item, {"kl": [7.0]})
        journal.part("b").add(item, None, "no memory")
        journal.part("b").add((5, 5, 5, 5), {"kl": [8.0]})
    with Journal(tmp_path / "j", IDENTITY) as journal:
        assert journal.items == ITEMS
        assert not journal.failed
        assert journal.part("a").items == {item: {"kl": [7.0]}}
        assert not journal.part("a").failed
        assert journal.part("b").failed == {item: "no memory"}
        assert journal.part("b").items == {(5, 5, 5, 5): {"kl": [8.0]}}
        assert not journal.part("c").items
        journal.part("b").add(item, scores)
        assert not journal.part("b").failed


def test_every_item_is_on_disk_when_add_returns(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", IDENTITY) as journal:
        for count, (item, scores) in enumerate(ITEMS.items(), start=2):
            journal.add(item, scores)
            assert (tmp_path / "j").read_bytes().count(b"\n") == count


def test_torn_last_line_is_cut_off_wherever_it_tore(tmp_path: Path) -> None:
    whole = write(tmp_path / "j")
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(whole)):
        path = tmp_path / "torn"
        path.write_bytes(whole[:cut])
        with Journal(path, IDENTITY) as journal:
            assert list(journal.items) == list(ITEMS)[:-1]
            journal.add(list(ITEMS)[-1], list(ITEMS.values())[-1])
        assert path.read_bytes() == whole, f"cut at byte {cut}"


def test_a_run_killed_in_its_first_line_starts_anew(tmp_path: Path) -> None:
    whole = write(tmp_path / "j")
    header = whole[: whole.find(b"\n") + 1]
    for cut in range(len(header) - 1):
        path = tmp_path / "torn"
        path.write_bytes(header[:cut])
        with Journal(path, IDENTITY) as journal:
            assert journal.items == {}
        assert path.read_bytes() == header, f"cut at byte {cut}"
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"my notes, one line, precious")
    with pytest.raises(ArtifactError, match="damaged at line 1"):
        Journal(foreign, IDENTITY)
    assert foreign.read_bytes() == b"my notes, one line, precious"


def test_a_run_killed_before_its_first_line_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "j").touch()
    with Journal(tmp_path / "j", IDENTITY) as journal:
        assert journal.items == {}
    assert (tmp_path / "j").read_bytes().count(b"\n") == 1


def test_a_flipped_bit_before_the_end_is_damage(tmp_path: Path) -> None:
    whole = write(tmp_path / "j")
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for at in range(0, last - 1, 7):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 7)
        if bytes(damaged[at : at + 1]) in b"\n\r":
            continue
        path = tmp_path / "damaged"
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="damaged at line") as caught:
            Journal(path, IDENTITY)
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == damaged  # the evidence stays


def test_a_line_that_vanished_is_no_item(tmp_path: Path) -> None:
    lines = write(tmp_path / "j").splitlines(keepends=True)
    (tmp_path / "j").write_bytes(b"".join([lines[0], lines[1], lines[3]]))
    with Journal(tmp_path / "j", IDENTITY) as journal:
        assert list(journal.items) == [next(iter(ITEMS)), list(ITEMS)[2]]


@pytest.mark.parametrize("content", [b"hello\n", b"{}\n", b"\x00\xff\xfe\n\n", b"0123456789abcdef {}\n{}\n", b"x"])
def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged at line 1"):
        Journal(tmp_path / "j", IDENTITY)
    assert (tmp_path / "j").read_bytes() == content


@pytest.mark.parametrize("body", ['{"schema":"aqnfx.journal/9","identity":{}}', '{"identity":{}}'])
def test_another_schema_is_named(tmp_path: Path, body: str) -> None:
    (tmp_path / "j").write_text(f"{hashlib.sha256(body.encode()).hexdigest()[:16]} {body}\n", encoding="utf-8")
    with pytest.raises(ArtifactError, match="schema"):
        Journal(tmp_path / "j", IDENTITY)


@pytest.mark.parametrize(
    "body", ["[]", "{}", '{"schema":"aqnfx.journal/1"}', '{"schema":"aqnfx.journal/1","identity":3}']
)
def test_a_header_that_is_no_header_is_refused(tmp_path: Path, body: str) -> None:
    (tmp_path / "j").write_text(f"{hashlib.sha256(body.encode()).hexdigest()[:16]} {body}\n", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"damaged at line 1|belongs to another run"):
        Journal(tmp_path / "j", IDENTITY)


@pytest.mark.parametrize("key", sorted(IDENTITY))
def test_another_run_is_refused_by_the_field_that_differs(tmp_path: Path, key: str) -> None:
    before = write(tmp_path / "j")
    with pytest.raises(ArtifactError, match=f"another run: {key} was ") as caught:
        Journal(tmp_path / "j", {**IDENTITY, key: "other"})
    assert "\n" not in str(caught.value)
    assert (tmp_path / "j").read_bytes() == before


def test_a_field_that_the_earlier_run_lacks_is_a_difference(tmp_path: Path) -> None:
    write(tmp_path / "j")
    with pytest.raises(ArtifactError, match="device was null"):
        Journal(tmp_path / "j", {**IDENTITY, "device": "cpu"})


def test_a_long_field_is_shortened(tmp_path: Path) -> None:
    write(tmp_path / "j")
    with pytest.raises(ArtifactError, match=r"xxx\.\.\.") as caught:
        Journal(tmp_path / "j", {**IDENTITY, "data": "x" * 1000})
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "j", tmp_path / "absent" / "j", tmp_path):
        with pytest.raises(InputError, match="cannot write the journal"):
            Journal(place, IDENTITY)

    def refuse(*_args: Any, **_options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("aqnfx.probes.journal.os.open", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        Journal(tmp_path / "new", IDENTITY)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is absent on this system")
def test_a_journal_has_one_writer(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", IDENTITY) as journal:
        journal.add(*next(iter(ITEMS.items())))
        before = (tmp_path / "j").read_bytes()
        with pytest.raises(InputError, match="in use by another run; wait for it, or choose another --out"):
            Journal(tmp_path / "j", IDENTITY)
        assert (tmp_path / "j").read_bytes() == before
    with Journal(tmp_path / "j", IDENTITY) as journal:
        assert len(journal.items) == 1


def test_failures_are_kept_until_they_succeed(tmp_path: Path) -> None:
    item, scores = next(iter(ITEMS.items()))
    with Journal(tmp_path / "j", IDENTITY) as journal:
        journal.add(item, None, "out of memory")
        assert journal.items == {}
    with Journal(tmp_path / "j", IDENTITY) as journal:
        assert journal.failed == {item: "out of memory"}
        journal.add(item, scores)
    with Journal(tmp_path / "j", IDENTITY) as journal:
        assert journal.failed == {}
        assert journal.items == {item: scores}


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("aqnfx.probes.journal.os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        Journal(tmp_path / "j", IDENTITY)
    assert not (tmp_path / "j").exists()


@pytest.mark.parametrize("device", ["/dev/full", "/dev/zero", "fifo"])
def test_devices_and_pipes_are_refused_at_once(tmp_path: Path, device: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "j").symlink_to(device)
    with pytest.raises(InputError, match="not a regular file"):
        Journal(tmp_path / "j", IDENTITY)
    assert recorded_identity(tmp_path / "j") == {}


def test_a_disk_that_fills_up_loses_only_what_was_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    journal = Journal(tmp_path / "j", IDENTITY)
    first, second = list(ITEMS.items())[:2]
    journal.add(*first)
    monkeypatch.setattr("aqnfx.probes.journal.os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        journal.add(*second)
    monkeypatch.undo()
    journal.__exit__(None, None, None)
    with Journal(tmp_path / "j", IDENTITY) as journal:
        assert journal.items.items() <= dict([first, second]).items()


def test_adding_an_item_twice_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "j")
    item, scores = next(iter(ITEMS.items()))
    with Journal(tmp_path / "j", IDENTITY) as journal:
        journal.add(item, scores)
        assert journal.items == ITEMS
    with Journal(tmp_path / "j", IDENTITY) as journal:
        assert journal.items == ITEMS


def test_a_run_that_failed_removes_its_own_journal_and_no_other(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Journal(tmp_path / "j", IDENTITY):
        raise RuntimeError
    assert not (tmp_path / "j").exists()
    with Journal(tmp_path / "j", IDENTITY) as first:
        for _ in range(2):
            with pytest.raises(InputError, match="in use"):
                Journal(tmp_path / "j", IDENTITY)
        with pytest.raises(InputError, match="in use"):
            discard(tmp_path / "j")
        first.add(*next(iter(ITEMS.items())))
    assert (tmp_path / "j").read_bytes().count(b"\n") == 2
    with pytest.raises(RuntimeError), Journal(tmp_path / "j", IDENTITY):
        raise RuntimeError
    assert (tmp_path / "j").exists()  # it holds finished work of the run before
    discard(tmp_path / "j")
    discard(tmp_path / "j")
    assert not (tmp_path / "j").exists()


RECORDS = [
    {"item": [0, 0, 0], "scores": {"kl": [1.0]}}, {"item": [0, 0, 0, "0"], "scores": {"kl": [1.0]}},
    {"item": [0, -2, 0, 0], "scores": {}}, {"item": [0, 0, 0, 10**30], "scores": {}}, {"item": [0, 0, True, 0], "scores": {}},
    {"item": None, "scores": {}}, {"item": {"0": 1}, "scores": {}}, {"item": [0, 0, 0, 0], "scores": [1.0]},
    {"item": [0, 0, 0, 0], "scores": {"kl": 1.0}}, {"item": [0, 0, 0, 0], "scores": {"kl": ["1.0"]}},
    {"item": [0, 0, 0, 0], "scores": {"kl": [None]}}, {"item": [0, 0, 0, 0]}, {"item": [0, 0, 0, 0], "error": 3},
    {"item": [0, 0, 0, 0], "error": "x", "scores": {}}, {"item": [0, 0, 0, 0], "part": 3, "error": "x"},
    {"item": [0, 0, 0, 0], "error": "x", "more": 1}, [], 3, "item",
]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=map(json.dumps, RECORDS))
@pytest.mark.parametrize("last", [True, False])
def test_a_malformed_record_with_a_right_checksum_is_damage(tmp_path: Path, record: Any, last: bool) -> None:
    whole, body = write(tmp_path / "j"), json.dumps(record)
    line = f"{hashlib.sha256(body.encode()).hexdigest()[:16]} {body}\n".encode()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "j").write_bytes(b"".join([*lines, line] if last else [*lines[:2], line, *lines[2:]]))
    with pytest.raises(ArtifactError, match=f"damaged at line {5 if last else 3}: .*remove it to start again") as caught:
        Journal(tmp_path / "j", IDENTITY)
    assert "\n" not in str(caught.value)
