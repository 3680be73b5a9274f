"""torchao checkpoints: loaded with the normal API, they are the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, fqn_matches_fqn_config, quantize_
from torchao.utils import TorchAOBaseTensor
from transformers import AutoModelForCausalLM

import aqnfx
from aqnfx.artifacts import write_json
from aqnfx.errors import InputError
from aqnfx.export.targets import export_plan
from aqnfx.export.torchao import export_torchao, fqn_config
from aqnfx.graph.assignments import Assignment
from aqnfx.graph.frontend import model_digest
from aqnfx.numerics.formats import parse_format, quantize
from aqnfx.planning.precision_plan import PrecisionPlan
from tests.export.conftest import Case, batch, kl
from tests.families import build

Q, K, V = (f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
GATE, UP, DOWN = (f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down"))

EXACT = {
    Q: {"weight": "int8:row"}, K: {"weight": "int4:g32"}, V: {"weight": "fp8_e4m3:row"}, GATE: {"weight": "int4:g32:asym"},
    UP: {"weight": "int8:g16"}, DOWN: {"weight": "int3:row"}, "model.layers.1.mlp.up_proj": {"weight": "int8:tensor"},
    "model.layers.1.mlp.down_proj": {"weight": "fp8_e5m2:tensor"}, "model.layers.1.mlp.gate_proj": {"weight": "fp8_e4m3:g32"},
}  # fmt: skip


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


def torchao_tensors(model: Any) -> dict[str, Any]:
    return {name: value for name, value in model.named_parameters() if isinstance(value, TorchAOBaseTensor)}


@torch.no_grad()
def test_the_loaded_model_is_the_plan_bit_for_bit(case: Case) -> None:
    found = export_torchao(case.job(EXACT), case.new(), dtype="float32", check=False)
    model = load(found.path)
    tensors = torchao_tensors(model)
    assert set(tensors) == {f"{name}.weight" for name in EXACT}
    for name, formats in EXACT.items():
        wanted = quantize(case.weight(name), parse_format(formats["weight"]))
        assert torch.equal(tensors[f"{name}.weight"].dequantize(), wanted), name
    elements = tensors[f"{GATE}.weight"].qdata  # of 4 bits in bytes: what packs them reads no others
    assert (int(elements.min()), int(elements.max())) == (-8, 7)
    ours, theirs, clean = case.planned(EXACT)(**batch()).logits, model(**batch()).logits, case.clean(**batch()).logits
    torch.testing.assert_close(theirs, ours, atol=2e-6, rtol=0.0)
    assert kl(ours, theirs) < 1e-12 < 1e-6 < kl(clean, ours)


def test_the_file_shrinks_as_planned(case: Case) -> None:
    job = case.job({})
    names = [name for name, _ in job.model.named_modules() if name.endswith("_proj")]
    found = export_torchao(case.job({n: {"weight": "int8:row"} for n in names}), case.new(), dtype="float32", check=False)
    assert found.planned_bytes is not None
    assert found.stored_bytes is not None
    weights = [case.weight(name) for name in names]
    assert found.planned_bytes == sum(w.numel() + 4 * len(w) for w in weights)
    assert found.stored_bytes == found.planned_bytes + sum(map(len, weights))  # torchao keeps a zero point of a byte per row
    before, after = (sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (case.checkpoint, found.path))
    assert before - after == pytest.approx(4 * sum(w.numel() for w in weights) - found.stored_bytes, rel=0.1)  # the header


@pytest.mark.parametrize("weight", ["int8:row", "int4:g32"])
@torch.no_grad()
def test_inputs_with_a_zero_point_are_those_of_the_plan(case: Case, weight: str) -> None:
    formats = {name: {"weight": weight, "input": "int8:token:asym"} for name in (Q, K, V, GATE, UP, DOWN)}
    found = export_torchao(case.job(formats), case.new(), dtype="float32", check=False)
    ours, theirs = case.planned(formats)(**batch()).logits, load(found.path)(**batch()).logits
    torch.testing.assert_close(theirs, ours, atol=2e-6, rtol=0.0)
    assert not found.notes or weight == "int4:g32"


@torch.no_grad()
def test_symmetric_inputs_cost_as_much_on_another_grid(case: Case) -> None:
    """-128 to 127 there, -127 to 127 here: other values, an error of the same size; a note says so."""
    formats = {name: {"weight": "int8:row", "input": "int8:token"} for name in (Q, K, V, GATE, UP, DOWN)}
    found = export_torchao(case.job(formats), case.new(), dtype="float32", check=False)
    ours, theirs, clean = (m(**batch()).logits for m in (case.planned(formats), load(found.path), case.clean))
    assert kl(clean, theirs) == pytest.approx(kl(clean, ours), rel=0.3)
    assert 0.0 < kl(ours, theirs) < 2.0 * kl(clean, ours)
    assert any("-128" in note for note in found.notes)


@torch.no_grad()
def test_a_tied_head_is_stored_apart_and_says_so(tied: Case) -> None:
    formats = {"lm_head": {"weight": "int4:g32"}}
    found = export_torchao(tied.job(formats), tied.new(), dtype="float32", check=False)
    assert any("lm_head shared its weight with model.embed_tokens" in note for note in found.notes)
    model = load(found.path)
    assert set(torchao_tensors(model)) == {"lm_head.weight"}
    assert torch.equal(model.model.embed_tokens.weight, tied.weight("model.embed_tokens"))
    torch.testing.assert_close(model(**batch()).logits, tied.planned(formats)(**batch()).logits, atol=2e-6, rtol=0.0)


def test_a_tied_head_that_is_not_planned_stays_tied(tied: Case) -> None:
    found = export_torchao(tied.job({Q: {"weight": "int8:row"}}), tied.new(), check=False)
    model = load(found.path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert set(torchao_tensors(model)) == {f"{Q}.weight"}


@torch.no_grad()
def test_the_rest_is_stored_in_the_dtype_asked(case: Case) -> None:
    formats = {Q: {"weight": "int8:row"}, K: {"weight": "int4:g32"}}
    found = export_torchao(case.job(formats), case.new(), dtype="bfloat16", check=False)
    model = load(found.path)
    assert model.model.embed_tokens.weight.dtype == model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert kl(case.planned(formats)(**batch()).logits, model(**batch()).logits) < 1e-4


@torch.no_grad()
def test_by_default_it_is_stored_in_the_dtype_of_the_models_file(tmp_path: Path) -> None:
    """Plans are made in float32; a file in bfloat16 stays one."""
    build("llama", num_hidden_layers=1).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    program = aqnfx.Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(str(tmp_path / "model")))
    model = {"name": str(tmp_path / "model"), "digest": model_digest(program), "dtype": "float32"}
    plan = PrecisionPlan(model=model, assignments={DOWN: Assignment(weight="int4:g32")}, avg_bits=4, effective_bits=4.5, bytes=1)
    path = write_json(tmp_path / "plan.json", plan.to_record())
    found = load(export_plan(path, "torchao", tmp_path / "out", check=False).path)
    assert found.model.embed_tokens.weight.dtype == torch.bfloat16
    assert set(torchao_tensors(found)) == {f"{DOWN}.weight"}


def test_names_match_themselves_and_nothing_else() -> None:
    """With torchao's own rule: ``mlp.gate`` is no part of ``mlp.gate_proj``, and dots are dots."""
    model = nn.ModuleDict({"mlp": nn.ModuleDict({n: nn.Linear(8, 8) for n in ("gate", "gate_proj", "gateXproj", "up_gate")})})
    config = fqn_config({"mlp.gate": Int8WeightOnlyConfig(set_inductor_config=False)})
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in names if fqn_matches_fqn_config(name, config)] == ["mlp.gate.weight"]
    quantize_(model, config, filter_fn=None)
    assert set(torchao_tensors(model)) == {"mlp.gate.weight"}


