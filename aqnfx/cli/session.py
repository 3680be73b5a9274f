"""Run a diagnosis for the terminal: output folder, progress bar, resume, artifacts, tables."""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from aqnfx.errors import InputError, Interrupted
from aqnfx.reporting.artifacts import check_output_dir

JOURNAL = "journal.jsonl"
INTERRUPTED, TERMINATED = 130, 143
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def run_session(
    model: str, data: Path, options: dict[str, Any], *, out: Path, resume: bool, json_output: bool, fresh: bool = False
) -> None:
    """Diagnose ``model`` on ``data`` and write the artifacts to ``out``; ``fresh`` discards an unfinished run there.

    Exits with 130 after an interruption, with 143 after SIGTERM: what was finished is written, and the line on stderr
    says how to resume.
    """
    if not data.exists():
        raise InputError(f"data file {data} does not exist")
    journal = out / JOURNAL
    if journal.exists() and not (resume or fresh):
        raise InputError(f"{out} holds an unfinished run; add --resume to continue it, or choose another --out")
    if resume and not journal.exists():
        raise InputError(f"{out} holds no unfinished run to resume; run without --resume")
    made = [p for p in (out, *out.parents) if not p.exists()]
    directory = check_output_dir(out)
    if fresh:
        journal.unlink(missing_ok=True)
    from aqnfx.diagnosis.diagnose import diagnose
    from aqnfx.reporting.console import print_summary
    from aqnfx.reporting.report import save_report

    keep_freed_memory()
    console = Console(stderr=json_output)
    warnings.filterwarnings("ignore", module="torch|transformers")
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )  # fmt: skip
    with _terminable() as terminated, Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)

        told = ["starting"]

        def status(text: str) -> None:
            told[0] = text
            bar.update(task, description=text)

        def progress(done: int, total: int) -> None:
            text = told[0] if told[0] in ("predicting", "confirming thresholds") else "measuring"
            bar.update(task, completed=done, total=total, description=text)

        try:
            smap = diagnose(
                model, data, journal=journal, progress=progress, status=status, **options,
            )  # fmt: skip
        except BaseException as error:  # a failure of any kind leaves no journal without finished work
            _leave_nothing(None if resume else journal, made)
            if isinstance(error, Interrupted):
                hint = "; --resume with the same options continues" if journal.exists() and not fresh else ""
                ended = Interrupted(f"{error}{hint}")
                ended.exit_code = TERMINATED if terminated else ended.exit_code
                raise ended from error
            raise
    paths = save_report(smap, directory)
    if json_output:
        print(json.dumps(smap.to_record()))
    else:
        print_summary(smap, console)
        console.print(f"\nReport: {paths['markdown']}", soft_wrap=True, markup=False)
    if smap.to_record()["partial"]:
        hint = "" if fresh else "; --resume with the same options continues"
        print(f"aqnfx: interrupted; what is finished is in {directory}{hint}", file=sys.stderr)
        raise typer.Exit(TERMINATED if terminated else INTERRUPTED)
    journal.unlink(missing_ok=True)


@contextlib.contextmanager
def _terminable() -> Iterator[list[int]]:
    """Let SIGTERM end the block as Ctrl-C does, once; the list then holds its number."""
    seen: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        seen.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread: whoever runs this one decides
        yield seen
        return
    try:
        yield seen
    finally:
        signal.signal(signal.SIGTERM, before)


def run_forecast(model: str, data: Path, options: dict[str, Any], *, json_output: bool) -> None:
    """Print what :func:`run_session` would do and about how long it would take; nothing is written."""
    if not data.exists():
        raise InputError(f"data file {data} does not exist")
    from aqnfx.diagnosis.forecast import forecast
    from aqnfx.diagnosis.options import Options
    from aqnfx.diagnosis.prepare import prepare

    keep_freed_memory()
    warnings.filterwarnings("ignore", module="torch|transformers")
    wanted = Options(**options)
    found = forecast(prepare(model, data, wanted, tell=lambda _: None), wanted)
    print(json.dumps(found.to_record()) if json_output else "\n".join(found.lines()))


def keep_freed_memory() -> None:
    """Tell glibc to keep what it frees: else every large activation is mapped and faulted in anew, a fifth of a run."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def output_directory(out: Path | None) -> Iterator[None]:
    """Make a directory before a run, where one is asked for, and take away what was made when the run fails."""
    made = [path for path in (out, *out.parents) if not path.exists()] if out is not None else []
    if out is not None:
        check_output_dir(out)
    try:
        yield
    except BaseException:
        _leave_nothing(None, made)
        raise


def _leave_nothing(journal: Path | None, made: list[Path]) -> None:
    """After a failure remove the run's own journal if it holds no finished work, and directories it made in vain."""
    if journal is not None and journal.exists() and journal.read_bytes().count(b"\n") <= 1:
        journal.unlink()
    for directory in made:
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
