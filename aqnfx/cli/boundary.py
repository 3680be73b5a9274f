"""The boundary of the command line: whatever escapes a command becomes one line on stderr and a documented exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any

import typer

from aqnfx.cli.signals import Signals
from aqnfx.errors import AqnfxError, Interrupted, printable

# Typer exports no name for the base of its usage errors, and where it lives differs between versions.
UsageError: Any = typer.BadParameter.__mro__[1]
LONGEST = 2000
"""Characters of a line: more of a message from elsewhere helps nobody."""


_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EBADF)


class Code(IntEnum):
    """What ``aqnfx`` exits with."""

    OK = 0
    FAILED = 1
    BAD_INPUT = 2
    INCONCLUSIVE = 3
    FAULT = 70
    INTERRUPTED = 130
    TERMINATED = 143


MEANING = {
    Code.OK: "done, also where the reader of the output went away",
    Code.FAILED: "a check failed",
    Code.BAD_INPUT: "bad input, or something that the system refused: one line says what was asked, found, and what to try",
    Code.INCONCLUSIVE: "inconclusive",
    Code.FAULT: "a fault of aqnfx itself: one line asks for the output of --debug",
    Code.INTERRUPTED: "interrupted; what was finished is written, if anything was",
    Code.TERMINATED: "the same after SIGTERM, or after the terminal went away",
}
EPILOG = "Exit codes: " + "; ".join(f"{code.value} {meaning.split(':')[0]}" for code, meaning in MEANING.items()) + "."


def run(command: Callable[[], None]) -> int:
    """Run ``command`` and return its exit code; errors are printed as one line, with ``--debug`` after their traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that knows ASCII only shows the rest as escapes
            stream.reconfigure(errors="backslashreplace")
    with Signals() as signals:
        try:
            command()
            sys.stdout.flush()
            return Code.OK
        except BaseException as error:
            escaped = error
        code, line = judge(escaped, signals.number)
        if os.environ.get("AQNFX_DEBUG") and line is not None:
            _say(lambda: traceback.print_exception(escaped))
        if line is not None:
            _say(lambda: print(f"aqnfx: {line}", file=sys.stderr))
        if _flush_error() is not None:
            _drop_output()
        return code


def judge(error: BaseException, signal_number: int | None = None) -> tuple[int, str | None]:
    """Return the exit code of what escaped a command, and the line to print (None: everything was said).

    ``signal_number`` is the signal that the process was sent, if any.
    """
    terminated = signal_number not in (None, signal.SIGINT)
    interrupted = Code.TERMINATED if terminated else Code.INTERRUPTED
    if isinstance(error, typer.Exit):
        return (interrupted if error.exit_code == Code.INTERRUPTED else error.exit_code), None
    if isinstance(error, Interrupted):
        return interrupted, _one_line(str(error))
    stopped = any(isinstance(cause, (KeyboardInterrupt, typer.Abort)) for cause in _chain(error))
    ended_by_signal = isinstance(error, SystemExit) and error.code == signal.SIGTERM  # Ray's handler
    told = f"interrupted by {signal.Signals(signal_number).name}" if terminated and signal_number is not None else "interrupted"
    if isinstance(error, (KeyboardInterrupt, typer.Abort)) or ended_by_signal or (stopped and signal_number is not None):
        return interrupted, told
    if isinstance(error, (OSError, SystemExit)) and (refused := _flush_error()) is not None:
        return _unwritable(refused)
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):  # as rich and typer end
        return Code.OK, None
    if isinstance(error, UsageError):
        if len(sys.argv) <= 1:  # no command: the help, not a complaint
            error.show()
            return Code.BAD_INPUT, None
        return Code.BAD_INPUT, f"{_one_line(error.format_message()).rstrip('.')}; see aqnfx --help"
    if isinstance(error, AqnfxError):
        return error.exit_code, _one_line(next(iter(str(error).splitlines()), ""))
    code, line = _foreign(error)
    if code == Code.FAULT and signal_number is not None:  # what a signal tears apart may fail in its own way: a half-done import
        return interrupted, told
    return code, line


def _foreign(error: BaseException) -> tuple[int, str | None]:
    """Judge an error that is not one of aqnfx's own."""
    words = _one_line(next((line for line in str(error).splitlines() if line.strip()), ""))
    if isinstance(error, BrokenPipeError) and _reader_is_gone():
        return Code.OK, None
    if isinstance(error, MemoryError) or _out_of_memory(error):
        return Code.BAD_INPUT, (
            f"not enough memory{f' ({words})' if words else ''}; try a smaller --batch-size or --max-length, a smaller model "
            "or dtype, or a machine with more"
        )
    if isinstance(error, OSError):
        place = " -> ".join(repr(str(name)) for name in (error.filename, error.filename2) if name is not None)
        reason = error.strerror or words or type(error).__name__
        if not place and error.errno in _OF_WRITING:
            return Code.BAD_INPUT, f"cannot write standard output, or a temporary file: {reason}; artifacts that are there stand"
        return Code.BAD_INPUT, _one_line(f"{f'{place}: ' if place else ''}{reason}; check the path, its permissions and the disk")
    if isinstance(error, OverflowError):
        return Code.BAD_INPUT, f"a number is too large ({words}); give smaller numbers"
    what = f"{type(error).__name__}{f': {words}' if words else ''}"
    return Code.FAULT, f"a fault of aqnfx itself, {what}; please report it with the output of: aqnfx --debug (the same command)"


def _out_of_memory(error: BaseException) -> bool:
    """Return whether PyTorch could not allocate: it raises a RuntimeError, with a class of its own on accelerators only."""
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    known = ("DefaultCPUAllocator: can't allocate", "DefaultCPUAllocator: not enough memory", "std::bad_alloc")
    return type(error).__name__ == "OutOfMemoryError" or any(words in text for words in known)


def _unwritable(refused: OSError) -> tuple[int, str | None]:
    if isinstance(refused, BrokenPipeError):
        return Code.OK, None
    return Code.BAD_INPUT, f"cannot write the output: {refused.strerror or refused}; what was written to files stands"


def _flush_error() -> OSError | None:
    """Return why what was printed cannot be written, None where it was."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return error
    except ValueError:  # closed
        return None
    return None


def _reader_is_gone() -> bool:
    """Return whether stdout is a pipe that nobody reads."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


def _drop_output() -> None:
    """Let what is still buffered go nowhere: at exit Python would write it once more, complain, and exit with 120."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all that it was raised from, or in the handling of."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        found = left.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            yield found
            left += [found.__cause__, found.__context__]


def _one_line(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def _say(what: Callable[[], object]) -> None:
    with contextlib.suppress(OSError, ValueError):  # stderr may be full or closed; the exit code says it too
        what()