@pytest.mark.parametrize(
    ("formats", "words"),
    [
        ({Q: {"weight": "nvfp4"}}, "cannot store the weight of model.layers.0.self_attn.q_proj in nvfp4"),
        ({Q: {"weight": "mxfp4"}}, "in mxfp4; what works"),
        ({Q: {"weight": "bf16"}}, "in bf16; what works"),
        ({Q: {"weight": "int4:tensor"}}, "what works: int4:row or int4:gN"),
        ({Q: {"weight": "int8:row", "input": "nvfp4"}}, "cannot store the input of"),
        ({Q: {"weight": "fp8_e4m3:row", "input": "fp8_e4m3:token"}}, "cannot store the input of"),
        ({Q: {"weight": "int4:g32", "input": "int8:token"}}, "int8:token:asym beside int4:g32"),
        ({Q: {"weight": "int4:g48"}}, "groups of 48 and rows of 64"),
        ({Q: {"input": "int8:token"}}, "leaves the weight of"),
        ({"model.embed_tokens": {"weight": "int8:row"}}, "model.embed_tokens is Embedding"),
        ({"model.layers.0.self_attn": {"key": "int8:row"}}, "for the key of one attention"),
    ],
)
def test_what_torchao_cannot_store_is_refused(case: Case, formats: dict[str, dict[str, str]], words: str) -> None:
    job, out = case.job(formats), case.new()
    with pytest.raises(InputError) as error:
        export_torchao(job, out, check=False)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not out.exists()
