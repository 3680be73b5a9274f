"""Where a command writes: made and proven before anything runs, never an input, and nothing left where it fails."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from aqnfx.artifacts import check_output_dir, missing_directories, remove_empty, target_of
from aqnfx.errors import InputError

_HEAD = 4096


@contextlib.contextmanager
def output_directory(out: Path | None) -> Iterator[None]:
    """Make a directory before a run, where one is asked for, and take away what was made when the run fails."""
    if out is None:
        yield
        return
    made = missing_directories(out)
    check_output_dir(out)
    try:
        yield
    except BaseException:
        remove_empty(made)
        raise


@contextlib.contextmanager
def claimed_directory(out: Path) -> Iterator[Path]:
    """Make a directory and take it for this run alone, where the platform has locks, until the block ends.

    Directories that it made are gone when the block fails and left them empty. Raises :class:`InputError` where another run
    has the directory; nothing in it is touched then.
    """
    made = missing_directories(out)
    directory = check_output_dir(out)
    with _locked(directory):
        try:
            yield directory
        except BaseException:
            remove_empty(made)
            raise


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{directory} is in use by another run; wait for it, or choose another --out") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def check_files_in(out: Path | None, names: Iterable[str], inputs: Mapping[str, Path | None]) -> None:
    """Do what :func:`check_outputs` does for the files that a command writes into the directory ``out``."""
    if out is not None and os.path.isdir(out):  # else nothing is there that could be replaced
        for name in names:
            check_outputs([out / name], inputs)


def check_outputs(files: Sequence[Path], inputs: Mapping[str, Path | None], *, model: str | None = None) -> None:
    """Raise :class:`InputError` where one of the files cannot be written, or would replace what the command reads.

    ``inputs``: option -> file that is read. ``model``: where it is a local folder, its files are inputs too, except for
    artifacts of this project. The first of ``files`` is the one that the user named; others beside it are replaced only
    where that one is an artifact of an earlier run.
    """
    targets = [target_of(path) for path in files]
    for path, target in zip(files, targets, strict=True):
        for option, given in inputs.items():
            if given is not None and _same(target, given):
                raise InputError(f"--out would write {path}, which is what {option} reads; choose another name")
        if model is not None and target.exists() and _is_inside(target, Path(model)) and not is_artifact(target):
            raise InputError(f"--out would replace {path}, a file of the model; choose another place")
        _check_name(path, target)
    for path, target in zip(files[1:], targets[1:], strict=True):
        if target.exists() and not is_artifact(targets[0]):
            raise InputError(
                f"--out {files[0]} also writes {path}, which is there and is no report of an earlier {files[0].name}; choose "
                "another name"
            )


def is_artifact(path: Path) -> bool:
    """Return whether a file is JSON with a schema of this project, by its beginning."""
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD)
    except OSError:
        return False
    return head.lstrip().startswith(b"{") and b'"schema": "aqnfx.' in head


def _check_name(path: Path, target: Path) -> None:
    """Ask the file system about the name: one that is too long is refused now, not after the run."""
    try:
        os.lstat(target)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}; choose another name") from error


def _same(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        if one.exists() and other.exists():
            return os.path.samefile(one, other)  # a hard link has another name
    return os.path.realpath(one) == os.path.realpath(other)


def _is_inside(target: Path, model: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return model.is_dir() and target.is_relative_to(os.path.realpath(model))
    return False
