"""The journal of a measuring run: one JSON line per finished work item, so that an interrupted run can continue."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from aqnfx.errors import ArtifactError, InputError
from aqnfx.probes.work import Item, Scores

SCHEMA = "aqnfx.journal/1"


class Journal:
    """Finished work items of one run, appended to ``path`` as they come; ``identity`` says which run it is.

    ``items`` holds the scores of what succeeded; items that failed are written down too, and are to be done again.
    :meth:`part` gives what belongs to a second sweep of the same run, whose items are numbered anew.

    An existing file is read and continued; its torn last line (a kill in the middle of a write) is cut off. Raises
    :class:`ArtifactError` when the file is not a journal, is damaged before its end, or belongs to another run (the
    message names the first field that differs), :class:`InputError` when it cannot be written.
    """

    _file: FileIO

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.items: dict[Item, Scores] = {}
        self.failed: dict[Item, str] = {}
        self._parts: dict[str, Part] = {}
        try:
            fresh = not path.exists() or not path.stat().st_size or _torn_header(path)
            keep = 0 if fresh else self._read(identity)
            # Unbuffered: what a failed write leaves in a buffer would be written again when the file is closed.
            self._file = path.open("ab" if fresh else "r+b", buffering=0)
        except OSError as error:
            raise self._cannot_write(error) from error
        try:
            self._lock()
            if path.stat().st_size:
                self._file.truncate(keep)
                self._file.seek(keep)
        except OSError as error:
            self._file.close()
            raise self._cannot_write(error) from error
        if fresh:
            try:
                self._append({"schema": SCHEMA, "identity": dict(identity)})
            except InputError:
                self._file.close()
                raise

    def _read(self, identity: Mapping[str, Any]) -> int:
        """Load the items; return the length of the intact part in bytes."""
        keep, wanted = 0, json.loads(json.dumps(dict(identity)))
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                record = _checked(line, "schema" if number == 1 else "item")
            except ValueError as error:
                if number == len(lines) and number > 1:
                    break
                raise ArtifactError(
                    f"journal {self.path} is damaged at line {number}: {error}; start again without --resume"
                ) from error
            if number == 1:
                _same_run(self.path, record, wanted)
            else:
                batch, probe, level, seed = record["item"]
                place = self.part(record["part"]) if "part" in record else self
                if "error" in record:
                    place.failed[batch, probe, level, seed] = str(record["error"])
                else:
                    place.items[batch, probe, level, seed] = record["scores"]
                    place.failed.pop((batch, probe, level, seed), None)
            keep += len(line)
        return keep

    def _lock(self) -> None:
        """Take the file for this process until it is closed, where the platform has locks of files."""
        try:
            import fcntl
        except ImportError:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise InputError(f"journal {self.path} is in use by another run; wait for it, or choose another --out") from error

    def add(self, item: Item, scores: Scores | None, error: str | None = None) -> None:
        """Append an item, with its scores or the error that it ended in; it is on disk when this returns.

        Raises :class:`InputError` when it cannot be written.
        """
        self._add(self, {}, item, scores, error)

    def _add(
        self, place: Journal | Part, part: dict[str, str], item: Item, scores: Scores | None, error: str | None
    ) -> None:
        if scores is None:
            self._append({"item": list(item), **part, "error": error or "failed"})
            place.failed[item] = error or "failed"
            return
        self._append({"item": list(item), **part, "scores": scores})
        place.items[item] = scores
        place.failed.pop(item, None)

    def part(self, name: str) -> Part:
        """Return the items of the sweep called ``name`` within this run; its records are in the same file."""
        return self._parts.setdefault(name, Part(self, name))

    def _append(self, record: dict[str, Any]) -> None:
        body = json.dumps(record, separators=(",", ":"))
        digest = hashlib.sha256(body.encode()).hexdigest()[:16]
        rest = memoryview(f"{digest} {body}\n".encode())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> InputError:
        return InputError(f"cannot write the journal {self.path}: {error.strerror or error}")

    def close(self) -> None:
        """Close the file; every finished item is on disk already."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Part:
    """What a journal holds of one further sweep of its run: used like the journal itself."""

    def __init__(self, journal: Journal, name: str) -> None:
        self._journal, self._name = journal, name
        self.items: dict[Item, Scores] = {}
        self.failed: dict[Item, str] = {}

    def add(self, item: Item, scores: Scores | None, error: str | None = None) -> None:
        """Append an item, see :meth:`Journal.add`."""
        self._journal._add(self, {"part": self._name}, item, scores, error)


def recorded_identity(path: Path) -> dict[str, Any]:
    """Return the identity that the journal at ``path`` was begun with, empty where there is no intact one."""
    try:
        with path.open("rb") as stream:
            identity = _checked(stream.readline(), "schema").get("identity")
    except (OSError, ValueError):
        return {}
    return identity if isinstance(identity, dict) else {}


def _torn_header(path: Path) -> bool:
    """Return whether a file holds only the beginning of a first line: nothing was finished yet."""
    content = path.read_bytes()
    start = b'{"schema":"' + SCHEMA.encode()
    digest, space, body = content[:16], content[16:17], content[17 : 17 + len(start)]
    known = not digest.strip(b"0123456789abcdef") and space in (b"", b" ") and start.startswith(body)
    return known and b"\n" not in content


def _checked(line: bytes, key: str) -> dict[str, Any]:
    digest, _, body = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or hashlib.sha256(body).hexdigest()[:16].encode() != digest:
        raise ValueError("its checksum does not fit")
    record: dict[str, Any] = json.loads(body)
    if not isinstance(record, dict) or key not in record:
        raise ValueError(f"it has no {key}")
    return record


def _same_run(path: Path, record: dict[str, Any], wanted: dict[str, Any]) -> None:
    if record.get("schema") != SCHEMA:
        raise ArtifactError(f"{path} has the schema {record.get('schema')!r}; expected {SCHEMA}")
    found = record.get("identity")
    found = found if isinstance(found, dict) else {}
    for key in wanted:
        if found.get(key) != wanted[key]:
            raise ArtifactError(
                f"journal {path} belongs to another run: {key} was {_short(found.get(key))}, now {_short(wanted[key])}; "
                "repeat the earlier command, or choose another --out"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
