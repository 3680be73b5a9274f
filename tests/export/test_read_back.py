"""What leaves is read back: every target loads what was written in a fresh process, and what is wrong never arrives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from aqnfx.errors import ExportError, InputError
from aqnfx.export import readback
from aqnfx.export.compressed_tensors import export_compressed_tensors
from aqnfx.export.graphs import planned_program
from aqnfx.export.modelopt import export_modelopt
from aqnfx.export.onnx import export_onnx
from aqnfx.export.pt2 import export_pt2
from aqnfx.export.python_source import export_python
from aqnfx.export.torchao import export_torchao
from tests.export.conftest import Case

C_FC, ATTENTION = "transformer.h.0.mlp.c_fc", "transformer.h.1.attn"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("gpt2"), "gpt2", n_layer=2)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["pt2", "python"])
def test_graphs_run_where_only_the_named_modules_are_imported(gpt2: Case, target: str) -> None:
    """With operations of several files: formats, counters of accumulation, and what watches values."""
    job = gpt2.job({C_FC: {"weight": "int4:g32", "input": "int8:token"}, ATTENTION: {"key": "nvfp4"}})
    out = gpt2.new().with_suffix(".pt2" if target == "pt2" else "")
    found = export_pt2(job, out) if target == "pt2" else export_python(job, out)
    assert (found.checked or "").startswith("read back in a fresh process: off the plan by")


@pytest.mark.slow
def test_graphs_that_lack_an_operator_are_refused(gpt2: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("aqnfx.export.pt2.OPERATORS", "json")
    with pytest.raises(ExportError, match=r"pt2 cannot load what was written \(.*\); nothing is left there") as error:
        export_pt2(gpt2.job({C_FC: {"weight": "int4:g32"}}), tmp_path / "out.pt2")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_head_whose_bias_is_tied_is_stored_whole(tmp_path: Path) -> None:
    """RoBERTa ties the bias of its head by the flag that ties the weight; both names are in the file then."""
    case = Case(tmp_path / "roberta", "roberta", num_hidden_layers=1)
    found = export_compressed_tensors(case.job({"lm_head.decoder": {"weight": "int8:row"}}), case.new(), dtype="float32")
    assert (found.checked or "").startswith("read back in a fresh process")
    assert any("stored apart" in note for note in found.notes)


@pytest.mark.slow
def test_a_head_that_cannot_be_untied_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path / "t5", "t5", num_layers=1, num_decoder_layers=1)
    with pytest.raises(InputError, match=r"ties lm_head of T5\w+ to the embedding whatever a file says; leave lm_head out"):
        export_torchao(case.job({"lm_head": {"weight": "int8:row"}}), case.new(), check=False)


@pytest.mark.slow
def test_onnxruntime_reads_it_and_its_default_session_has_a_note(gpt2: Case) -> None:
    """Rows in int8 of a tied head, which the default session multiplies by inputs in 8 bits."""
    found = export_onnx(gpt2.job({"lm_head": {"weight": "int8:row"}}), gpt2.new())
    assert (found.checked or "").startswith("read back in a fresh process")
    assert any("rounds the inputs of these to 8 bits (here an error of" in note for note in found.notes)


@pytest.mark.slow  # ModelOpt takes long to import; what it makes of the file is tested in one process besides
def test_modelopt_reads_it(case: Case) -> None:
    found = export_modelopt(case.job({DOWN: {"weight": "int4:g32:fp32"}}), case.new().with_suffix(".yaml"))
    assert (found.checked or "").startswith("read back in a fresh process")


@pytest.mark.slow
def test_experts_that_transformers_does_not_load_beside_codes_are_refused(tmp_path: Path) -> None:
    case = Case(tmp_path / "moe", "qwen3_moe", num_hidden_layers=1)
    job, out = case.job({"model.layers.0.self_attn.o_proj": {"weight": "int8:row"}}), case.new()
    with pytest.raises(ExportError, match=r"cannot load what was written .*beside weights in fp8_e4m3 only"):
        export_compressed_tensors(job, out)
    with pytest.raises(InputError, match=r"onnx cannot express this model: .*grouped_mm.*; use pt2 or python"):
        export_onnx(case.job({"model.layers.0.self_attn.o_proj": {"weight": "int8:row"}}), out)
    assert not out.exists()


def answers(monkeypatch: pytest.MonkeyPatch, outputs: dict[str, Tensor]) -> None:
    monkeypatch.setattr(readback, "_child", lambda *_: outputs)


def test_what_computes_something_else_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The bound is that of rounding: one weight in another format is beyond it, sums in another order are not."""
    formats = {DOWN: {"weight": "int4:g32"}}
    ref = readback.reference(case.job(formats), planned_program(case.job(formats)))
    assert 0.0 < ref.rounding < 1e-4 * ref.error
    other = planned_program(case.job({DOWN: {"weight": "int4:g32:fp32"}}))  # scales that differ by 2^-9
    answers(monkeypatch, dict(readback._run(other)))
    with pytest.raises(ExportError, match=r"is off the plan by .* where .* is allowed"):
        export_torchao(case.job(formats), tmp_path / "out", dtype="float32")
    answers(monkeypatch, {"logits": torch.full_like(ref.outputs["logits"], torch.nan)})
    with pytest.raises(ExportError, match="off the plan by nan"):
        export_torchao(case.job(formats), tmp_path / "out", dtype="float32")
    answers(monkeypatch, {"other": torch.zeros(1)})
    with pytest.raises(ExportError, match="in other shapes"):
        export_torchao(case.job(formats), tmp_path / "out", dtype="float32")
    assert not list(tmp_path.iterdir())
    wide = {name: value.double().to(torch.float32) for name, value in ref.outputs.items()}
    answers(monkeypatch, {name: value * (1 + 1e-7) for name, value in wide.items()})
    assert export_torchao(case.job(formats), tmp_path / "out", dtype="float32").checked is not None


def test_in_16_bits_the_bound_is_theirs(case: Case) -> None:
    formats = {DOWN: {"weight": "int4:g32", "input": "int8:token"}}
    job = case.job(formats)
    fine, coarse = (readback.reference(job, planned_program(job), d) for d in (torch.float32, torch.bfloat16))
    assert fine.rounding < 1e-2 * coarse.rounding
    assert fine.inputs > 0.0
    only = case.job({DOWN: {"weight": "int4:g32"}})
    assert readback.reference(only, planned_program(only)).inputs == 0.0


def test_a_missing_package_is_said(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = readback.Reference(given={}, constants={}, outputs={}, rounding=0.0, inputs=0.0, error=0.0)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert readback.read_back("onnx", Path("nowhere"), ref).line.startswith("not checked: the package onnxruntime")


def test_a_child_that_is_killed_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", encoding="utf-8")
    monkeypatch.setattr(readback, "_SCRIPT", script)
    ref = readback.Reference(given={}, constants={}, outputs={}, rounding=0.0, inputs=0.0, error=0.0)
    with pytest.raises(ExportError, match="was killed by signal 9, by want of memory most often"):
        readback.read_back("python", tmp_path, ref)
