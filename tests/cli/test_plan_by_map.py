"""aqnfx plan with a map: --rule threshold and --migration, their files, and one line for bad input with nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Aqnfx, Place
from tests.cli.test_errors import nothing_written, one_line
from tests.cli.tiny import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer: every command here traces the model anew."""
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def mapped(model: Path, place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map of the model, made by a diagnosis."""
    import aqnfx
    from aqnfx.reporting.report import save_report

    options = dict(samples=2, seeds=1, levels=(0.1,), base_level=0.1, max_length=24, batch_size=2, ops="linear", compile="no")
    smap = aqnfx.diagnose(str(model), place.data, method="measure", window=1, **options)
    return save_report(smap, tmp_path_factory.mktemp("map"))["map"]


def test_by_thresholds_with_data(aqnfx: Aqnfx, model: Path, place: Place, mapped: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "plan.json"
    ended = aqnfx(
        "plan", model, "--rule", "threshold", "--map", mapped, "--out", out, "--data", place.data, "--samples", 2,
        "--max-length", 24, "--no-pack", "--formats", "bf16,int8:g32,int4:g32", "--thresholds", "0.12,0.02",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    said = " ".join(ended.out.split())
    for part in ("degradation above 12.0 %, above 2.0 %", "Measured on 2 samples", "uniform bf16", "operator linear"):
        assert part in said, part
    record = json.loads(out.read_text(encoding="utf-8"))
    assert (record["schema"], record["rule"]) == ("aqnfx.plan/1", "threshold")
    assert {part["source"] for part in record["modules"].values()} == {"layer", "operator"}
    assert sorted(p.name for p in out.parent.iterdir()) == ["plan.json", "plan.md"]
    ended = aqnfx("plan", model, "--rule", "threshold", "--map", mapped.parent, "--json")
    assert ended.code == 0, ended.err
    bare = json.loads(ended.out)
    assert (bare["measured"], bare["compared"]) == ({}, [])
    assert {a["weight"] for a in bare["assignments"].values()} <= {"fp16", "int8:row", "int4:g32"}


def test_a_migration_plan(aqnfx: Aqnfx, model: Path, mapped: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "made" / "migration.json", tmp_path / "seen.json"
    sites = {"model.layers.0.mlp": 0.2, "model.norm": 0.02}  # the norm is the model's, and not among the map's sites
    seen.write_text(json.dumps({"schema": "aqnfx.divergences/1", "sites": sites}), encoding="utf-8")
    ended = aqnfx("plan", model, "--map", mapped, "--migration", "--divergences", seen, "--out", out)
    assert ended.code == 0, ended.err
    assert "Migration plan for" in ended.out
    record = json.loads(out.read_text(encoding="utf-8"))
    found = {step["what"]: step["priority"] for step in record["steps"]}
    assert (found["layer 0"], found["module model.norm"]) == (1, 2)
    assert set(found) >= {"operator linear", "layer 0"}
    report = out.with_suffix(".md").read_text(encoding="utf-8")
    assert "## Priority 1: validate first in fp16" in report
    assert "diverges at model.layers.0.mlp, above 0.1 (relative error 0.2)" in report
    again = aqnfx("plan", model, "--map", mapped, "--migration", "--divergences", seen, "--json")
    assert json.loads(again.out) == record


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["--migration"], "--migration needs --map"), (["--rule", "threshold"], "--rule threshold needs --map"),
        (["--rule", "treshold"], "is not one of optimal, threshold; did you mean 'threshold'"),
        (["--avg-bits", "5"], "a plan under a budget needs --data"),
        (["--avg-bits", "5", "--map", "{map}"], "a plan under a budget needs --data"),
        (["--avg-bits", "5", "--thresholds", "0.2,0.1", "--data", "{data}"], "--thresholds is for --rule threshold"),
        (["--avg-bits", "5", "--divergences", "x.json", "--data", "{data}"], "--divergences is for --migration"),
        (["--rule", "threshold", "--map", "{map}", "--divergences", "x.json"], "--divergences is for --migration"),
        (["--rule", "threshold", "--map", "{map}", "--avg-bits", "5"], "rule threshold has no budget"),
        (["--rule", "threshold", "--map", "{map}", "--formats", "int8,int4"], "takes three formats"),
        (["--rule", "threshold", "--map", "{map}", "--thresholds", "0.1"], "two falling degradations"),
        (["--rule", "threshold", "--map", "{map}", "--thresholds", "a,b"], "are not two numbers"),
        (["--rule", "threshold", "--map", "{map}", "--data", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--rule", "threshold", "--map", "nowhere.json"], "nowhere.json: no such file"),
        (["--migration", "--map", "{map}", "--avg-bits", "5"], "leave out --avg-bits"),
        (["--migration", "--map", "{map}", "--rule", "threshold"], "leave out --rule"),
        (["--migration", "--map", "{map}", "--data", "{data}"], "leave out --data"),
        (["--migration", "--map", "{map}", "--divergences", "x.json"], "x.json: no such file"),
        (["--migration", "--map", "{map}", "--divergences", "{map}"], "expected schema 'aqnfx.divergences/1'"),
        (["--migration", "--map", "{root}/file"], "truncated or not JSON"),
    ],
)  # fmt: skip
def test_bad_input(aqnfx: Aqnfx, model: Path, place: Place, mapped: Path, tmp_path: Path, given: list[str], found: str) -> None:
    options = [option.format(map=mapped, data=place.data, root=place.root) for option in given]
    one_line(aqnfx("plan", model, *options, "--out", tmp_path / "made" / "plan.json"), found)
    nothing_written(tmp_path / "made")


def test_a_map_of_another_model(aqnfx: Aqnfx, model: Path, mapped: Path, tmp_path: Path) -> None:
    bad, out = tmp_path / "map.json", tmp_path / "made" / "migration.json"
    bad.write_text(mapped.read_text(encoding="utf-8").replace("model.layers.0.", "model.layers.7."), encoding="utf-8")
    ended = aqnfx("plan", model, "--map", bad, "--migration", "--out", out)
    one_line(ended, "another model", "no site 'model.layers.7.")
    nothing_written(out.parent)


def test_divergences_of_unknown_names(aqnfx: Aqnfx, model: Path, mapped: Path, tmp_path: Path) -> None:
    seen, out = tmp_path / "seen.json", tmp_path / "made" / "migration.json"
    seen.write_text('{"schema": "aqnfx.divergences/1", "sites": {"lm_haed": 0.1}}', encoding="utf-8")
    ended = aqnfx("plan", model, "--map", mapped, "--migration", "--divergences", seen, "--out", out)
    one_line(ended, "the model has no site, layer or module 'lm_haed'", "'lm_head'")
    nothing_written(out.parent)


def test_places_that_do_not_fit(aqnfx: Aqnfx, model: Path, mapped: Path, tmp_path: Path) -> None:
    given = ["plan", model, "--map", mapped, "--migration", "--out"]
    one_line(aqnfx(*given, tmp_path), "is a directory; name a file, such as", "migration.json")
    for name in ("made.md", "made.svg"):
            one_line(aqnfx(*given, tmp_path / name), "is where the report or its picture goes")
    nothing_written(tmp_path / "made.md")
