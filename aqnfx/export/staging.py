"""Writing an export: a folder or file beside the wanted one, moved there when it is complete, or nothing."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from aqnfx.errors import InputError


def check_free(out: str | Path, *, folder: bool) -> Path:
    """Return where ``out`` leads, a place that a folder or file can be moved to; raises :class:`InputError` otherwise.

    Meant to be called before anything slow, too.
    """
    target = Path(os.path.realpath(out))
    if not target.parent.is_dir():
        raise InputError(f"cannot write {out}: {target.parent} is no folder; make it first")
    if folder and target.exists() and not target.is_dir():
        raise InputError(f"{out} is a file, and this export is a folder; choose another --out")
    if folder and target.is_dir() and any(target.iterdir()):
        raise InputError(f"{out} is not empty; choose another --out, or remove it first")
    if not folder and target.exists() and not target.is_file():
        raise InputError(f"{out} is a folder, and this export is one file; choose another --out")
    return target


@contextlib.contextmanager
def staged_folder(out: str | Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``out`` when the block ends without an error, and is removed otherwise.

    Raises :class:`InputError` where ``out`` is a file, holds something already, or cannot be made.
    """
    target = check_free(out, folder=True)
    with _beside(target, out) as temporary:
        yield temporary
        try:
            os.replace(temporary, target)
        except OSError as error:
            raise InputError(f"cannot write {out}: {error.strerror}; choose another place") from error


@contextlib.contextmanager
def staged_file(out: str | Path) -> Iterator[Path]:
    """Yield a path in a folder of its own; the file written there becomes ``out``, which is replaced where it exists.

    Raises :class:`InputError` where ``out`` is a folder or cannot be written.
    """
    target = check_free(out, folder=False)
    with _beside(target, out) as temporary:
        yield temporary / target.name
        try:
            os.replace(temporary / target.name, target)
        except OSError as error:
            raise InputError(f"cannot write {out}: {error.strerror}; choose another place") from error


@contextlib.contextmanager
def _beside(target: Path, out: str | Path) -> Iterator[Path]:
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.mkdir()
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; choose a place that exists and is writable") from error
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
