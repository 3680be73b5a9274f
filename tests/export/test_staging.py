"""Nothing half-written: full disks, signals, and places that belong to the input."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aqnfx.errors import InputError
from aqnfx.export.compressed_tensors import export_compressed_tensors
from aqnfx.export.pt2 import export_pt2
from aqnfx.export.python_source import export_python
from aqnfx.export.targets import export_plan
from tests.export.conftest import Case

DOWN = "model.layers.0.mlp.down_proj"
FORMATS = {DOWN: {"weight": "int4:g32"}}


@pytest.fixture
def full() -> Iterator[None]:
    """No file of this process grows beyond 16 KiB, as on a disk with no room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("export", "name"), [(export_pt2, "out.pt2"), (export_python, "out"), (export_compressed_tensors, "out")]
)
def test_a_disk_without_room_is_one_line(case: Case, tmp_path: Path, full: None, export: object, name: str) -> None:
    """PyTorch's own writer of .pt2 files ends the process there."""
    assert callable(export)
    with pytest.raises(InputError, match=r"cannot write .*out.*: .*large; nothing was left there") as error:
        export(case.job(FORMATS), tmp_path / name, check=False)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    text = (
        "import os, sys\nfrom aqnfx.export.staging import staged_folder\nwith staged_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'half').write_text('x')\n    os.kill(os.getpid(), int(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", text, str(tmp_path / "out"), str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -number
    assert not list(tmp_path.iterdir())


def test_neither_the_plan_nor_the_model_is_replaced(case: Case) -> None:
    plan = case.write(FORMATS)
    link = case.new("link")
    link.symlink_to(plan)
    before = {path: path.read_bytes() for path in (plan, *case.checkpoint.iterdir())}
    for out, words in ((plan, "the plan itself"), (link, "the plan itself"), (case.checkpoint / "config.json", "belongs to")):
        with pytest.raises(InputError, match=words):
            export_plan(plan, "modelopt", out)
    with pytest.raises(InputError, match="is not empty"):
        export_plan(plan, "torchao", case.checkpoint)
    assert before == {path: path.read_bytes() for path in (plan, *case.checkpoint.iterdir())}
