"""Bad input: one clear line, exit code 2, and nothing half-written, whatever the target."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aqnfx.cli.main import main
from aqnfx.errors import AqnfxError, InputError
from aqnfx.export.job import open_plan
from aqnfx.export.targets import TARGETS, export_plan
from aqnfx.numerics.formats import encode, parse_format, quantize
from tests.export.conftest import Case

DOWN = "model.layers.0.mlp.down_proj"


def record(case: Case) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(case.write({DOWN: {"weight": "int8:row"}}).read_text("utf-8"))
    return found


def changed(case: Case, change: Callable[[dict[str, Any]], Any]) -> Path:
    found = record(case)
    change(found)
    path = case.new("bad").with_suffix(".json")
    path.write_text(json.dumps(found), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["assignments"].update({DOWN: {"weight": "int9"}}), "unknown format 'int9'"),
        (lambda r: r["assignments"].update({DOWN: {"weight": 8}}), "weight: Input should be a valid string, found 8"),
        (lambda r: r["assignments"].update({DOWN: "int8"}), "down_proj: Input should be a dictionary"),
        (lambda r: r.update(assignments={"model.layers.0.mlp.down": {"weight": "int8"}}), "did you mean"),
        (lambda r: r.update(assignments={}), "at least 1 item"),
        (lambda r: r.update(assignments={DOWN: {"weight": None}}), "nothing to export"),
        (lambda r: r["model"].update(digest="0" * 64), "whose weights are not those of the model"),
        (lambda r: r["model"].update(name="nowhere/at/all"), "add --model DIRECTORY"),
        (lambda r: r["model"].update(name=None), "does not name its model"),
        (lambda r: r["model"].update(dtype="int8"), "the dtype 'int8'"),
        (lambda r: r.update(schema="aqnfx.plan/2"), "expected schema 'aqnfx.plan/1'"),
        (lambda r: r.pop("avg_bits"), "avg_bits: Field required"),
        (lambda r: r.update(bytes=-1), "bytes: Input should be greater than or equal to 0, found -1"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(case: Case, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    with pytest.raises(AqnfxError) as error:
        open_plan(changed(case, change))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_a_truncated_plan_is_refused(case: Case) -> None:
    text = json.dumps(record(case))
    for end in (0, 1, len(text) // 2, len(text) - 1):
        path = case.new("cut").with_suffix(".json")
        path.write_text(text[:end], encoding="utf-8")
        with pytest.raises(AqnfxError, match="truncated or not JSON"):
            open_plan(path)


def test_targets_and_their_options() -> None:
    with pytest.raises(InputError, match=r"unknown target 'torch'; known: torchao"):
        export_plan("plan.json", "torch", "out")
    for name, target in TARGETS.items():
        assert callable(target.load()), name


def test_places_that_cannot_be_written(case: Case, tmp_path: Path) -> None:
    plan = case.write({DOWN: {"weight": "int8:row"}})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine", encoding="utf-8")
    for out, words in (("full", "is not empty"), ("full/file", "is a file"), ("none/out", "is no folder")):
        with pytest.raises(InputError, match=words):
            export_plan(plan, "torchao", tmp_path / out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full"]


def test_an_export_that_fails_leaves_nothing(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aqnfx.export import torchao

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torchao, "copy_companions", fail)  # after the weights are written
    with pytest.raises(OSError, match="disk full"):
        torchao.export_torchao(case.job({DOWN: {"weight": "int8:row"}}), tmp_path / "out", check=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["int8:row", "int4:g32", "int3:row:asym", "int8:tensor", "fp8_e4m3:g16", "nvfp4", "mxfp4", "mxint8"]
)
def test_codes_are_the_planned_values(name: str) -> None:
    fmt, random = parse_format(name), torch.Generator().manual_seed(0)
    weight = torch.randn(24, 96, generator=random) * 2.0 ** torch.randint(-30, 30, (24, 1), generator=random)
    weight[3], weight[4, :32] = 0.0, 0.0
    assert torch.equal(encode(weight, fmt).stored(), quantize(weight, fmt))


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(InputError, match="no elements and scales"):
        encode(torch.randn(4, 30), parse_format("int4:g32"))
    with pytest.raises(AqnfxError, match="not finite"):
        encode(torch.tensor([[1.0, float("nan")]]), parse_format("int8:row"))


@pytest.mark.slow
def test_the_command_line(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = case.write({DOWN: {"weight": "int8:row"}})
    command = [sys.executable, "-m", "aqnfx.cli.main", "export", str(plan), "--to", "torchao", "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "bytes stored" in done.stdout
    assert "read back in a fresh process: off the plan by" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["aqnfx", "export", str(plan), "--to", "torchoa", "--out", "other"])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert (ended.value.code, err.count("\n"), out) == (2, 1, "")
    assert "did you mean 'torchao'" in err
    assert not (tmp_path / "other").exists()


def test_the_order_of_a_plan_does_not_matter(case: Case) -> None:
    """Query and key read one value, which is stored once, before the first of them."""
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    formats = {name: {"weight": "int8:row", "input": "int8:token"} for name in names}
    backwards = dict(reversed(formats.items()))
    assert case.planned(formats).fingerprint == case.planned(backwards).fingerprint
