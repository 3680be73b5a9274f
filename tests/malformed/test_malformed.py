"""Every command on malformed input: one line, a documented exit code, no traceback, no file left, no hang.

A case is run again by its number: ``pytest "tests/malformed/test_malformed.py::test_malformed[12]"``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aqnfx.cli.boundary import Code
from aqnfx.cli.main import main
from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.errors import AqnfxError
from aqnfx.reporting.report import save_report
from tests.cli.tiny import save_model, save_text
from tests.malformed.cases import BY_MAP, CASES, DIAGNOSE, FAST, Good, mutated

MOST_SECONDS = 60
"""Of processor time: on a busy machine a case may wait long for its turn."""


def run(*arguments: str) -> tuple[int, str, str]:
    """Run ``aqnfx`` in this process and return exit code, stdout and stderr."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict") for _ in range(2))
    before, sys.argv = sys.argv, ["aqnfx", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
    texts = []
    for stream in (out, err):
        stream.flush()
        stream.seek(0)
        texts.append(stream.read())
    return int(ended.value.code or 0), texts[0], texts[1]


@pytest.fixture(scope="module", autouse=True)
def bounded() -> Iterator[None]:
    """Bound the memory of this process by what it has and 8 GiB, so that what reads without end fails instead of the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Good]:
    """Return well-formed input, made by the commands themselves; nothing may change it."""
    root = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "COLUMNS": "200"}.items():
            patch.setenv(name, value)
        patch.delenv("AQNFX_DEBUG", raising=False)
        from transformers.utils import logging

        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        model, data = save_model(root / "model", num_hidden_layers=1), save_text(root / "text.jsonl")
        known = {"model": model, "data": data, "out": root / "out", "here": root}
        assert run(*(part.format(**known) for part in DIAGNOSE))[0] == 0
        found = {"map": root / "out" / "sensitivity_map.json", "out": root / "out", "model": model}
        ended = run(*(part.format(**found) for part in (*BY_MAP, "--map", "{map}", "--thresholds", "1e9,0")))
        assert ended[0] == 0, ended
        records = [json.loads((root / "out" / name).read_text()) for name in ("sensitivity_map.json", "plan.json")]
        yield Good(model=model, data=data, map=records[0], plan=records[1])
        if shown:
            logging.enable_progress_bar()


def content(directory: Path) -> dict[str, tuple[int, int]]:
    """Return what is in a directory: name -> size and time of change."""
    found = {path: path.lstat() for path in sorted(directory.rglob("*"))}
    return {str(path.relative_to(directory)): (s.st_size, s.st_mtime_ns) for path, s in found.items() if not path.is_dir()}


def seen(directory: Path) -> dict[str, tuple[int, int]]:
    """Return ``content`` with the folders."""
    return content(directory) | {str(p.relative_to(directory)): (0, 0) for p in directory.rglob("*") if p.is_dir()}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "number", [n if n < len(FAST) else pytest.param(n, marks=pytest.mark.slow) for n in range(len(CASES))]
)
def test_malformed(number: int, good: Good, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[number]
    monkeypatch.chdir(tmp_path)
    if case.setup is not None:
        case.setup(tmp_path, good)
    root = good.model.parent
    known = {"{model}": good.model, "{data}": good.data, "{map}": root / "out" / "sensitivity_map.json",
             "{plan}": root / "out" / "plan.json", "{here}": tmp_path, "{out}": tmp_path / "out"}  # fmt: skip
    arguments = []
    for part in case.arguments:
        for name, value in known.items():
            part = part.replace(name, str(value))
        arguments.append(part)
    before, inputs, began = seen(tmp_path), content(root), time.process_time()
    code, out, err = run(*arguments)
    assert content(root) == inputs, "an input was changed"
    told = f"{code}: {' '.join(arguments)[:500]}\n{out[-500:]}\n{err[-2000:]}"
    assert "Traceback" not in out + err, told
    assert "\x1b" not in out + err, told
    if code == Code.OK:
        assert case.may_pass, told
        assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")], told
    else:
        assert code == Code.BAD_INPUT, told
        assert err.startswith("aqnfx: "), told
        assert err.count("\n") == 1, told
        assert len(err) < 2500, told
        assert not out, told
        assert seen(tmp_path) == before, told
    assert time.process_time() - began < MOST_SECONDS, told
    for place in tmp_path.iterdir():
        (shutil.rmtree if place.is_dir() and not place.is_symlink() else os.unlink)(place)


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_edited_maps_are_saved_or_refused(first: int, good: Good, tmp_path: Path) -> None:
    """A map that was edited by hand is refused in one line, or reported on; it never ends in another error."""
    for seed in range(first, first + 100):
        record = mutated(good.map, random.Random(seed))
        told = ""
        try:
            save_report(SensitivityMap.from_record(record), tmp_path)
        except AqnfxError as error:
            told = str(error)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
        assert "\n" not in told, seed


def test_there_are_enough_of_them() -> None:
    assert len(FAST) >= 500
    assert len({case.arguments[0] for case in CASES if case.arguments}) >= 9
