"""aqnfx diagnose --dry-run: what a run would cost, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Aqnfx, Place


def test_it_says_what_a_run_would_do_and_writes_nothing(aqnfx: Aqnfx, place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = aqnfx("diagnose", place.model, *place.quick, "--out", out, "--dry-run")
    assert ended.code == 0, ended.err
    assert "probes on 2 batches" in ended.out
    assert "compiled: none" in ended.out
    assert "about" in ended.out
    assert not out.exists()
    found: dict[str, Any] = json.loads(aqnfx("diagnose", place.model, *place.quick, "--dry-run", "--json").out)
    assert aqnfx("diagnose", place.model, *place.quick, "--out", out).code == 0
    cost = json.loads((out / "report.json").read_text(encoding="utf-8"))["cost"]
    # Every noisy run, and a clean one per batch.
    assert cost["runs"] == found["runs"] + found["batches"]
    assert 0.0 < found["share"] <= 1.0
    assert found["seconds"] == pytest.approx(found["measure_seconds"])
    assert cost["tokens_per_second"] > 0
    assert cost["shares"]["run"] > 0
    assert sum(cost["shares"].values()) <= 1.0


@pytest.mark.slow
def test_with_predictions_it_is_a_bound(aqnfx: Aqnfx, place: Place, tmp_path: Path) -> None:
    options = [*place.quick[:-1], "both", "--draws", 2]
    found = json.loads(aqnfx("diagnose", place.model, *options, "--dry-run", "--json").out)
    assert aqnfx("diagnose", place.model, *options, "--out", tmp_path / "out").code == 0
    cost = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["cost"]
    assert cost["runs"] <= found["runs"] + found["batches"]
    assert found["predict_seconds"] > 0
    assert cost["predict"]["backward_passes"] == 4


def test_bad_input_is_refused_as_ever(aqnfx: Aqnfx, place: Place) -> None:
    ended = aqnfx("diagnose", place.model, "--data", "nowhere.jsonl", "--dry-run")
    assert ended.code == 2
    assert "does not exist" in ended.err
