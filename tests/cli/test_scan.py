"""aqnfx scan: tables, files, JSON, and one line for bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Aqnfx, Ended, Place


def one_line(ended: Ended, *parts: str) -> None:
    assert ended.code == 2, ended
    assert ended.out == ""
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("aqnfx: ")
    for part in parts:
        assert part in lines[0], f"{part!r} is not in {lines[0]!r}"


def test_the_tables(aqnfx: Aqnfx, place: Place) -> None:
    ended = aqnfx("scan", place.model, "--formats", "mxfp4,int8,int4:g48")
    assert ended.code == 0, ended.err
    assert ended.err == ""
    lines = ended.out.splitlines()
    for name in ("mxfp4", "int8", "int4:g48"):
        assert any(line.split()[:1] == [name] for line in lines), name
    assert sum("model.layers." in line for line in lines) >= 10
    assert "The 10 worst of" in ended.out
    for part in ("GB/s", "recommended", "SQNR counts every value alike", "int4:g48: ", "vectors and scalars"):
        assert part in ended.out, part
    assert not list(Path().glob("scan.*"))


def test_json_is_the_record_and_nothing_else(aqnfx: Aqnfx, place: Place) -> None:
    ended = aqnfx("scan", place.model, "--json")
    assert ended.code == 0
    assert ended.err == ""
    record = json.loads(ended.out)
    assert record["schema"] == "aqnfx.scan/1"
    assert list(record["formats"]) == ["mxfp4", "nvfp4", "int8"]
    assert set(record) >= {
        "schema", "model", "formats", "weights", "weight_facts", "ranking", "summary", "activations", "notes", "provenance",
    }  # fmt: skip
    assert set(record["weights"]["model.layers.0.mlp.up_proj"]) == {"mxfp4", "nvfp4", "int8"}


def test_out_holds_the_record_and_a_report(aqnfx: Aqnfx, place: Place, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    ended = aqnfx("scan", "tinygsm", "--out", out, "--formats", "nvfp4")
    assert ended.code == 0
    assert f"Report: {out / 'scan.md'}" in ended.out
    assert {path.name for path in out.iterdir()} == {"scan.json", "scan.md"}
    record = json.loads((out / "scan.json").read_text(encoding="utf-8"))
    assert record["schema"] == "aqnfx.scan/1"
    text = (out / "scan.md").read_text(encoding="utf-8")
    assert text.startswith("# Formats for the weights of tinygsm\n")
    worst = record["summary"]["nvfp4"]["worst"]["module"]
    assert f"| 1 | {worst} |" in text
    for part in ("## nvfp4: the worst weights", "Dead zone", "## Provenance", record["model"]["digest"]):
        assert part in text
    assert all(row["module"] in text for row in record["ranking"]["nvfp4"][:10])


def test_names_from_outside_are_no_markup(aqnfx: Aqnfx, tmp_path: Path) -> None:
    save_file({"[bold]|<b>.weight": torch.randn(4, 4)}, tmp_path / "model.safetensors")
    ended = aqnfx("scan", tmp_path, "--out", tmp_path / "out", "--formats", "mxfp4")
    assert ended.code == 0
    assert "[bold]|<b>" in ended.out
    assert r"\[bold\]\|&lt;b&gt;" in (tmp_path / "out" / "scan.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--formats", "mxfp5"], ["unknown format 'mxfp5'", "mxfp4"]),
        (["--formats", ""], ["no format"]),
        (["--formats", "int8,int8:row"], ["given twice"]),
        (["--formats", "mxfp4:g32"], ["mxfp4 has no options"]),
        (["--compile", "maybe"], ["'maybe' is not one of auto, yes, no"]),
        (["--jsn"], ["--jsn"]),
    ],
)
def test_bad_options(aqnfx: Aqnfx, place: Place, tmp_path: Path, options: list[str], parts: list[str]) -> None:
    out = tmp_path / "deep" / "out"
    one_line(aqnfx("scan", place.model, "--out", out, *options), *parts)
    one_line(aqnfx("scan", place.model, "--json", *options), *parts)
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("nowhere", ["nowhere", "does not exist"]),
        ("file", ["is a file"]),
        ("corrupt", ["truncated or damaged"]),
        ("empty-weights", ["truncated or damaged"]),
        ("odd-config", ["config.json", "damaged"]),
    ],
)
def test_bad_models(aqnfx: Aqnfx, place: Place, tmp_path: Path, model: str, parts: list[str]) -> None:
    one_line(aqnfx("scan", place.root / model, "--out", tmp_path / "out"), *parts)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite(aqnfx: Aqnfx, place: Place, tmp_path: Path) -> None:
    shutil.copytree(place.model, tmp_path / "m")
    values = load_file(tmp_path / "m" / "model.safetensors")
    values["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(values, tmp_path / "m" / "model.safetensors")
    out = tmp_path / "out"
    one_line(aqnfx("scan", tmp_path / "m", "--out", out), "model.layers.1.mlp.up_proj.weight", "NaN")
    assert not out.exists()
    out.mkdir()
    one_line(aqnfx("scan", tmp_path / "m", "--out", out, "--formats", "mxfp4", "--json"), "NaN")
    assert list(out.iterdir()) == []


def test_an_interruption_is_one_line_and_leaves_nothing(
    aqnfx: Aqnfx, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("aqnfx.scanning.scan.format_sums", stopped)
    ended = aqnfx("scan", place.model, "--out", tmp_path / "out")
    assert (ended.code, ended.out) == (130, "")
    assert ended.err.startswith("aqnfx: interrupted;")
    assert len(ended.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_output_place_that_cannot_be_written(aqnfx: Aqnfx, place: Place) -> None:
    for out in (place.root / "file", place.root / "file" / "below"):
        one_line(aqnfx("scan", place.model, "--out", out), "output directory", "file")


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; sys.argv = ['aqnfx', 'scan', '--help']\n"
        "from aqnfx.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "--formats" in done.stdout
