"""Checkpoints of compressed-tensors: loaded by transformers, they are the plan; vLLM's rules about fused layers hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_named_modules
from torch import nn
from transformers import AutoModelForCausalLM

from aqnfx.errors import InputError
from aqnfx.export.compressed_tensors import export_compressed_tensors, quantization_config
from aqnfx.numerics.formats import parse_format, quantize
from tests.export.conftest import Case, batch, kl

Q, K, V, OUT = (f"model.layers.0.self_attn.{x}_proj" for x in "qkvo")
GATE, UP, DOWN = (f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down"))
GATE_1, UP_1, DOWN_1 = (f"model.layers.1.mlp.{x}_proj" for x in ("gate", "up", "down"))


def each(modules: tuple[str, ...], **roles: str) -> dict[str, dict[str, str]]:
    return {module: roles for module in modules}


WIDE = {
    **each((Q, K, V), weight="int4:g32"), OUT: {"weight": "int8:row"}, **each((GATE, UP), weight="int8:g16"),
    DOWN: {"weight": "int3:row"}, **each((GATE_1, UP_1), weight="fp8_e4m3:row"), DOWN_1: {"weight": "fp8_e4m3:tensor"},
}  # fmt: skip
NARROW = {
    **each((Q, K, V), weight="nvfp4"), OUT: {"weight": "mxfp4"}, **each((GATE, UP), weight="int4:g32"),
    DOWN: {"weight": "mxfp8_e4m3"}, **each((GATE_1, UP_1), weight="int8:row:bf16"), DOWN_1: {"weight": "fp8_e4m3:row:bf16"},
}  # fmt: skip


def load(path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model(**batch())  # compressed-tensors unpacks at the first forward pass
    return model


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text("utf-8"))["quantization_config"]
    return found


@torch.no_grad()
def test_the_loaded_model_is_the_plan_bit_for_bit(case: Case) -> None:
    found = export_compressed_tensors(case.job(WIDE), case.new(), dtype="float32", check=False)
    model = load(found.path)
    for name, formats in WIDE.items():
        wanted = quantize(case.weight(name), parse_format(formats["weight"]))
        assert torch.equal(model.get_submodule(name).weight, wanted), name
    ours, theirs, clean = (m(**batch()).logits for m in (case.planned(WIDE), model, case.clean))
    torch.testing.assert_close(theirs, ours, atol=2e-6, rtol=0.0)
    assert kl(ours, theirs) < 1e-12 < 1e-6 < kl(clean, ours)


@torch.no_grad()
def test_narrow_floats_are_those_of_the_plan(case: Case) -> None:
    """In bfloat16, which those are unpacked to: stored values of more than 8 significant bits are rounded then."""
    found = export_compressed_tensors(case.job(NARROW), case.new(), check=False)
    model = load(found.path)
    assert model.dtype == torch.bfloat16
    for name, formats in NARROW.items():
        stored = model.get_submodule(name).weight
        wanted = quantize(case.weight(name), parse_format(formats["weight"])).bfloat16()
        if formats["weight"] == "nvfp4":  # by way of a rounded reciprocal
            torch.testing.assert_close(stored, wanted, rtol=2.0**-7, atol=0.0)
            assert (stored == wanted).float().mean() > 0.9
        else:
            assert torch.equal(stored, wanted), name
    ours, clean = case.planned(NARROW)(**batch()).logits, case.clean(**batch()).logits
    assert kl(ours, model(**batch()).logits) < 0.1 * kl(clean, ours)


def test_the_file_shrinks_as_planned(case: Case) -> None:
    names = [name for name, _ in case.job({}).model.named_modules() if name.endswith("_proj")]
    found = export_compressed_tensors(case.job(each(tuple(names), weight="int4:g32")), case.new(), dtype="bfloat16", check=False)
    assert found.planned_bytes == sum(case.weight(n).numel() for n in names) * 4.5 / 8
    assert found.stored_bytes == found.planned_bytes + 16 * len(names)  # two int64 per weight say its shape


@torch.no_grad()
def test_inputs_are_those_of_the_plan(case: Case) -> None:
    formats = {
        **each((Q, K, V, OUT), weight="int8:row", input="int8:token:asym"),
        DOWN: {"weight": "int4:g32", "input": "fp8_e4m3:token"},
        **each((GATE, UP), weight="fp8_e4m3:row", input="fp8_e4m3:token"),
        DOWN_1: {"weight": "fp8_e4m3:row", "input": "fp8_e4m3:tensor"},
    }  # fmt: skip
    found = export_compressed_tensors(case.job(formats), case.new(), dtype="float32", check=False)
    ours, theirs = case.planned(formats)(**batch()).logits, load(found.path)(**batch()).logits
    torch.testing.assert_close(theirs, ours, atol=2e-6, rtol=0.0)


@torch.no_grad()
def test_symmetric_inputs_cost_as_much_on_another_grid(case: Case) -> None:
    formats = each((Q, K, V, OUT, GATE, UP, DOWN), weight="int8:row", input="int8:token")
    found = export_compressed_tensors(case.job(formats), case.new(), dtype="float32", check=False)
    ours, theirs, clean = (m(**batch()).logits for m in (case.planned(formats), load(found.path), case.clean))
    assert kl(clean, theirs) == pytest.approx(kl(clean, ours), rel=0.3)
    assert 0.0 < kl(ours, theirs) < 2.0 * kl(clean, ours)
    assert any("-128" in note for note in found.notes)


def test_the_config_is_the_librarys_and_matches_the_plan(case: Case) -> None:
    found = export_compressed_tensors(case.job(WIDE), case.new(), dtype="float32", check=False)
    record = config_of(found.path)
    assert record["format"] == "mixed-precision"
    assert record["quant_method"] == "compressed-tensors"
    assert record["quantization_status"] == "compressed"
    config, model = QuantizationConfig.model_validate(record), case.job({}).model
    seen: dict[str, Any] = {}
    for group in config.config_groups.values():
        for name, _ in match_named_modules(model, group.targets, config.ignore):
            assert name not in seen
            seen[name] = group
    assert set(seen) == set(WIDE)
    assert all(seen[a] is seen[b] for a, b in ((Q, K), (Q, V), (GATE, UP), (GATE_1, UP_1)))
    assert seen[Q] is not seen[OUT]
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(config.ignore) == linears - set(WIDE)


def test_names_match_themselves_and_nothing_else() -> None:
    names = ("gate", "gate_proj", "gateXproj", "up_gate")
    model = nn.ModuleDict({"mlp": nn.ModuleDict({n: nn.Linear(8, 8) for n in names})})
    scheme = {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}, "input_activations": None}
    config = quantization_config(model, {"mlp.gate": scheme})
    (group,) = config.config_groups.values()
    assert [name for name, _ in match_named_modules(model, group.targets, config.ignore)] == ["mlp.gate"]


@torch.no_grad()
def test_a_tied_head_is_stored_apart_and_says_so(tied: Case) -> None:
    formats = {"lm_head": {"weight": "int4:g32"}}
    found = export_compressed_tensors(tied.job(formats), tied.new(), dtype="float32", check=False)
    assert any("lm_head shared its weight with model.embed_tokens" in note for note in found.notes)
    model = load(found.path)
    assert torch.equal(model.model.embed_tokens.weight, tied.weight("model.embed_tokens"))
    torch.testing.assert_close(model(**batch()).logits, tied.planned(formats)(**batch()).logits, atol=2e-6, rtol=0.0)


@torch.no_grad()
def test_a_tied_head_that_is_not_planned_stays_tied(tied: Case) -> None:
    found = export_compressed_tensors(tied.job({DOWN: {"weight": "int8:row"}}), tied.new(), check=False)
    model = load(found.path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_float32_scales_keep_the_checkpoint_in_float32(case: Case) -> None:
    job = dataclasses.replace(case.job({DOWN: {"weight": "int8:row"}}), stored_dtype=torch.bfloat16)
    found = export_compressed_tensors(job, case.new(), check=False)
    assert any("stored in float32" in note for note in found.notes)
    assert load(found.path).dtype == torch.float32
    with pytest.raises(InputError, match=r"plan with int8:row:bf16, or use --dtype float32"):
        export_compressed_tensors(case.job({DOWN: {"weight": "int8:row"}}), case.new(), dtype="bfloat16", check=False)
    with pytest.raises(InputError, match=r"unpacks the nvfp4 of .*down_proj to bfloat16"):
        export_compressed_tensors(case.job({DOWN: {"weight": "nvfp4"}}), case.new(), dtype="float32", check=False)


@torch.no_grad()
def test_modules_that_are_kept_in_16_bits_stand_in_ignore(case: Case) -> None:
    """Beside float32 scales too: their values are those of their 16 bits, and the file has no more."""
    formats = {**each((Q, K, V), weight="int8:row"), OUT: {"weight": "bf16"}, DOWN: {"weight": "fp16"}, GATE: {"weight": "bf16"}}
    found = export_compressed_tensors(case.job(formats), case.new(), check=False)
    assert {OUT, DOWN, GATE} <= set(config_of(found.path)["ignore"])
    model = load(found.path)
    for name in (OUT, DOWN, GATE):
        assert torch.equal(model.get_submodule(name).weight, quantize(case.weight(name), parse_format(formats[name]["weight"])))
    torch.testing.assert_close(model(**batch()).logits, case.planned(formats)(**batch()).logits, atol=2e-6, rtol=0.0)
    assert found.planned_bytes is not None
    assert found.stored_bytes == found.planned_bytes + 16 * 3  # two int64 per packed weight say its shape
    with pytest.raises(InputError, match=r"keeps .*down_proj in fp16; use --dtype float32"):
        export_compressed_tensors(case.job(each((DOWN, OUT), weight="fp16") | each((GATE, UP), weight="int4:g32")), case.new(),
                                  dtype="bfloat16", check=False)  # fmt: skip
    with pytest.raises(InputError, match="keeps 1 modules in 16 bits and quantises none"):
        export_compressed_tensors(case.job({DOWN: {"weight": "bf16"}}), case.new(), check=False)


def test_groups_that_vllm_has_no_kernel_for_have_a_note(case: Case) -> None:
    found = export_compressed_tensors(case.job({DOWN: {"weight": "int8:g16"}}), case.new(), check=False)
    assert any("vLLM has no CPU kernel" in note for note in found.notes)


def test_layers_that_runtimes_fuse_have_one_scheme(case: Case) -> None:
    apart = {Q: {"weight": "int8:row"}, K: {"weight": "int8:row"}, V: {"weight": "int4:g32"}}
    with pytest.raises(InputError, match=r"int8:row for .*q_proj and int4:g32 for .*v_proj; make the plan with --couple fused"):
        export_compressed_tensors(case.job(apart), case.new(), check=False)
    with pytest.raises(InputError, match=r"int8:row for .*gate_proj and no format for .*up_proj"):
        export_compressed_tensors(case.job({GATE: {"weight": "int8:row"}}), case.new(), check=False)
    groups = [{"modules": [Q, OUT], "reason": "shared input"}]
    job = case.job(apart, coupling={"mode": "fused", "groups": groups, "kl": None})
    with pytest.raises(InputError, match=r"q_proj and no format for .*o_proj"):
        export_compressed_tensors(job, case.new(), check=False)


@pytest.mark.parametrize(
    ("formats", "words"),
    [
        ({"weight": "int4:g32:asym"}, "cannot store the weight of model.layers.0.mlp.down_proj in int4:g32:asym"),
        ({"weight": "fp8_e5m2:row"}, "in fp8_e5m2:row; what works: intN:row"),
        ({"weight": "fp8_e4m3:none"}, "in fp8_e4m3:none"),
        ({"weight": "mxint8"}, "in mxint8"),
        ({"weight": "mxfp6_e3m2"}, "in mxfp6_e3m2"),
        ({"weight": "bf16"}, "quantises none"),
        ({"weight": "nvfp4", "input": "nvfp4"}, "cannot store the input of"),
        ({"weight": "int8:row", "input": "int4:token"}, "what works: int8:token, int8:token:asym, fp8_e4m3:token"),
        ({"weight": "int8:g40"}, "groups of 40 and rows of 96"),
    ],
)
def test_what_the_format_cannot_express_is_refused(case: Case, formats: dict[str, str], words: str) -> None:
    job, out = case.job({DOWN: formats}), case.new()
    with pytest.raises(InputError) as error:
        export_compressed_tensors(job, out, check=False)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not out.exists()
