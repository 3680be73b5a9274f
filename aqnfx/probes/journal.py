"""The journal of a measuring run: one JSON line per finished work item, so that an interrupted run can continue."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr, ValidationError, model_validator

from aqnfx.artifacts import Schema
from aqnfx.errors import ArtifactError, InputError
from aqnfx.probes.work import Item, Scores

MOST_BYTES = 1 << 31
"""Largest journal that is read."""


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
        self._fresh = False
        try:
            # Unbuffered: what a failed write leaves in a buffer would be written again when the file is closed.
            self._file = open(path, "a+b", buffering=0, opener=_open_at_once)  # noqa: SIM115 (kept until close)
        except OSError as error:
            raise self._cannot_write(error) from error
        try:
            self._take()
            content = self._content()
            self._fresh = not content or _is_torn_header(content)
            keep = 0 if self._fresh else self._read(content, identity)
            self._file.truncate(keep)
            if self._fresh:
                self._append({"schema": Schema.JOURNAL, "identity": dict(identity)})
        except BaseException as error:
            self._remove_empty()
            self._file.close()
            if isinstance(error, OSError):
                raise self._cannot_write(error) from error
            raise

    def _take(self) -> None:
        """Take the file for this process until it is closed, where the platform has locks of files."""
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            raise InputError(f"cannot write the journal {self.path}: it is not a regular file; choose another --out")
        if not _lock(self._file):
            raise InputError(f"journal {self.path} is in use by another run; wait for it, or choose another --out")
        # Between opening and locking, whoever had the file may have finished and removed it.
        if not self.path.exists() or not os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
            raise InputError(f"journal {self.path} was just finished by another run; run the command again")

    def _content(self) -> bytes:
        size = os.fstat(self._file.fileno()).st_size
        if size > MOST_BYTES:
            raise ArtifactError(f"journal {self.path} has {size:,} bytes, more than a run writes; {self._start_again}")
        self._file.seek(0)
        return self._file.read() or b""

    @property
    def _start_again(self) -> str:
        return f"remove it to start again without --resume, or choose another --out ({self.path})"

    def _read(self, content: bytes, identity: Mapping[str, Any]) -> int:
        """Load the items; return the length of the intact part in bytes."""
        keep, wanted = 0, json.loads(json.dumps(dict(identity)))
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                if number == 1:
                    _same_run(self.path, _checked(line, _Header), wanted)
                else:
                    self._keep(_checked(line, _Line))
            except ValueError as error:
                if number == len(lines) and number > 1 and isinstance(error, _Torn):
                    break
                raise ArtifactError(f"journal {self.path} is damaged at line {number}: {error}; {self._start_again}") from error
            keep += len(line)
        return keep

    def _keep(self, found: _Line) -> None:
        place = self.part(found.part) if found.part is not None else self
        if found.scores is None:
            place.failed[found.item] = found.error or "failed"
        else:
            place.items[found.item] = found.scores
            place.failed.pop(found.item, None)

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
        if error is not None:
            self._remove_empty()
        self.close()

    def _remove_empty(self) -> None:
        """Leave no file without work in it: one that was begun here, by whoever holds its lock."""
        parts: tuple[Journal | Part, ...] = (self, *self._parts.values())
        if self._fresh and not any(part.items or part.failed for part in parts):
            with contextlib.suppress(OSError):
                self.path.unlink()


class Part:
    """What a journal holds of one further sweep of its run: used like the journal itself."""

    def __init__(self, journal: Journal, name: str) -> None:
        self._journal, self._name = journal, name
        self.items: dict[Item, Scores] = {}
        self.failed: dict[Item, str] = {}

    def add(self, item: Item, scores: Scores | None, error: str | None = None) -> None:
        """Append an item, see :meth:`Journal.add`."""
        self._journal._add(self, {"part": self._name}, item, scores, error)


def discard(path: Path) -> None:
    """Remove the journal of a run that has ended, if there is one; raises :class:`InputError` where a run still writes it."""
    try:
        with open(path, "ab", buffering=0, opener=_open_only) as stream:
            if not _lock(stream):
                raise InputError(f"journal {path} is in use by another run; wait for it, or choose another --out")
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"cannot remove the journal {path}: {error.strerror or error}") from error


def recorded_identity(path: Path) -> dict[str, Any]:
    """Return the identity that the journal at ``path`` was begun with, empty where there is no intact one."""
    try:
        with open(path, "rb", opener=_open_at_once) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                return {}
            return _checked(stream.readline(MOST_BYTES), _Header).identity.model_dump(exclude_unset=True)
    except (OSError, ValueError):
        return {}


class _Torn(ValueError):
    """A line that was not written to its end, or changed afterwards."""


class _Identity(BaseModel):
    """What is read from an identity besides comparing it with another one."""

    model_config = ConfigDict(extra="allow")

    probes: list[tuple[StrictStr, StrictStr, StrictInt]] = []
    method: list[StrictStr | StrictInt] = []
    compile: StrictStr = ""


class _Header(BaseModel):
    """The first line."""

    model_config = ConfigDict(extra="forbid")

    schema_: StrictStr = Field(alias="schema")
    identity: _Identity


_Number = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]


class _Line(BaseModel):
    """Every other line: an item with scores per sample, or with the error that it ended in."""

    model_config = ConfigDict(extra="forbid")

    item: tuple[_Number, Annotated[StrictInt, Field(ge=-1, lt=1 << 31)], _Number, _Number]
    part: StrictStr | None = None
    scores: dict[StrictStr, list[StrictFloat]] | None = None
    error: StrictStr | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> _Line:
        if (self.scores is None) == (self.error is None):
            raise ValueError("an item has either scores or an error")
        return self


_Record = TypeVar("_Record", _Header, _Line)


def _is_torn_header(content: bytes) -> bool:
    """Return whether a file holds only the beginning of a first line: nothing was finished yet."""
    start = b'{"schema":"' + Schema.JOURNAL.encode()
    digest, space, body = content[:16], content[16:17], content[17 : 17 + len(start)]
    known = not digest.strip(b"0123456789abcdef") and space in (b"", b" ") and start.startswith(body)
    return known and b"\n" not in content


def _checked(line: bytes, model: type[_Record]) -> _Record:
    """Return the record of a line; raises ``ValueError``, in one line, for one that was changed or never was one."""
    digest, _, body = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or hashlib.sha256(body).hexdigest()[:16].encode() != digest:
        raise _Torn("its checksum does not fit")
    try:
        return model.model_validate(json.loads(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'record'}: {first['msg']}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _lock(stream: FileIO) -> bool:
    """Lock a file until it is closed, where platform and file system have locks; return False where another has it."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
    return True


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for whoever is at the other end of a FIFO."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)


def _open_only(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_CREAT)


def _same_run(path: Path, record: _Header, wanted: dict[str, Any]) -> None:
    if record.schema_ != Schema.JOURNAL:
        raise ArtifactError(f"{path} has the schema {record.schema_!r}; expected {Schema.JOURNAL}")
    found = json.loads(record.identity.model_dump_json(exclude_unset=True))
    for key in wanted:
        if found.get(key) != wanted[key]:
            raise ArtifactError(
                f"journal {path} belongs to another run: {key} was {_short(found.get(key))}, now {_short(wanted[key])}; "
                "repeat the earlier command, or choose another --out"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
