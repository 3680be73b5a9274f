"""Run a diagnosis for the terminal: output folder, progress bar, resume, artifacts, tables."""

from __future__ import annotations

import contextlib
import ctypes
import json
import stat
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from aqnfx.cli.boundary import Code
from aqnfx.cli.places import check_files_in, claimed_directory
from aqnfx.cli.terminal import Terminal, progress_bar
from aqnfx.errors import InputError, Interrupted

if TYPE_CHECKING:
    from aqnfx.diagnosis.sensitivity_map import SensitivityMap

JOURNAL = "journal.jsonl"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def run_session(
    model: str, data: Path, options: dict[str, Any], *, out: Path, resume: bool, json_output: bool, fresh: bool = False
) -> None:
    """Diagnose ``model`` on ``data`` and write the artifacts to ``out``; ``fresh`` discards an unfinished run there.

    Exits with 130 after an interruption: what was finished is written, and the line on stderr says how to resume.
    """
    check_data(data)
    from aqnfx.diagnosis.options import Options
    from aqnfx.probes.journal import discard
    from aqnfx.reporting.report import FILES, print_summary, save_report

    Options(**options)  # before a directory is made
    check_files_in(out, (*FILES.values(), JOURNAL), {"--data": data})
    keep_freed_memory()
    warnings.filterwarnings("ignore", module="torch|transformers")
    console = Terminal(stderr=json_output)
    with claimed_directory(out) as directory:
        journal = directory / JOURNAL
        _check_journal(journal, directory, resume=resume, fresh=fresh)
        if fresh:
            discard(journal)
        smap = _diagnose(model, data, options, journal, console, resumable=not fresh)
        paths = save_report(smap, directory)
        if not smap.partial:  # before anything is printed: a reader that went away does not unmake a finished run
            discard(journal)
    if json_output:
        print(json.dumps(smap.to_record()))
    else:
        print_summary(smap, console)
        console.print(f"\nReport: {paths['markdown']}", soft_wrap=True)
    if smap.partial:
        hint = "" if fresh else "; --resume with the same options continues"
        print(f"aqnfx: interrupted; what is finished is in {directory}{hint}", file=sys.stderr)
        raise typer.Exit(Code.INTERRUPTED)


def _check_journal(journal: Path, out: Path, *, resume: bool, fresh: bool) -> None:
    if journal.exists() and not (resume or fresh):
        raise InputError(
            f"{out} holds an unfinished run; add --resume to continue it, remove {journal} to start again, or choose another "
            "--out"
        )
    if resume and not journal.exists():
        raise InputError(f"{out} holds no unfinished run to resume; run without --resume")


def _diagnose(
    model: str, data: Path, options: dict[str, Any], journal: Path, console: Terminal, *, resumable: bool
) -> SensitivityMap:
    from aqnfx.diagnosis.diagnose import diagnose

    with progress_bar(console, counts=True) as bar:
        task, told = bar.add_task("starting", total=None), ["starting"]

        def status(text: str) -> None:
            told[0] = text
            bar.update(task, description=text)

        def progress(done: int, total: int) -> None:
            text = told[0] if told[0] in ("predicting", "confirming thresholds") else "measuring"
            bar.update(task, completed=done, total=total, description=text)

        try:
            return diagnose(model, data, journal=journal, progress=progress, status=status, **options)
        except Interrupted as error:
            hint = "; --resume with the same options continues" if journal.exists() and resumable else ""
            raise Interrupted(f"{error}{hint}") from error


def check_data(data: Path) -> None:
    """Raise :class:`InputError` where a data file is not there, or cannot be looked at."""
    try:
        mode = data.stat().st_mode
    except FileNotFoundError as error:
        raise InputError(f"data file {data} does not exist") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the data file {data}: {getattr(error, 'strerror', None) or error}") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # whoever reads it says what a directory must hold
        raise InputError(f"cannot read the data file {data}: it is a device or a pipe; write what it gives to a file")


def run_forecast(model: str, data: Path, options: dict[str, Any], *, json_output: bool) -> None:
    """Print what :func:`run_session` would do and about how long it would take; nothing is written."""
    check_data(data)
    from aqnfx.diagnosis.forecast import forecast
    from aqnfx.diagnosis.options import Options
    from aqnfx.diagnosis.probe_choice import prepare_probes

    keep_freed_memory()
    warnings.filterwarnings("ignore", module="torch|transformers")
    wanted = Options(**options)
    found = forecast(prepare_probes(model, data, wanted), wanted)
    print(json.dumps(found.to_record()) if json_output else "\n".join(found.lines()))


def keep_freed_memory() -> None:
    """Tell glibc to keep what it frees: else every large activation is mapped and faulted in anew, a fifth of a run."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
