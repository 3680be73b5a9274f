"""The threshold rule: where sensitivities come from, which format they give, and maps that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aqnfx
from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.errors import ArtifactError, InputError
from aqnfx.graph.frontend import model_digest
from aqnfx.graph.sites import Role
from aqnfx.planning.options import PlanOptions
from aqnfx.planning.precision_plan import PrecisionPlan, check_model
from aqnfx.planning.problem import make_problem
from aqnfx.planning.threshold import sensitivity, threshold_plan
from aqnfx.reporting.plan import plan_markdown
from tests.cli.tiny import TEXT, save_model, save_text, tokenizer

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> aqnfx.Program:
    directory = save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2)
    return aqnfx.Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(str(directory)))


@pytest.fixture(scope="module")
def digest(program: aqnfx.Program) -> str:
    return model_digest(program)


def level(degradation: float | None, **more: Any) -> dict[str, Any]:
    low = 0.0 if degradation is None else degradation / 2
    return {"0.1": {"degradation": degradation, "degradation_ci": [low, 2 * low + 0.001], **more}}


def entry(module: str, role: str = "output", **tables: Any) -> dict[str, Any]:
    site = f"{module}:linear:0" + ("" if role == "output" else f":{role}")
    return {
        "id": site, "module": module, "op": "linear", "role": role, "layer": 0, "stack": "model.layers", "region": "attention",
        "measured": {}, "predicted": {}, **tables,
    }  # fmt: skip


def record(program: aqnfx.Program, digest: str, *sites: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "schema": "aqnfx.sensitivity/1",
        "model": {"name": "tiny", "dtype": "float32", "parameters": program.source["parameters"], "digest": digest},
        "task": {"metric": "kl", "samples": 8, "tokens": 100},
        "noise": {"kind": "relative_gaussian", "levels": [0.1], "base_level": 0.1, "seeds": [0]},
        "per_site": list(sites), "windows": [],
        "per_operator": {"linear": 0.4}, "per_operator_detail": {"linear": {"levels": level(0.4)}},
        "per_layer": {"0": 0.1, "1": 0.01}, "per_layer_detail": {"0": {"levels": level(0.1)}, "1": {"levels": level(0.01)}},
    } | changes  # fmt: skip


def chosen(plan: PrecisionPlan) -> dict[str, str]:
    assert {m: found["chosen"] for m, found in plan.modules.items()} == {
        m: a.weight for m, a in plan.assignments.items()
    }  # fmt: skip
    return {m: found["chosen"] for m, found in plan.modules.items()}


def test_site_before_layer_before_operator(program: aqnfx.Program, digest: str) -> None:
    plan = threshold_plan(program, record(program, digest, entry(Q, measured=level(0.2))))
    found = {module: (part["source"], part["of"], part["asked"]) for module, part in plan.modules.items()}
    assert found.pop(Q) == ("site", f"{Q}:linear:0", "fp16")
    assert found.pop("lm_head") == ("operator", "linear", "fp16")
    assert {part for module, part in found.items() if ".0." in module} == {("layer", "0", "int8:row")}
    assert {part for module, part in found.items() if ".1." in module} == {("layer", "1", "int4:g32")}
    assert plan.modules[Q]["ci"] == [0.1, 0.201]
    assert plan.modules[Q]["sensitivity"] == 0.2
    assert chosen(plan)[Q] == "fp16"
    parts = plan.modules.values()
    bits = sum(part["options"][part["chosen"]]["bits"] for part in parts)
    assert plan.bytes == -(-bits // 8)
    assert plan.effective_bits == pytest.approx(bits / sum(part["parameters"] for part in parts))
    assert (plan.rule, plan.budget["value"], plan.measured, plan.predicted) == ("threshold", [0.15, 0.05], {}, {})
    assert PrecisionPlan.from_record(json.loads(json.dumps(plan.to_record()))).to_record() == plan.to_record()
    check_model(plan, program, "plan.json")
    text = plan_markdown(plan)
    assert f"| {Q} | fp16 | 20.0 % | 10.0 to 20.1 % | its site |" in text
    assert "| lm_head | fp16 | 40.0 % | 20.0 to 40.1 % | operator linear |" in text
    # 0.2 (0.1 to 0.201) holds 0.15, and so on: 13 of 15 layers' intervals hold a threshold.
    assert any("of 15 are not settled by the map" in note for note in plan.notes)


def test_which_site_and_what_is_marked(program: aqnfx.Program, digest: str) -> None:
    sites = (
        entry(Q, measured=level(0.01)), entry(Q, "weight", measured=level(0.3)),
        entry(K, measured=level(None), estimated=level(0.06, estimated=True)),
    )  # fmt: skip
    plan = threshold_plan(program, record(program, digest, *sites))
    assert (plan.modules[Q]["of"], plan.modules[Q]["estimated"]) == (f"{Q}:linear:0:weight", False)
    assert (plan.modules[K]["sensitivity"], plan.modules[K]["estimated"], plan.modules[K]["source"]) == (0.06, True, "site")
    assert "| 6.0 % | 3.0 to 6.1 % | its site, predicted |" in plan_markdown(plan)
    assert any("1 predicted and not measured" in note for note in plan.notes)
    guessed = record(program, digest, per_layer_detail={"0": {"levels": level(0.1, estimated=True)}})
    assert threshold_plan(program, guessed).modules[K]["estimated"]


def test_the_most_sensitive_call_of_a_layer_that_runs_twice_decides(digest: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(torch.relu(self.shared(x)))

    program = aqnfx.Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(Twice(), ((torch.ones(2, 8),), {})))
    (part,) = make_problem(program, PlanOptions(rule="threshold", formats="fp16,int8,int4")).parts
    first, second = part.sites_of(Role.WEIGHT)
    for low, high in ((first, second), (second, first)):
        entries = [{**entry("shared", measured=level(value)), "id": site} for site, value in ((low, 0.01), (high, 0.3))]
        found = sensitivity(part, program, SensitivityMap.from_record(record(program, digest, *entries)))
        assert found is not None
        assert (found.value, found.of) == (0.3, high)


@pytest.mark.parametrize(
    ("value", "format"),
    [(0.15, "int8:row"), (0.1501, "fp16"), (0.05, "int4:g32"), (0.0501, "int8:row"), (-0.1, "int4:g32"), (1.0, "fp16")],
)
def test_above_means_above(program: aqnfx.Program, digest: str, value: float, format: str) -> None:
    plan = threshold_plan(program, record(program, digest, per_layer={"0": value, "1": 0.0}), layers="0")
    assert set(chosen(plan).values()) == {format}


def test_formats_and_thresholds_of_ones_own(program: aqnfx.Program, digest: str) -> None:
    plan = threshold_plan(
        program, record(program, digest), formats=("keep", "fp8_e4m3", "int3:g32"), thresholds=(0.3, 0.1),
        modules=("*.q_proj", "lm_head"),
    )  # fmt: skip
    assert {m: a.weight for m, a in plan.assignments.items()} == {
        "lm_head": None, Q: "int3:g32", Q.replace("0", "1"): "int3:g32",
    }  # fmt: skip
    assert plan.modules["lm_head"]["options"]["keep"]["bits"] == 32 * plan.modules["lm_head"]["parameters"]


def test_groups_floors_pins_and_blocks_that_do_not_fit(program: aqnfx.Program, digest: str) -> None:
    table = record(program, digest, entry(Q, measured=level(0.2)))
    fused = chosen(threshold_plan(program, table, couple="fused"))
    assert {fused[Q.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")} == {"fp16"}
    assert fused[Q.replace("q_proj", "o_proj")] == "int8:row"
    found = chosen(threshold_plan(program, table, floor={"1": 8.0}, keep={"lm_head": "bf16"}))
    assert {format for module, format in found.items() if ".1." in module} == {"int8:row"}
    assert found["lm_head"] == "bf16"
    # Nothing sums over a multiple of 48 values: the next more precise format takes its place.
    found = chosen(threshold_plan(program, table, formats=("fp16", "int8", "int4:g48"), partial="drop"))
    assert set(found.values()) == {"fp16", "int8:row"}
    with pytest.raises(InputError, match="its blocks do not divide"):
        threshold_plan(program, table, formats=("fp16", "int8", "int4:g48"))


def test_what_the_map_says_nothing_of(program: aqnfx.Program, digest: str) -> None:
    silent = record(program, digest, per_operator={}, per_operator_detail={})
    with pytest.raises(InputError, match=r"says nothing of lm_head: .*; diagnose with --probes operator,layer or site"):
        threshold_plan(program, silent)
    plan = threshold_plan(program, silent, keep={"lm_head": "fp16"})
    assert plan.modules["lm_head"]["asked"] is None
    assert "| lm_head | fp16 | n/a | n/a | kept |" in plan_markdown(plan)
    assert len(threshold_plan(program, silent, layers="0-1").modules) == 14


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model": {"parameters": 7}}, "of another model: of 7 parameters"),
        ({"model": {"digest": "ab", "dtype": "float32"}}, "the same sites, and other weights"),
        ({"per_site": [entry("model.layers.5.self_attn.q_proj")]}, "has no site 'model.layers.5."),
        ({"per_layer": {"0": 0.1, "7": 0.1}}, "has no layer '7'"),
        ({"windows": [{"layers": [1, 2], "measured": None, "predicted": None, "amplification": None}]}, "has no layer '2'"),
        ({"schema": "aqnfx.plan/1"}, "expected schema 'aqnfx.sensitivity/1'"),
        ({"per_layer": {"0": "much"}}, "per_layer.0"),
        ({"per_layer_detail": {"0": {"levels": {"0.1": {"degradation_ci": 0.1}}}}}, "Input should be a valid list"),
        ({"per_site": [entry(Q, measured={"0.1": {"degradation": "0.2"}})]}, "must be a number, found '0.2'"),
        ({"per_site": [entry(Q, estimated={"0.1": {"degradation": [1]}})]}, "must be a number, found [1]"),
    ],
)
def test_maps_that_are_refused(program: aqnfx.Program, digest: str, changes: dict[str, Any], found: str) -> None:
    with pytest.raises(ArtifactError) as error:
        threshold_plan(program, record(program, digest) | changes)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


def test_a_plan_by_thresholds_is_measured_like_any_other(program: aqnfx.Program, digest: str, tmp_path: Path) -> None:
    quick = {"samples": 3, "eval_samples": 2, "max_length": 24, "batch_size": 2, "pack": False, "tokenizer": tokenizer()}
    smap = SensitivityMap.from_record(record(program, digest, provenance={"data": {"path": "text.jsonl"}}))
    data = save_text(tmp_path / "text.jsonl", copies=2)
    plan = threshold_plan(program, smap, data, **quick)
    assert plan.assignments == threshold_plan(program, smap).assignments
    assert [row["name"] for row in plan.compared] == ["uniform fp16", "uniform int8:row", "uniform int4:g32", "in order"]
    kl = {row["name"]: row["kl"]["estimate"] for row in plan.compared}
    assert kl["uniform fp16"] < plan.measured["kl"]["estimate"] < kl["uniform int4:g32"]
    assert any("data of the same name (text.jsonl)" in note for note in plan.notes)
    assert "## Measured on 2 samples\n" in plan_markdown(plan)
    assert (plan.provenance["samples"], plan.provenance["skipped_samples"]) == (0, 3)
    # The samples that judge are those that judge an optimal plan; with too few data, all.
    other = threshold_plan(program, smap, TEXT[3:], **quick | {"samples": 9})
    assert other.measured["samples"] == 1
    same = threshold_plan(program, smap, TEXT * 2, **quick | {"samples": 9})
    assert same.measured["samples"] == 8
    assert not any("of the same name" in note for note in same.notes)
