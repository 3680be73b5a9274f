"""``aqnfx diagnose --task generate``: accuracy of what the model says, and one clear line where it cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Aqnfx, Place
from tests.cli.tiny import save_answers, save_model


@pytest.mark.slow
def test_generated_answers_are_measured(aqnfx: Aqnfx, place: Place, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    data = save_answers(model, tmp_path / "data.jsonl", ("One dog?", "A red barn?", "Two", "Why"), 4)
    flags = ["--task", "generate", "--samples", 4, "--ops", "linear", "--levels", "0.5", "--seeds", 1, "--probes", "all",
             "--method", "measure", "--compile", "no"]  # fmt: skip
    done = aqnfx("diagnose", model, "--data", data, *flags, "--max-new-tokens", 4, "--stop", r"\n\n", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / "sensitivity_map.json").read_text(encoding="utf-8"))
    assert found["task"]["metric"] == "generate"
    assert found["task"]["degradation"] == "exact_match"
    assert found["baseline"]["accuracy"] == 0.75
    for wrong, message in (
        (["--task", "kl", "--max-new-tokens", 4], "max_new_tokens is for task generate"),
        (["--max-new-tokens", 10**6], "lower max_new_tokens"),
    ):
        ended = aqnfx("diagnose", model, "--data", data, *flags, *wrong, "--out", tmp_path / "no")
        assert ended.code == 2
        assert message in ended.err
        assert not (tmp_path / "no" / "sensitivity_map.json").exists()
