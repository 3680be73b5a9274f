"""Reading and writing artifacts: whole files or none, plain JSON, every failure one clear line."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from aqnfx.errors import ArtifactError, InputError, brief, printable


class Schema(StrEnum):
    """The schemas of the project's files, by what they hold."""

    SENSITIVITY = "aqnfx.sensitivity/1"
    DIAGNOSIS = "aqnfx.diagnosis/1"
    PLAN = "aqnfx.plan/1"
    SCAN = "aqnfx.scan/1"
    ANALYSIS = "aqnfx.analysis/1"
    STRUCTURE = "aqnfx.structure/1"
    MIGRATION = "aqnfx.migration/1"
    DIVERGENCES = "aqnfx.divergences/1"
    JOURNAL = "aqnfx.journal/1"


MOST_BYTES = 1 << 30
"""Largest file that is read as an artifact."""
_MOVING = threading.Event()


def moving() -> bool:
    """Return whether files are being moved into place at this moment: what could interrupt it should wait."""
    return _MOVING.is_set()


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of ``packages`` and of this one, as artifacts record them."""
    import aqnfx

    return {**{package: version(package) for package in packages}, "aqnfx": aqnfx.__version__}


def jsonable(value: Any) -> Any:
    """Return a copy of nested values as JSON has them.

    NaN and infinities become ``None``, tuples lists, NumPy scalars numbers, keys and anything else (a path, a dtype)
    text: a long run must not end in a report that cannot be written.
    """
    import numpy as np  # not at the top: the command line reads no numbers before it knows what to do

    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value if value is None or isinstance(value, str | int) else str(value)


def json_text(path: str | os.PathLike[str], record: Mapping[str, Any]) -> str:
    """Return ``record`` as the text of the JSON file ``path``, which messages name.

    Raises ``ValueError`` when a number is NaN or infinite (name it ``None`` instead), ``TypeError`` for a value that JSON
    does not have.
    """
    try:
        return json.dumps(record, allow_nan=False, indent=1, ensure_ascii=False) + "\n"
    except ValueError as error:
        raise ValueError(f"{path}: the record holds a value that JSON cannot express ({error})") from error


def write_json(path: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """Write ``record`` as JSON, atomically, and return the path; raises as :func:`json_text` and :func:`write_text` do."""
    return write_text(path, json_text(path, record))


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` as UTF-8, atomically, and return the path; raises as :func:`write_all` does."""
    write_all({Path(path): text})
    return Path(path)


def write_all(files: Mapping[Path, str]) -> None:
    """Write every text as UTF-8 to its path: all of them, or none.

    Each goes to a temporary file in the directory of its target and is fsynced; only when all are there are they moved into
    place. A symbolic link is followed, so that its target is what changes. Raises :class:`InputError` when a place is not
    writable or is not a regular file; the old contents then stand.
    """
    targets = {path: target_of(path) for path in files}
    temporary = {path: where.with_name(f".{where.name[:100]}.{secrets.token_hex(6)}.tmp") for path, where in targets.items()}
    try:
        for path, text in files.items():
            # Lone surrogates come from file names that are not UTF-8; the escape is also what JSON calls that character.
            payload = text.encode("utf-8", errors="backslashreplace")
            try:
                _write_synced(temporary[path], payload)
            except OSError as error:
                _cannot_write(path, error)
        _MOVING.set()
        for path, where in targets.items():
            try:
                os.replace(temporary[path], where)
            except OSError as error:
                _cannot_write(path, error)
    finally:
        _MOVING.clear()
        for leftover in temporary.values():
            with suppress(OSError):
                leftover.unlink(missing_ok=True)
    for directory in {where.parent for where in targets.values()}:
        _sync_directory(directory)


def target_of(path: str | os.PathLike[str]) -> Path:
    """Return the regular file that writing to ``path`` changes, links followed, whether it is there or not.

    Raises :class:`InputError` where something else is there, or the name cannot be one.
    """
    try:
        target = Path(os.path.realpath(path))
        there = stat.S_ISREG(os.stat(target).st_mode)
    except FileNotFoundError:
        return target
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {path}: {_reason(error)}; choose another name") from error
    if not there:
        raise InputError(f"cannot write {path}: it exists and is not a regular file; choose another name")
    return target


