"""Models and data for commands, and a way to run ``aqnfx`` in this process."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.tiny import save_model, save_text


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Aqnfx = Callable[..., Ended]


@pytest.fixture
def aqnfx(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Aqnfx]:
    """Run ``aqnfx`` with arguments as the shell does, and return exit code, stdout and stderr."""
    from transformers.utils import logging

    from aqnfx.cli.main import main

    # A process of its own reads this from the environment, before transformers is imported.
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE", "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "COLUMNS": "160",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)

    def run(*arguments: object) -> Ended:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["aqnfx", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return Ended(code=int(ended.value.code or 0), out=out, err=err)

    yield run
    if shown:
        logging.enable_progress_bar()


@dataclass(frozen=True, kw_only=True)
class Place:
    """A directory with models and data: good ones and bad ones."""

    root: Path
    model: Path
    data: Path
    questions: Path

    @property
    def quick(self) -> list[object]:
        """Options of a diagnosis that takes about a second once the model is traced."""
        return ["--data", self.data, "--samples", 4, "--seeds", 2, "--levels", "0.1,0.3", "--max-length", 24,
                "--window", 2, "--ops", "linear", "--compile", "no", "--batch-size", 2,
                "--method", "measure"]  # fmt: skip


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("cli")
    model = save_model(root / "model", num_hidden_layers=3)
    save_model(root / "nan", num_hidden_layers=3, nan=True)
    for bad in ("corrupt", "empty-weights", "no-config", "no-tokenizer", "odd-config"):
        shutil.copytree(model, root / bad)
    weights = (model / "model.safetensors").read_bytes()
    (root / "corrupt" / "model.safetensors").write_bytes(weights[:1000])
    (root / "empty-weights" / "model.safetensors").write_bytes(b"")
    (root / "no-config" / "config.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "no-tokenizer" / name).unlink()
    (root / "odd-config" / "config.json").write_text("{not json", encoding="utf-8")
    questions = root / "questions.jsonl"
    questions.write_text(
        "".join(f'{{"question": "{a} + {a}?", "answer": "{2 * a}"}}\n' for a in range(6)), encoding="utf-8"
    )
    (root / "empty.jsonl").touch()
    (root / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n', encoding="utf-8")
    (root / "fields.jsonl").write_text('{"body": "fine"}\n', encoding="utf-8")
    (root / "file").write_text("a regular file", encoding="utf-8")
    return Place(root=root, model=model, data=save_text(root / "text.jsonl"), questions=questions)
