"""What the commands print and write when all is well."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Aqnfx, Place

FILES = {"sensitivity_map.json", "report.json", "report.md"}


def scores(out: Path) -> dict[str, Any]:
    """Return the saved map without its provenance."""
    record: dict[str, Any] = json.loads((out / "sensitivity_map.json").read_text(encoding="utf-8"))
    del record["provenance"]
    return record


def test_diagnose_writes_three_files_and_prints_a_summary(aqnfx: Aqnfx, place: Place, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    ended = aqnfx("diagnose", place.model, *place.quick, "--out", out)
    assert ended.code == 0
    assert ended.err == ""
    assert {p.name for p in out.iterdir()} == FILES
    assert f"Report: {out / 'report.md'}" in ended.out
    assert "linear" in ended.out
    record = scores(out)
    assert record["schema"] == "aqnfx.sensitivity/1"
    assert record["partial"] is False
    assert set(record["per_layer"]) == {"0", "1", "2"}
    assert [w["layers"] for w in record["windows"]] == [[0, 1], [1, 2]]
    assert record["noise"]["levels"] == [0.1, 0.3]
    assert json.loads((out / "report.json").read_text(encoding="utf-8"))["schema"] == "aqnfx.diagnosis/1"
    assert (out / "report.md").read_text(encoding="utf-8").startswith("# ")


def test_diagnose_json_is_one_document(aqnfx: Aqnfx, place: Place, tmp_path: Path) -> None:
    ended = aqnfx("diagnose", place.model, *place.quick, "--out", tmp_path, "--json")
    assert ended.code == 0
    assert ended.out.count("\n") == 1
    record = json.loads(ended.out)
    assert record == json.loads((tmp_path / "sensitivity_map.json").read_text(encoding="utf-8"))


def test_diagnose_questions(aqnfx: Aqnfx, place: Place, tmp_path: Path) -> None:
    ended = aqnfx(
        "diagnose", place.model, *place.quick, "--data", place.questions, "--out", tmp_path, "--probes", "layer"
    )  # fmt: skip
    assert ended.code == 0, ended.err
    record = scores(tmp_path)
    assert record["task"]["metric"] == "exact_match"
    assert set(record["per_layer"]) == {"0", "1", "2"}
    assert record["windows"] == []


@pytest.mark.slow
def test_a_configuration_is_the_flags_and_flags_go_first(aqnfx: Aqnfx, place: Place, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data: {place.data}\nsamples: 4\nseeds: 2\nlevels: [0.1, 0.3]\nmax-length: 24\nwindow: 2\n"
        "ops: [linear]\ncompile: no\nbatch_size: 2\ntask: null\nmethod: measure\n",
        encoding="utf-8",
    )
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    assert aqnfx("diagnose", place.model, *place.quick, "--out", a).code == 0
    assert aqnfx("diagnose", place.model, "--config", config, "--out", b).code == 0
    assert scores(a) == scores(b)
    ended = aqnfx("diagnose", place.model, "--config", config, "--out", c, "--seeds", 1, "--levels", "0.2", "--json")
    assert ended.code == 0
    record = json.loads(ended.out)
    assert record["noise"]["seeds"] == [0]
    assert record["noise"]["levels"] == [0.2]
    assert record["task"]["samples"] == 4


def test_a_configuration_holds_everything_but_itself(aqnfx: Aqnfx, place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    values: dict[str, Any] = {
        "model": str(place.model), "data": str(place.data), "levels": 0.2, "base-level": 0.2, "window": 1, "step": 2,
        "samples": 3, "seeds": 1, "seed": 5, "ops": "linear,silu", "layers": "0-1", "task": "nll", "noise": "uniform",
        "probes": ["layer", "window"], "compile": False, "batch-size": 3, "max-length": 24, "text-field": "text",
        "pack": False, "device": "cpu", "out": str(out), "json": True, "resume": False,
    }  # fmt: skip
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(values), encoding="utf-8")
    ended = aqnfx("diagnose", "--config", config)
    assert ended.code == 0, ended.err
    record = json.loads(ended.out)
    assert record["task"]["metric"] == "nll"
    assert record["noise"]["kind"] == "uniform"
    assert record["noise"]["seeds"] == [5]
    assert set(record["per_layer"]) == {"0", "1"}
    assert [w["layers"] for w in record["windows"]] == [[0]]
    assert {p.name for p in out.iterdir()} == FILES


def test_trace(aqnfx: Aqnfx, place: Place) -> None:
    ended = aqnfx("trace", place.model)
    assert ended.code == 0
    assert "0 … 2" in ended.out
    assert "sites in 3 layers" in ended.out
    assert "self_attn" not in ended.out
    listed = aqnfx("trace", place.model, "--sites").out
    assert "model.layers.2.self_attn.q_proj:linear:0  [attention]" in listed.splitlines()
    ended = aqnfx("trace", place.model, "--json")
    record = json.loads(ended.out)
    assert record["sites_total"] == len(record["sites"])
    assert f"{record['sites_total']} sites in 3 layers" in listed
    assert {s["id"] for s in record["sites"]} == {x.split("  [")[0] for x in listed.splitlines() if "  [" in x}


def test_opt(aqnfx: Aqnfx, place: Place, tmp_path: Path) -> None:
    pipeline = 'tag-layers,tag-ops,insert-noise{where="ops:linear,layers:1"}'
    ended = aqnfx("opt", place.model, "-p", pipeline, "--print", "--out", tmp_path / "graph.txt")
    assert ended.code == 0
    text = (tmp_path / "graph.txt").read_text(encoding="utf-8")
    assert ended.out.startswith(text)
    assert text.count("aqnfx.noise") == 7
    assert "+7 aqnfx.noise" in ended.out
    assert "# fingerprint " in ended.out
    quiet = aqnfx("opt", place.model).out
    assert all(line.startswith("#") for line in quiet.splitlines())


def test_env(aqnfx: Aqnfx) -> None:
    import aqnfx as package

    facts = json.loads(aqnfx("env", "--json").out)
    assert facts["aqnfx"] == package.__version__
    assert {"python", "torch", "transformers", "platform", "threads", "cuda"} <= set(facts)
    table = aqnfx("env").out
    assert all(name in table for name in facts)


def test_no_command_shows_the_help(aqnfx: Aqnfx) -> None:
    ended = aqnfx()
    assert ended.code == 2
    assert all(name in ended.out + ended.err for name in ("demo", "trace", "opt", "diagnose", "scan", "analyze", "env"))
    for command in ("demo", "trace", "opt", "diagnose", "scan", "analyze", "env"):
        ended = aqnfx(command, "--help")
        assert ended.code == 0
        assert ended.err == ""


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; sys.argv = ['aqnfx', '--help']\n"
        "from aqnfx.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "diagnose" in done.stdout


@pytest.mark.slow
def test_demo(aqnfx: Aqnfx, tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text("left by an earlier demo\n", encoding="utf-8")
    ended = aqnfx("demo", "--samples", 2, "--seeds", 1, "--compile", "no", "--out", tmp_path)
    assert ended.code == 0, ended.err
    assert f"Report: {tmp_path / 'report.md'}" in ended.out
    assert {p.name for p in tmp_path.iterdir()} == FILES
    assert len(scores(tmp_path)["per_layer"]) == 16
