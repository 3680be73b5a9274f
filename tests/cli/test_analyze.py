"""aqnfx analyze: with and without a map; bad input ends in one line and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aqnfx.graph.structure import BALANCE
from tests.cli.conftest import Aqnfx, Place
from tests.cli.test_errors import nothing_written, one_line


@pytest.fixture(scope="module")
def mapped(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map of the model, made by a diagnosis."""
    import aqnfx
    from aqnfx.reporting.report import save_report

    options = dict(samples=2, seeds=1, levels=(0.1,), base_level=0.1, max_length=24, batch_size=2, ops="linear", compile="no")
    smap = aqnfx.diagnose(str(place.model), place.data, method="predict", **options)
    return save_report(smap, tmp_path_factory.mktemp("map"))["map"]


@pytest.mark.slow
def test_the_structure_alone(aqnfx: Aqnfx, place: Place):
    ended = aqnfx("analyze", place.model, "--tokens", 16, "--batch", 2)
    assert ended.code == 0, ended.err
    assert "input_ids 2 × 16" in ended.out
    assert "6 shared input" in ended.out
    assert "stand out" not in ended.out


def test_with_a_map(aqnfx: Aqnfx, place: Place, mapped: Path, tmp_path: Path):
    ended = aqnfx("analyze", place.model, "--map", mapped, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "most sensitive of" in ended.out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["analysis.graphml", "analysis.json", "analysis.svg"]
    again = aqnfx("analyze", place.model, "--map", mapped.parent, "--json")
    record = json.loads(again.out)
    assert record == json.loads((tmp_path / "out" / "analysis.json").read_text(encoding="utf-8")) | {"model": record["model"]}
    assert record["structure"]["inputs"]["input_ids"] == [1, 128]
    assert record["structure"]["balance"] == BALANCE
    assert record["map"]["sites_with_cost"] == len(record["sites"]) > 0


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--tokens", "0"], ["tokens 0 must be at least 1"]), (["--batch", "-1"], ["batch -1 must be at least 1"]),
        (["--balance", "0"], ["balance 0.0 must be a positive number"]), (["--balance", "nan"], ["balance nan"]),
        (["--top", "0"], ["top 0 must be at least 1"]), (["--map", "{root}/nowhere.json"], ["nowhere.json", "no such file"]),
        (["--map", "{root}/file"], ["file", "truncated or not JSON"]),
        (["--map", "{root}"], ["sensitivity_map.json", "no such file"]),
        (["--out", "{root}/file"], ["output directory", "file"]), (["--tokens", "many"], ["--tokens", "integer"]),
    ],
)  # fmt: skip
def test_bad_options(aqnfx: Aqnfx, place: Place, tmp_path: Path, options: list[str], parts: list[str]):
    given = [option.format(root=place.root) for option in options]
    out = [] if "--out" in given else ["--out", tmp_path / "out"]
    one_line(aqnfx("analyze", place.model, *out, *given), *parts)
    nothing_written(tmp_path / "out")


def test_maps_that_are_none_or_another_models(aqnfx: Aqnfx, place: Place, mapped: Path, tmp_path: Path):
    text = mapped.read_text(encoding="utf-8")
    bad = tmp_path / "map.json"
    for content, parts in (
        (text[: len(text) // 2], ["truncated or not JSON"]), ("[]", ["expected a JSON object"]), ("{}", ["schema"]),
        (text.replace("aqnfx.sensitivity/1", "aqnfx.scan/1"), ["expected schema 'aqnfx.sensitivity/1'"]),
        (text.replace('"per_site": [', '"per_site": [7,'), ["per_site.0"]),
        (text.replace("model.layers.2.", "model.layers.7."), ["another model", "no site 'model.layers.7."]),
    ):  # fmt: skip
        bad.write_text(content, encoding="utf-8")
        one_line(aqnfx("analyze", place.model, "--map", bad, "--out", tmp_path / "out"), *parts)
        nothing_written(tmp_path / "out")
    bad.write_bytes(b"\xff\xfe\x00")
    one_line(aqnfx("analyze", place.model, "--map", bad), "not a JSON text file")


@pytest.mark.parametrize(("model", "parts"), [("nowhere/at/all", ["does not exist"]), ("no-config", ["config.json"])])
def test_models_that_are_none(aqnfx: Aqnfx, place: Place, tmp_path: Path, model: str, parts: list[str]):
    name = place.root / model if model == "no-config" else model
    one_line(aqnfx("analyze", name, "--out", tmp_path / "out"), *parts)
    nothing_written(tmp_path / "out")
