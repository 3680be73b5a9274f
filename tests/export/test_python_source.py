"""Programs printed as Python: the module runs by itself, and returns the same bits."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import aqnfx
from aqnfx.export.python_source import SOURCE, export_python, named_tensors, python_source
from tests.export.conftest import Case, batch
from tests.families import build, inputs

DOWN, KEYS = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn"
FORMATS = {DOWN: {"weight": "int4:g32", "input": "int8:token"}, KEYS: {"key": "nvfp4", "value": "mxfp4"}}


def module_of(text: str, path: Path) -> Any:
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("printed", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("pipeline", ["", 'insert-noise{where="ops:linear" level=0.05}'])
@torch.no_grad()
def test_the_printed_module_returns_the_same_bits(case: Case, pipeline: str, tmp_path: Path) -> None:
    found = export_python(case.job(FORMATS), case.new(), pipeline=pipeline, check=False)
    module = module_of((found.path / SOURCE).read_text("utf-8"), tmp_path / "printed.py")
    program = case.planned(FORMATS)
    program = aqnfx.Pipeline.parse(pipeline)(program) if pipeline else program
    printed = module.load(found.path)
    assert torch.equal(printed(**batch())["logits"], program(**batch()).logits)
    longer = {name: value.repeat(2, 3) for name, value in batch().items()}
    assert torch.equal(printed(**longer)["logits"], program(**longer).logits)
    alone = printed(batch()["input_ids"])["logits"]
    assert torch.equal(alone, program(input_ids=batch()["input_ids"]).logits)
    assert not torch.equal(alone, case.clean(**batch()).logits)


def test_the_printed_module_can_be_read(case: Case) -> None:
    text = python_source(case.planned(FORMATS))
    assert f"\n        # {DOWN}\n" in text
    assert f"weights['{DOWN}.weight']" in text
    assert "'int4:g32'" in text
    assert "# apply-plan" in text
    assert max(map(len, text.splitlines())) < 250


def test_lowered_it_needs_nothing_of_this_project(case: Case, tmp_path: Path) -> None:
    found = export_python(case.job(FORMATS), case.new(), pipeline="lower-ops", check=False)
    hidden = "import sys; sys.modules['aqnfx'] = None; import runpy; runpy.run_path('model.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", hidden], cwd=found.path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "logits" in done.stdout
    module = module_of((found.path / SOURCE).read_text("utf-8"), tmp_path / "printed.py")
    with torch.no_grad():
        assert torch.equal(module.load(found.path)(**batch())["logits"], case.planned(FORMATS)(**batch()).logits)


@pytest.mark.parametrize(
    ("family", "small"),
    [("gpt2", {"n_layer": 1}), ("qwen3_moe", {"num_hidden_layers": 1}), ("t5", {"num_layers": 1, "num_decoder_layers": 1})],
)
@torch.no_grad()
def test_other_families(family: str, small: dict[str, Any], tmp_path: Path) -> None:
    program = aqnfx.Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(build(family, **small)))
    printed = module_of(python_source(program), tmp_path / "printed.py").Model(named_tensors(program))
    given = inputs(family, 2, 12)
    assert torch.equal(printed(**given)["logits"], program(**given).logits)