def read_json(path: str | os.PathLike[str], *, schema: str | None = None) -> dict[str, Any]:
    """Read a JSON object, checking its ``schema`` where one is given, for example ``"aqnfx.sensitivity/1"``.

    Raises :class:`InputError` when the file is not there or not readable, :class:`ArtifactError` when it is truncated,
    not a JSON object, holds NaN, infinities or numbers beyond a double, or has another schema.
    """
    text = read_text(path, kind="JSON text")
    try:
        record = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: truncated or not JSON ({_short(error)}); write it again") from error
    if not isinstance(record, dict):
        raise ArtifactError(f"{path}: expected a JSON object, found {type(record).__name__}")
    if schema is not None:
        check_schema(record, schema, str(path))
    return record


def validate(kind: Any, value: Any, where: str) -> Any:
    """Return ``value`` as ``kind`` describes it: a pydantic model, or a type as pydantic understands it.

    Raises :class:`ArtifactError`, one line with ``where``, the place inside and what was found there, for one that is not so.
    """
    from pydantic import TypeAdapter, ValidationError  # not at the top, as above

    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        # Of a union, the models that are tried are named in the place too: private classes of this project.
        place = ".".join(printable(str(part)[:80]) for part in first["loc"] if not re.fullmatch(r"_[A-Z]\w*", str(part)))
        message = printable(first["msg"].removeprefix("Value error, ")[:200])
        found = f", found {brief(first['input'])}" if first["type"] not in ("missing", "value_error") else ""
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ArtifactError(f"{where}: {place + ': ' if place else ''}{message}{found}{more}") from error


def check_schema(record: Any, schema: str, where: str) -> None:
    """Raise :class:`ArtifactError`, one line, for what is no JSON object of ``schema``."""
    if not isinstance(record, Mapping):
        raise ArtifactError(f"{where}: expected schema {str(schema)!r}, found {type(record).__name__}")
    if (found := record.get("schema")) != schema:
        what = f"found {brief(found)}" if "schema" in record else "the file names no schema"
        raise ArtifactError(f"{where}: expected schema {str(schema)!r}, {what}")


def read_text(path: str | os.PathLike[str], *, kind: str = "text", most: int = MOST_BYTES) -> str:
    """Return the text of a regular file of at most ``most`` bytes; ``kind`` is what messages call its content.

    Raises :class:`InputError` when the file is not there, not readable, too large, or a device or pipe, which may never end;
    :class:`ArtifactError` when it is not UTF-8.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise InputError(f"cannot read {path}: it is not a regular file")
            payload = stream.read(most + 1)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {_reason(error)}") from error
    if len(payload) > most:
        raise InputError(f"cannot read {path}: it has more than {most:,} bytes, the most that is read of such a file")
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: not a {kind} file (byte {error.start} is not UTF-8)") from error


def check_output_dir(path: str | os.PathLike[str]) -> Path:
    """Create the directory where it is missing, prove that a file can be written there, and return it.

    Meant to be called before a long run. Directories that it made are gone again when it fails. Raises :class:`InputError`
    when the place is a file or not writable.
    """
    directory = Path(path)
    made = missing_directories(directory)
    probe = directory / f".aqnfx-{secrets.token_hex(6)}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_synced(probe, b"aqnfx")
    except (FileExistsError, NotADirectoryError) as error:
        remove_empty(made)
        raise InputError(f"output directory {path}: a file of that name is in the way; choose another name") from error
    except (OSError, ValueError) as error:
        remove_empty(made)
        raise InputError(f"output directory {path} is not writable: {_reason(error)}; choose another one") from error
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    return directory


def missing_directories(path: Path) -> tuple[Path, ...]:
    """Return ``path`` and its parents as far as they are not there, innermost first; none where that cannot be told."""
    try:
        return tuple(place for place in (path, *path.parents) if not place.exists())
    except (OSError, ValueError):  # too long a name, or no permission to look: making it will say so
        return ()


def remove_empty(directories: Iterable[Path]) -> None:
    """Remove those of the directories, innermost first, that are there and empty."""
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for whoever writes to a FIFO."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _write_synced(path: Path, payload: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(descriptor, "wb") as handle:
        handle.write(payload)
        handle.flush()
        os.fsync(handle.fileno())


def _sync_directory(directory: Path) -> None:
    """Make the rename itself durable where the system can; the file is whole either way."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _cannot_write(path: str | os.PathLike[str], error: OSError) -> NoReturn:
    raise InputError(f"cannot write {path}: {_reason(error)}; choose a place that exists and is writable") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond a double")
    return value


def _short(error: Exception) -> str:
    text = str(error)
    return text if len(text) <= 200 else text[:199] + "…"
