"""Writing an export: a folder or file beside the wanted one, moved there when it is complete, or nothing."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aqnfx.errors import InputError

_ENDING = (signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


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


def check_apart(out: str | Path, plan: str | Path, model: str | Path | None) -> None:
    """Raise :class:`InputError` where ``out`` is the plan itself, the folder of the model, or lies in that folder."""
    target = Path(os.path.realpath(out))
    if target == Path(os.path.realpath(plan)):
        raise InputError(f"--out {out} is the plan itself, which the export would replace; choose another --out")
    if model is None or not Path(model).is_dir():
        return
    folder = Path(os.path.realpath(model))
    if folder == target or (folder in target.parents and target.exists()):
        raise InputError(f"--out {out} belongs to the model {model}, which an export never changes; choose another --out")


@contextlib.contextmanager
def staged_folder(out: str | Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``out`` when the block ends without an error, and is removed otherwise.

    Raises :class:`InputError` where ``out`` is a file, holds something already, or cannot be made, and where the block could
    not write for want of space or permission.
    """
    target = check_free(out, folder=True)
    with _beside(target, out) as temporary:
        yield temporary
        os.replace(temporary, target)


@contextlib.contextmanager
def staged_file(out: str | Path) -> Iterator[Path]:
    """Yield a path in a folder of its own; the file written there becomes ``out``, which is replaced where it exists.

    Raises :class:`InputError` where ``out`` is a folder, and where the block could not write for want of space or permission.
    """
    target = check_free(out, folder=False)
    with _beside(target, out) as temporary:
        yield temporary / target.name
        os.replace(temporary / target.name, target)


@contextlib.contextmanager
def _beside(target: Path, out: str | Path) -> Iterator[Path]:
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    with _removed_at_the_end(temporary), _in_one_line(out):
        temporary.mkdir()
        yield temporary


@contextlib.contextmanager
def _in_one_line(out: str | Path) -> Iterator[None]:
    """Turn what a file system refuses, and the error that safetensors makes of it, into :class:`InputError`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # transformers raises these for anything
            raise
        raise InputError(f"cannot write {out}: {error.strerror}; nothing was left there, choose a place with room") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError" or "os error" not in str(error):
            raise
        reason = str(error).rpartition("I/O error: ")[2].partition(" (os error")[0]
        raise InputError(f"cannot write {out}: {reason}; nothing was left there, choose a place with room") from error


@contextlib.contextmanager
def _removed_at_the_end(folder: Path) -> Iterator[None]:
    """Remove ``folder`` after the block, however it ends: by an exception, or by a signal that nobody else handles.

    The handler raises nothing, since Python swallows exceptions in some places; it removes, and then lets the signal end the
    process as it would have.
    """

    def end(number: int, _frame: Any) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    held: list[int] = []
    with contextlib.suppress(ValueError):  # not in the main thread: whoever runs this one decides
        for number in _ENDING:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, end)
                held.append(number)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for handled in held:
            signal.signal(handled, signal.SIG_DFL)
