"""Reading and writing artifacts: whole files or none, plain JSON, every failure one clear line."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from aqnfx.errors import ArtifactError, InputError


def write_json(path: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """Write ``record`` as JSON, atomically, and return the path.

    The file is complete or untouched: the text is made first, goes to a temporary file in the same directory, is
    fsynced and renamed. Raises ``ValueError`` when a number is NaN or infinite (name it ``None`` instead),
    ``TypeError`` for a value that JSON does not have, :class:`InputError` when the file cannot be written.
    """
    try:
        text = json.dumps(record, allow_nan=False, indent=1, ensure_ascii=False)
    except ValueError as error:
        raise ValueError(f"{path}: the record holds a value that JSON cannot express ({error})") from error
    return write_text(path, text + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` as UTF-8, atomically, and return the path.

    A symbolic link is followed, so that its target is what changes. Raises :class:`InputError` when the place is not
    writable or is not a regular file; the old content then stands.
    """
    # Lone surrogates come from file names that are not UTF-8; the escape is also what JSON calls that character.
    payload = text.encode("utf-8", errors="backslashreplace")
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise InputError(f"cannot write {path}: it exists and is not a regular file; choose another name")
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        _write_synced(temporary, payload)
        os.replace(temporary, target)
    except OSError as error:
        _cannot_write(path, error)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    _sync_directory(target.parent)
    return Path(path)


def read_json(path: str | os.PathLike[str], *, schema: str | None = None) -> dict[str, Any]:
    """Read a JSON object, checking its ``schema`` where one is given, for example ``"aqnfx.sensitivity/1"``.

    Raises :class:`InputError` when the file is not there or not readable, :class:`ArtifactError` when it is truncated,
    not a JSON object, holds NaN or infinities, or has another schema.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: not a JSON text file (byte {error.start} is not UTF-8)") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {_reason(error)}") from error
    try:
        record = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: truncated or not JSON ({error}); write it again") from error
    if not isinstance(record, dict):
        raise ArtifactError(f"{path}: expected a JSON object, found {type(record).__name__}")
    found = record.get("schema")
    if schema is not None and found != schema:
        what = f"found {found!r}" if "schema" in record else "the file names no schema"
        raise ArtifactError(f"{path}: expected schema {schema!r}, {what}")
    return record


def check_output_dir(path: str | os.PathLike[str]) -> Path:
    """Create the directory where it is missing, prove that a file can be written there, and return it.

    Meant to be called before a long run. Raises :class:`InputError` when the place is a file or not writable.
    """
    directory = Path(path)
    probe = directory / f".aqnfx-{secrets.token_hex(6)}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_synced(probe, b"aqnfx")
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"output directory {path}: a file of that name is in the way; choose another name") from error
    except OSError as error:
        raise InputError(f"output directory {path} is not writable: {_reason(error)}; choose another one") from error
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    return directory


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
