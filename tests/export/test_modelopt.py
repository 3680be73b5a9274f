"""ModelOpt configs: what ``mtq.quantize`` makes of them is the plan."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from aqnfx.errors import AqnfxError, InputError
from aqnfx.export.job import Linear
from aqnfx.export.modelopt import check_names, export_modelopt, quant_cfg
from aqnfx.numerics.formats import parse_format
from tests.export.conftest import Case, batch, kl

Q, K, V = (f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
GATE, UP, DOWN = (f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down"))
FORMATS = {
    Q: {"weight": "int8:row"}, K: {"weight": "int4:g32:fp32"}, V: {"weight": "fp8_e4m3:row", "input": "fp8_e4m3:token"},
    GATE: {"weight": "int8:row", "input": "int8:token"}, UP: {"weight": "int3:row"}, DOWN: {"weight": "fp8_e4m3:tensor"},
}  # fmt: skip


@pytest.fixture(scope="module")
def mtq() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the version of transformers
        import modelopt.torch.quantization as found

        return found


def quantised(mtq: Any, model: nn.Module, config: dict[str, Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: nn.Module = mtq.quantize(model, config)
        return found


def switched_on(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if name.endswith("_quantizer") and module.is_enabled}


@torch.no_grad()
def test_modelopt_makes_the_plan_of_it(case: Case, mtq: Any) -> None:
    found = export_modelopt(case.job(FORMATS), case.new().with_suffix(".yaml"), check=False)
    config = yaml.safe_load(found.path.read_text("utf-8"))
    assert config["quant_cfg"][0] == {"quantizer_name": "*", "enable": False}
    model = quantised(mtq, case.job({}).model, config)
    inputs = {f"{name}.input_quantizer" for name, formats in FORMATS.items() if "input" in formats}
    assert switched_on(model) == {f"{name}.weight_quantizer" for name in FORMATS} | inputs
    ours, theirs, clean = (m(**batch()).logits for m in (case.planned(FORMATS), model, case.clean))
    assert kl(ours, theirs) < 1e-4 * kl(clean, ours)
    assert found.notes == ()


@torch.no_grad()
def test_scales_in_bfloat16_are_close_and_say_so(case: Case, mtq: Any) -> None:
    formats = {name: {"weight": "int4:g32"} for name in (Q, K, V, GATE, UP, DOWN)}
    found = export_modelopt(case.job(formats), case.new().with_suffix(".yaml"), check=False)
    assert any("int" in note and ":fp32 is the same" in note for note in found.notes)
    model = quantised(mtq, case.job({}).model, yaml.safe_load(found.path.read_text("utf-8")))
    ours, theirs, clean = (m(**batch()).logits for m in (case.planned(formats), model, case.clean))
    assert 1e-6 * kl(clean, ours) < kl(ours, theirs) < 0.1 * kl(clean, ours)


@torch.no_grad()
def test_a_tied_embedding_is_not_quantised_with_the_head(tied: Case, mtq: Any) -> None:
    formats = {"lm_head": {"weight": "int4:g32:fp32"}}
    found = export_modelopt(tied.job(formats), tied.new().with_suffix(".yaml"), check=False)
    model = quantised(mtq, tied.job({}).model, yaml.safe_load(found.path.read_text("utf-8")))
    assert switched_on(model) == {"lm_head.weight_quantizer"}
    ours = tied.planned(formats)(**batch()).logits
    torch.testing.assert_close(model(**batch()).logits, ours, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp6_e3m2", "mxfp8_e4m3", "mxint8"])
def test_narrow_blocks_are_the_configs_of_modelopt(case: Case, mtq: Any, name: str) -> None:
    """They run on CUDA devices only: here the config is checked against ModelOpt's own presets."""
    found = export_modelopt(case.job({DOWN: {"weight": name, "input": name}}), case.new().with_suffix(".yaml"), check=False)
    config = yaml.safe_load(found.path.read_text("utf-8"))
    mtq.config.QuantizeConfig(**config)
    preset = {"nvfp4": "NVFP4", "mxfp6_e3m2": "MXFP6"}.get(name, name.removesuffix("_e4m3").upper())
    entries = getattr(mtq, f"{preset}_DEFAULT_CFG")["quant_cfg"]
    known = next(entry["cfg"] for entry in entries if entry["quantizer_name"] == "*weight_quantizer")
    as_given = mtq.config.QuantizerAttributeConfig(**config["quant_cfg"][1]["cfg"])
    as_known = mtq.config.QuantizerAttributeConfig(**known)
    assert (as_given.num_bits, as_given.block_sizes) == (as_known.num_bits, as_known.block_sizes)
    assert any("CUDA" in note for note in found.notes)


def test_a_name_with_control_characters_stays_in_its_comment(case: Case) -> None:
    job = case.job({DOWN: {"weight": "int8:row"}}, model={"name": "a\x85b: [\u2028c\x1b", "digest": case.digest})
    found = export_modelopt(job, case.new().with_suffix(".yaml"), check=False)
    assert yaml.safe_load(found.path.read_text("utf-8"))["algorithm"] == "max"


def test_names_match_themselves_and_nothing_else(mtq: Any) -> None:
    mlp = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("gate", "gate_proj", "up_gate", "gate2")})
    model = nn.ModuleDict({"mlp": mlp, "a[b]": nn.Linear(8, 8), "ab": nn.Linear(8, 8)})
    names = [name for name, _ in model.named_modules()]
    planned = {
        name: Linear(name=name, module=model.get_submodule(name), weight=parse_format("int8:row"), input=None)
        for name in ("mlp.gate", "a[b]")
    }
    config = quant_cfg(planned)
    check_names(config, names, planned)
    assert switched_on(quantised(mtq, model, config)) == {"mlp.gate.weight_quantizer", "a[b].weight_quantizer"}
    loose = {"quant_cfg": [*config["quant_cfg"], {"quantizer_name": "mlp.gate*.weight_quantizer", "cfg": {}}]}
    with pytest.raises(AqnfxError, match=r"first mlp\.gate2\.weight_quantizer"):
        check_names(loose, names, planned)


@pytest.mark.parametrize(
    ("formats", "words"),
    [
        ({"weight": "int8:row:asym"}, "cannot store the weight of model.layers.0.mlp.down_proj in int8:row:asym"),
        ({"weight": "fp8_e5m2:row"}, "in fp8_e5m2:row; what works: intN:row"),
        ({"weight": "fp8_e4m3:none"}, "in fp8_e4m3:none"),
        ({"weight": "mxfp6_e2m3"}, "in mxfp6_e2m3"),
        ({"weight": "bf16"}, "in bf16"),
        ({"weight": "int8:row", "input": "int8:g32"}, "cannot store the input of"),
    ],
)
def test_what_modelopt_has_not_is_refused(case: Case, formats: dict[str, str], words: str) -> None:
    job, out = case.job({DOWN: formats}), case.new().with_suffix(".yaml")
    with pytest.raises(InputError) as error:
        export_modelopt(job, out, check=False)
    assert words in str(error.value)
    assert not out.exists()
