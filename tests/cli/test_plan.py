"""aqnfx plan: the tables, the files, JSON, and one line for bad input with nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.cli.conftest import Aqnfx, Place
from tests.cli.test_scan import one_line

QUICK = (
    "--samples", "3", "--eval-samples", "2", "--draws", "2", "--max-length", "24", "--batch-size", "2", "--no-pack",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_plan_in_the_terminal_and_as_files(aqnfx: Aqnfx, place: Place) -> None:
    ended = aqnfx(
        "plan", place.model, "--data", place.data, "--avg-bits", "6", "--couple", "fused", "--keep", "lm_head=bf16",
        "--modules", "model.*,lm_head", "--pareto", "3", "--out", "made/plan.json", *QUICK, "--bytes", "1GiB",
    )  # fmt: skip
    one_line(ended, "one goal: avg_bits, bytes, seconds or max_kl, found avg_bits and bytes")
    ended = aqnfx(
        "plan", place.model, "--data", place.data, "--avg-bits", "7", "--couple", "fused", "--keep", "lm_head=bf16",
        "--pareto", "3", "--out", "made/plan.json", *QUICK,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    for part in ("bits per weight with scales", "Predicted KL", "uniform int4:g32", "in order", "Spot checks", "Coupling:"):
        assert part in " ".join(ended.out.split()), part
    record = json.loads(Path("made/plan.json").read_text())
    assert record["schema"] == "aqnfx.plan/1"
    assert record["assignments"]["lm_head"] == {"weight": "bf16", "input": None}
    report = Path("made/plan.md").read_text()
    assert "## Measured on 1 samples that chose nothing" in report
    assert "plan.svg" in report
    picture = ElementTree.parse("made/plan.svg").getroot()
    assert len([e for e in picture.iter() if e.tag.endswith("circle")]) == 3


def test_json_is_all_that_is_printed(aqnfx: Aqnfx, place: Place) -> None:
    ended = aqnfx("plan", place.model, "--data", place.data, "--avg-bits", "5", "--json", *QUICK)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["effective_bits"] <= 5
    assert not list(Path().glob("plan.*"))


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (("--avg-bits", "2"), "the least feasible is 4.5"),
        ((), "a plan needs one goal"),
        (("--avg-bits", "5", "--formats", "int4,int9"), "unknown format 'int9'"),
        (("--avg-bits", "5", "--formats", "int4:g7,int8"), "its blocks do not divide"),
        (("--avg-bits", "5", "--keep", "lm_head"), "--keep 'lm_head' is not NAME=VALUE"),
        (("--avg-bits", "5", "--floor", "0=high"), "--floor"),
        (("--seconds", "1", "--latency-table", "nothing.json"), "nothing.json: no such file"),
        (("--avg-bits", "5", "--modules", "none.*"), "none.*"),
    ],
)
def test_bad_input_leaves_nothing_behind(aqnfx: Aqnfx, place: Place, given: tuple[str, ...], found: str) -> None:
    ended = aqnfx("plan", place.model, "--data", place.data, "--out", "made/plan.json", *given, *QUICK)
    one_line(ended, found)
    assert not Path("made/plan.json").exists()


def test_places_that_cannot_be_written(aqnfx: Aqnfx, place: Place) -> None:
    Path("made").mkdir()
    one_line(aqnfx("plan", place.model, "--data", place.data, "--avg-bits", "5", "--out", "made", *QUICK), "is a directory")
    one_line(aqnfx("plan", place.model, "--data", "no.txt", "--avg-bits", "5"), "data file no.txt does not exist")
