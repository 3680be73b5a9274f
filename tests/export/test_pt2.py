"""Files of torch.export: what is loaded from them returns what the Program returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import aqnfx
from aqnfx.errors import InputError
from aqnfx.export.pt2 import export_pt2, write_pt2
from aqnfx.graph.captures import CaptureBuffers
from tests.export.conftest import Case, batch

DOWN, KEYS = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn"
FORMATS = {DOWN: {"weight": "int4:g32", "input": "int8:token"}, KEYS: {"key": "nvfp4"}}


def loaded(path: Path) -> Any:
    return torch.export.load(path).module()


@pytest.mark.parametrize("pipeline", ["", "lower-ops"])
@torch.no_grad()
def test_the_quantised_graph(case: Case, pipeline: str) -> None:
    found = export_pt2(case.job(FORMATS), case.new().with_suffix(".pt2"), pipeline=pipeline, check=False)
    assert bool(found.notes) == (pipeline == "")
    module, program = loaded(found.path), case.planned(FORMATS)
    for given in (batch(), {name: value.repeat(2, 3) for name, value in batch().items()}):
        torch.testing.assert_close(module(**given)["logits"], program(**given).logits, atol=2e-6, rtol=0.0)
    names = {str(node.target) for node in module.graph.nodes}
    assert ("aqnfx.fake_quant.default" in names) == (pipeline == "")


@torch.no_grad()
def test_the_noisy_graph_and_its_controls(case: Case) -> None:
    noisy = aqnfx.Pipeline.parse('insert-noise{where="ops:linear" level=0.05}')(case.clean)
    module = loaded(write_pt2(noisy, case.new().with_suffix(".pt2")))
    wanted = noisy(**batch()).logits
    torch.testing.assert_close(module(**batch())["logits"], wanted, atol=1e-5, rtol=0.0)
    levels = [buffer for name, buffer in module.named_buffers() if name.endswith("_level")]
    assert len(levels) == len(noisy.controls.sites)
    for level in levels:
        level.zero_()
    clean = case.clean(**batch()).logits
    torch.testing.assert_close(module(**batch())["logits"], clean, atol=1e-5, rtol=0.0)
    assert (wanted - clean).abs().max() > 1e-3


@torch.no_grad()
def test_captures_are_outputs(case: Case) -> None:
    watched = aqnfx.Pipeline.parse('insert-capture{where="ops:linear" perturb=mxfp4}')(case.clean)
    module = loaded(write_pt2(watched, case.new().with_suffix(".pt2")))
    for given in (batch(), {**batch(), "attention_mask": torch.tensor([[1] * 12, [1] * 5 + [0] * 7])}):
        buffers = CaptureBuffers.of(watched.module)
        buffers.reset()
        logits, found = watched(**given).logits, module(**given)
        torch.testing.assert_close(found["logits"], logits, atol=2e-6, rtol=0.0)
        assert set(found["captures"]) == set(buffers.sites)
        for site, (channels, totals) in buffers.sites.items():
            torch.testing.assert_close(found["captures"][site]["channels"], channels, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found["captures"][site]["totals"], totals, rtol=1e-2, atol=1e-6)
            assert totals[0] == int(given["attention_mask"].sum())


def test_writing_a_file_changes_no_program(case: Case) -> None:
    watched = aqnfx.Pipeline.parse('insert-capture{where="ops:linear"}')(case.clean)
    watched(**batch())
    before, counted = watched.fingerprint, [t.clone() for pair in CaptureBuffers.of(watched.module).sites.values() for t in pair]
    write_pt2(watched, case.new().with_suffix(".pt2"))
    assert watched.render() == aqnfx.Pipeline.parse('insert-capture{where="ops:linear"}')(case.clean).render()
    assert watched.fingerprint == before
    after = [t for pair in CaptureBuffers.of(watched.module).sites.values() for t in pair]
    assert all(torch.equal(a, b) for a, b in zip(counted, after, strict=True))


def test_what_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"end in \.pt2"):
        write_pt2(case.clean, tmp_path / "model.pt")
    backward = aqnfx.Pipeline.parse('insert-capture{where="ops:linear" gradients=true}')(case.clean)
    with pytest.raises(InputError, match="leave gradients=true out"):
        write_pt2(backward, tmp_path / "model.pt2")
    path = write_pt2(case.clean, tmp_path / "clean.pt2")
    with pytest.raises(InputError, match="can run code"):
        aqnfx.trace(path)
    again = aqnfx.trace(path, allow_unsafe_pt2=True)
    torch.testing.assert_close(again(**batch())["logits"], case.clean(**batch()).logits, atol=2e-6, rtol=0.0)
    assert [p.name for p in tmp_path.iterdir()] == ["clean.pt2"]
