"""Bad input: exit code 2, one line on stderr that says what is wrong, no traceback, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Aqnfx, Ended, Place

ARTIFACTS = ("sensitivity_map.json", "report.json", "report.md")


def one_line(ended: Ended, *parts: str) -> None:
    assert ended.code == 2, ended
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("aqnfx: ")
    assert "Traceback" not in ended.out + ended.err
    for part in parts:
        assert part in lines[0], f"{part!r} is not in {lines[0]!r}"


def nothing_written(out: Path) -> None:
    assert not out.exists(), sorted(out.rglob("*")) if out.is_dir() else out


# Each: the options that replace or follow those of Place.quick, and what the line must say.
BAD: dict[str, tuple[list[str], list[str]]] = {
    "missing data": (["--data", "{root}/nowhere.jsonl"], ["nowhere.jsonl", "does not exist"]),
    "empty data": (["--data", "{root}/empty.jsonl"], ["empty.jsonl", "is empty"]),
    "malformed data": (["--data", "{root}/bad.jsonl"], ["bad.jsonl:2", "not valid JSON"]),
    "data without text": (["--data", "{root}/fields.jsonl"], ["fields.jsonl:1", "body"]),
    "data is a directory": (["--data", "{root}"], ["is a directory"]),
    "unknown field": (["--text-field", "txt"], ["no field 'txt'", "did you mean 'text'"]),
    "unknown op": (["--ops", "linaer"], ["linaer", "did you mean 'linear'"]),
    "op that the model lacks": (["--ops", "gelu"], ["gelu", "silu"]),
    "layer out of range": (["--layers", "1-7"], ["7", "0-2"]),
    "layers are no numbers": (["--layers", "first"], ["first"]),
    "level 0": (["--levels", "0"], ["noise level 0.0 must be positive"]),
    "negative level": (["--levels", "0.1,-0.1"], ["noise level -0.1 must be positive"]),
    "level nan": (["--levels", "nan"], ["noise level nan must be positive"]),
    "level inf": (["--levels", "0.1,inf"], ["noise level inf must be positive"]),
    "levels are no numbers": (["--levels", "abc"], ["--levels 'abc'", "list of numbers"]),
    "no levels": (["--levels", ","], ["levels must be given"]),
    "repeated level": (["--levels", "0.1,0.10"], ["levels must be given and differ"]),
    "base level is no level": (["--base-level", "0.2"], ["base level 0.2 is not among the levels 0.1, 0.3"]),
    "window too long": (["--window", "4"], ["window 4 is longer than the 3 selected layers", "--window 3"]),
    "window 0": (["--window", "0"], ["window 0 must be at least 1"]),
    "step 0": (["--step", "0"], ["step 0 must be at least 1"]),
    "window is no number": (["--window", "wide"], ["--window", "integer"]),
    "no samples": (["--samples", "0"], ["samples 0 must be at least 1"]),
    "no seeds": (["--seeds", "0"], ["seeds 0 must be at least 1"]),
    "no batch": (["--batch-size", "0"], ["batch_size 0 must be at least 1"]),
    "unknown task": (["--task", "klx"], ["task 'klx' is not one of", "exact_match", "did you mean 'kl'"]),
    "exact match on text": (["--task", "exact_match"], ["exact_match", "question"]),
    "unknown noise": (["--noise", "gaussian"], ["gaussian", "relative_gaussian"]),
    "unknown probe": (["--probes", "layers"], ["probes 'layers' is not one of", "operator"]),
    "no probes": (["--probes", ","], ["probes must be given"]),
    "unknown compile": (["--compile", "maybe"], ["'maybe' is not one of auto, yes, no"]),
    "max length above the model's": (["--max-length", "129"], ["max_length 129", "at most 128"]),
    "max length 1": (["--max-length", "1"], ["max_length must be at least 2"]),
    "unknown device": (["--device", "warp"], ["warp"]),
    "unknown option": (["--windows", "3"], ["--windows", "--window"]),
    "nothing to resume": (["--resume"], ["no unfinished run to resume"]),
    "no such config": (["--config", "{root}/nowhere.yaml"], ["nowhere.yaml", "no such file"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_options(aqnfx: Aqnfx, place: Place, tmp_path: Path, case: str) -> None:
    options, parts = BAD[case]
    out = tmp_path / "deep" / "out"
    given = [option.format(root=place.root) for option in options]
    one_line(aqnfx("diagnose", place.model, *place.quick, "--out", out, *given), *parts)
    nothing_written(tmp_path / "deep")


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("nowhere", ["nowhere", "does not exist"]),
        ("file", ["not a Hugging Face directory"]),
        ("no-config", ["no-config", "no config.json"]),
        ("odd-config", ["cannot load model"]),
        ("corrupt", ["cannot load model", "corrupt"]),
        ("empty-weights", ["cannot load model"]),
    ],
)
def test_bad_models(aqnfx: Aqnfx, place: Place, tmp_path: Path, model: str, parts: list[str]) -> None:
    out = tmp_path / "out"
    one_line(aqnfx("diagnose", place.root / model, *place.quick, "--out", out), *parts)
    nothing_written(out)
    one_line(aqnfx("trace", place.root / model), *parts)
    ended = aqnfx("opt", place.root / model, "--print", "--out", out)
    one_line(ended, *parts)
    nothing_written(out)
    assert ended.out == ""


def test_a_model_without_a_tokenizer(aqnfx: Aqnfx, place: Place, tmp_path: Path) -> None:
    ended = aqnfx("diagnose", place.root / "no-tokenizer", *place.quick, "--out", tmp_path / "out")
    one_line(ended, "tokenizer")
    nothing_written(tmp_path / "out")


def test_weights_that_are_not_finite(aqnfx: Aqnfx, place: Place, tmp_path: Path) -> None:
    ended = aqnfx("diagnose", place.root / "nan", *place.quick, "--out", tmp_path / "out")
    one_line(ended, "logits are not finite", "sample 0")
    nothing_written(tmp_path / "out")


def test_json_keeps_stdout_empty_on_failure(aqnfx: Aqnfx, place: Place, tmp_path: Path) -> None:
    ended = aqnfx("diagnose", place.root / "nan", *place.quick, "--out", tmp_path / "out", "--json")
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.splitlines()[-1].startswith("aqnfx: logits are not finite")


def test_an_output_place_that_cannot_be_written(aqnfx: Aqnfx, place: Place) -> None:
    for out in (place.root / "file", place.root / "file" / "below"):
        one_line(aqnfx("diagnose", place.model, *place.quick, "--out", out), "output directory", "file")
    one_line(aqnfx("opt", place.model, "--out", place.root / "file" / "below"), "cannot write")
    assert (place.root / "file").read_text(encoding="utf-8") == "a regular file"


@pytest.mark.parametrize("content", [b"something else\n", b"\x00\xff" * 50, b"{}\n{}\n"])
def test_a_journal_that_is_none(aqnfx: Aqnfx, place: Place, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal.jsonl").write_bytes(content)
    one_line(aqnfx("diagnose", place.model, *place.quick, "--out", tmp_path), "unfinished run", "--resume")
    ended = aqnfx("diagnose", place.model, *place.quick, "--out", tmp_path, "--resume")
    one_line(ended, "damaged at line 1", "remove it to start again")
    assert (tmp_path / "journal.jsonl").read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["journal.jsonl"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("windw: 2\n", ["unknown option 'windw'", "did you mean 'window'"]),
        ("compil: no\n", ["unknown option 'compil'", "'compile'"]),
        ("config: other.yaml\n", ["unknown option 'config'"]),
        ("3: 4\n", ["unknown option 3"]),
        ("levels: [0.1\n", ["is not YAML"]),
        ("- 1\n- 2\n", ["must be a mapping", "list"]),
        ("", ["must be a mapping", "NoneType"]),
        ("window: wide\n", ["window", "integer"]),
        ("levels: [a, b]\n", ["--levels 'a,b'"]),
        ("samples: true\n", ["samples must be a whole number", "found True"]),
        ("samples: 2001-02-03\n", ["samples must be a whole number", "2001-02-03"]),
        ("pack: 1\n", ["pack must be true or false"]),
        ("levels: [[0.1]]\n", ["levels must be a text, a number, or a list"]),
        ("stop: {a: b}\n", ["stop must be a text, or a list of them", "a mapping"]),
        ("stop: [END, STOP]\n", ["stop is for task generate"]),  # read, and refused for what it says
        ("window: !!bool x\n", ["is not YAML"]),
        ("samples: 99999999999999999999\n", ["samples 99999999999999999999 must be at most 10,000,000"]),
        ("!!python/object/apply:os.system ['true']\n", ["is not YAML"]),
    ],
)
def test_bad_configurations(aqnfx: Aqnfx, place: Place, tmp_path: Path, text: str, parts: list[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    ended = aqnfx("diagnose", place.model, "--data", place.data, "--out", out, "--config", config)
    one_line(ended, *parts)
    nothing_written(out)


def test_a_configuration_that_is_not_text(aqnfx: Aqnfx, place: Place, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"window: \xff\xfe")
    one_line(aqnfx("diagnose", place.model, "--data", place.data, "--config", tmp_path / "c.yaml"), "is not YAML")
    one_line(aqnfx("diagnose", place.model, "--data", place.data, "--config", tmp_path), "cannot read")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nonsense"], ["No such command 'nonsense'"]),
        (["diagnose"], ["model"]),
        (["diagnose", "somewhere"], ["--data"]),
        (["trace", "--jsn"], ["--jsn"]),
    ],
)
def test_bad_usage(aqnfx: Aqnfx, arguments: list[str], parts: list[str]) -> None:
    one_line(aqnfx(*arguments), *parts, "see aqnfx --help")


@pytest.mark.parametrize(
    ("pipeline", "parts"),
    [
        ("tag-layer", ["tag-layer", "did you mean 'tag-layers'"]),
        ("insert-noise", ["tag-layers"]),
        ("tag-layers,tag-ops,insert-noise{kind=pink}", ["pink", "relative_gaussian"]),
        ("tag-layers{", ["tag-layers{"]),
        ("", [""]),
    ],
)
def test_bad_pipelines(aqnfx: Aqnfx, place: Place, pipeline: str, parts: list[str]) -> None:
    ended = aqnfx("opt", place.model, "--print", "-p", pipeline)
    if pipeline:
        one_line(ended, *parts)
    else:
        assert ended.code in (0, 2)
        assert len(ended.err.splitlines()) <= 1


def test_debug_shows_the_traceback(aqnfx: Aqnfx, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AQNFX_DEBUG", "")
    ended = aqnfx("--debug", "trace", place.root / "nowhere")
    assert ended.code == 2
    assert "Traceback" in ended.err
    assert ended.err.splitlines()[-1].startswith("aqnfx: model directory")


def test_a_failed_run_leaves_earlier_artifacts_alone(aqnfx: Aqnfx, place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert aqnfx("diagnose", place.model, *place.quick, "--out", out).code == 0
    before: dict[str, Any] = {p.name: p.read_bytes() for p in out.iterdir()}
    assert set(before) == set(ARTIFACTS)
    json.loads(before["sensitivity_map.json"])
    one_line(aqnfx("diagnose", place.root / "nan", *place.quick, "--out", out), "not finite")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    shutil.rmtree(out)
