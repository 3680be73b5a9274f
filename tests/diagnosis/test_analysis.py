"""Structure joined with a map: costs per FLOP and bit, reasons from numbers, where error goes; maps made by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aqnfx.diagnosis.explain.analysis import Analysis, analyze
from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.errors import ArtifactError, InputError
from aqnfx.graph.program import Program
from aqnfx.graph.structure import BALANCE
from aqnfx.numerics.formats import parse_format
from aqnfx.passes.pipeline import Pipeline
from tests.graph.small import Stack, traced

HEAD, SOFTMAX, SCORES, DOWN = "head:linear:0", "blocks.0:softmax:0", "blocks.0:matmul:0", "blocks.1.down:linear:0"
NORM, ADD = "blocks.1.norm:rms_norm:0", "blocks.1:add:1"


@pytest.fixture(scope="module")
def program() -> Program:
    return traced(Stack(2), 3, 7, 8)


def record(program: Program, *, kind: str = "relative_gaussian", operands: bool = False, **changes: Any) -> dict[str, Any]:
    """A map in which every site costs 1e-6, but for what ``changes`` say (site id -> fields of its entry)."""
    sites = [s for s in (program.all_sites if operands else program.sites) if s.region != "position"]
    entries = [
        s.to_record() | {"predicted": {"0.1": {"kl": 1e-6, "ci": [5e-7, 2e-6]}}, "measured": {}} | changes.get(s.id, {})
        for s in sites
    ]
    return {
        "schema": "aqnfx.sensitivity/1", "model": {"parameters": program.source["parameters"], "dtype": "float32"},
        "task": {"metric": "kl", "samples": 4, "tokens": 40},
        "noise": {"kind": kind, "levels": [0.1], "base_level": 0.1, "seeds": [0], "unit_error": 1.0},
        "per_site": entries, "per_operator": {}, "per_layer": {}, "windows": [],
    }  # fmt: skip


def cost(kl: float, source: str = "measured", **more: Any) -> dict[str, Any]:
    return {source: {"0.1": {"kl": kl, "ci": [0.8 * kl, 1.2 * kl]}}} | more


def join(program: Program, found: dict[str, Any], **options: Any) -> Analysis:
    return analyze(program, SensitivityMap.from_record(found), **options)


def why(analysis: Analysis, site: str) -> dict[str, float | None]:
    """Reason -> number of a critical site."""
    entry = next(entry for entry in analysis.critical if entry["id"] == site)
    return {reason["reason"]: reason["number"] for reason in entry["reasons"]}


def test_without_a_map(program: Program):
    found = analyze(program, batch=5)
    assert (found.map, found.sites, found.critical, found.error_flow) == ({}, [], [], {})
    assert found.structure.inputs == {"x": (5, 7, 8)}
    assert found.structure.balance == BALANCE
    assert analyze(program).structure.inputs == {"x": (1, 7, 8)}  # what the trace has fixed stays
    assert found.to_record()["schema"] == "aqnfx.analysis/1"


def test_costs_per_flop_measured_before_predicted(program: Program):
    found = join(program, record(program, **{HEAD: cost(0.5), DOWN: cost(0.25, "predicted")}), batch=2)
    first, second = found.sites[:2]
    flops = 2 * 2 * 7 * 8 * 5
    assert (first["id"], first["kl"], first["source"], first["flops"]) == (HEAD, 0.5, "measured", flops)
    assert first["kl_per_gflop"] == pytest.approx(0.5 / flops * 1e9)
    assert (second["id"], second["source"], second["bits_saved"]) == (DOWN, "predicted", None)
    assert sum(entry["share"] for entry in found.sites) == pytest.approx(1)
    assert next(entry for entry in found.sites if entry["id"] == NORM)["kl_per_gflop"] is None
    assert any("--perturb" in note for note in found.notes)


def test_costs_per_bit_saved(program: Program):
    weight, value = f"{HEAD}:weight", f"{HEAD}:input"
    found = join(program, record(program, kind="int4:g8", operands=True, **{weight: cost(0.5), value: cost(0.2)}), batch=2)
    entries = {entry["id"]: entry for entry in found.sites}
    one = parse_format("int4:g8")
    assert entries[weight]["bits_saved"] == 5 * 8 * (32 - one.bits)
    assert entries[value]["bits_saved"] == 2 * 7 * 8 * (32 - one.bits)
    assert entries[weight]["kl_per_mbit"] == pytest.approx(0.5 / entries[weight]["bits_saved"] * 1e6)
    assert found.costs()[HEAD] == pytest.approx(0.5 + 0.2 + 1e-6)


def test_only_what_stands_out_is_critical(program: Program):
    wide = {"measured": {"0.1": {"kl": 0.5, "ci": [0.0, 2.0]}}}
    found = join(program, record(program, **{HEAD: cost(0.5), DOWN: wide}))
    assert [(entry["id"], entry["times_median"]) for entry in found.critical] == [(HEAD, pytest.approx(5e5))]
    nothing = join(program, record(program))
    assert nothing.critical == []
    assert any("No site stands out" in note for note in nothing.notes)
    assert len(join(program, record(program, **{HEAD: cost(0.5), DOWN: cost(0.5)}), top=1).critical) == 1


def statistics(**values: float) -> dict[str, Any]:
    return {"activations": values}


def test_reasons_and_their_numbers(program: Program):
    found = record(program, **{
        HEAD: cost(0.9), NORM: cost(0.8), ADD: cost(0.7) | statistics(rms=2.0), DOWN: cost(0.6) | statistics(rms=1.5),
        SOFTMAX: cost(0.5) | statistics(mean_magnitude=0.1, rms=0.25, max=1.0), "blocks.0.out:linear:0": cost(0.3),
        SCORES: cost(0.4) | statistics(rms=3.0, max=12.0), "blocks.1.gate:linear:0": cost(0.2) | statistics(rms=1.0, max=45.0),
        "blocks.1.qkv:linear:0": cost(0.1),
    })  # fmt: skip
    found["channels"] = {NORM: {"channels": 8, "top": [], "max_ratio": 60.0, "outlier_count": 2}}
    analysis = join(program, found, top=20)
    single = len([site for site in analysis.structure.sites if site.single_path])
    assert why(analysis, HEAD) == {"unprotected single path": single}
    assert why(analysis, ADD) == {"unprotected single path": single}
    assert why(analysis, NORM) == {"outlier channels": 60.0}
    assert why(analysis, "blocks.1.qkv:linear:0") == {"outlier channels": 60.0}  # the norm feeds it
    assert why(analysis, DOWN) == {"dominates the residual stream": 0.75}
    assert why(analysis, SOFTMAX) == {"concentrated softmax": pytest.approx(0.625)}
    assert why(analysis, SCORES) == {
        "concentrated softmax": pytest.approx(0.625), "exponentiated by a softmax": pytest.approx(0.3),
    }  # fmt: skip
    assert why(analysis, "blocks.1.gate:linear:0") == {"outlier values": 45.0}
    assert why(analysis, "blocks.0.out:linear:0") == {"no structural reason found": None}
    texts = [reason["text"] for entry in analysis.critical for reason in entry["reasons"] if reason["number"] is not None]
    assert all(any(char.isdigit() for char in text) for text in texts)


def test_below_the_thresholds_there_is_no_reason(program: Program):
    found = record(program, **{
        NORM: cost(0.8), DOWN: cost(0.6) | statistics(rms=0.9), ADD: statistics(rms=2.0),
        SOFTMAX: cost(0.5) | statistics(mean_magnitude=0.1, rms=0.2, max=1.0), SCORES: cost(0.4) | statistics(rms=0.9, max=25.0),
    })  # fmt: skip
    found["channels"] = {NORM: {"channels": 8, "top": [], "max_ratio": 9.9, "outlier_count": 0}}
    analysis = join(program, found, top=20)
    for site in (NORM, DOWN, SOFTMAX, SCORES):
        assert why(analysis, site) == {"no structural reason found": None}, site


class Scaled(nn.Module):
    """Scores that are scaled twice and shifted before their softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.shift = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.matmul(self.q(x), self.k(x).transpose(-1, -2))
        return torch.matmul(torch.softmax(scores * 0.5 / 4.0 + self.shift, -1), self.v(x))


def test_the_exponent_counts_the_scale():
    program = traced(Scaled(), 3, 7, 8)
    found = record(program, **{".:matmul:0": cost(0.5) | statistics(rms=16.0)})
    assert why(join(program, found), ".:matmul:0") == {"exponentiated by a softmax": pytest.approx(0.1 * 16 * 0.5 / 4)}


def test_where_error_enters_and_what_happens_to_it(program: Program):
    found = record(program, **{DOWN: cost(4e-5)})
    found["per_layer_kl"] = {"0": 1e-5, "1": 3e-5}
    found["per_layer_detail"] = {
        "0": {"levels": {"0.1": {"kl": 1e-5}}}, "1": {"levels": {"0.1": {"kl": 3e-5, "estimated": True}}},
    }  # fmt: skip
    additive = "not distinguishable from additive"
    windows = [(2.0, [1.5, 3.0], "amplified"), (0.5, [0.4, 0.9], "absorbed"), (1.2, [0.9, 1.5], additive)]
    found["windows"] = [
        {"layers": layers, "measured": 1e-4, "predicted": 1e-4, "amplification": a, "amplification_ci": ci}
        for layers, (a, ci, _) in zip(([0], [1], [0, 1]), windows, strict=True)
    ]  # fmt: skip
    flow = join(program, found).error_flow
    assert [window["verdict"] for window in flow["windows"]] == [verdict for *_, verdict in windows]
    first, second = flow["layers"]
    assert (first["share"], second["share"]) == (pytest.approx(0.25), pytest.approx(0.75))
    assert first["sites_kl"] == pytest.approx(13e-6)  # 13 sites of a block
    assert first["joint_over_sum"] == pytest.approx(10 / 13)
    assert second["joint_over_sum"] is None  # estimated from the same predictions: it would compare them with themselves
    branches = {branch["enters"]: branch["kl"] for branch in second["branches"]}
    # qkv, two products, softmax, norm, out; then gate, silu, up, glu and down; the additions themselves
    assert branches == {
        "blocks.1:add:0": pytest.approx(6e-6), "blocks.1:add:1": pytest.approx(4e-6 + 4e-5), "on the stream": pytest.approx(2e-6),
    }  # fmt: skip


def test_groups_add_up_their_weights(program: Program):
    found = record(program, operands=True, **{"blocks.0.up:linear:0:weight": cost(0.5)})
    groups = {group["name"]: group for group in join(program, found).groups}
    assert groups["blocks.0.{gate,up}"]["kl_sum"] == pytest.approx(0.5 + 1e-6)
    assert groups["blocks.0.{gate,up}"]["kl_of"] == "weights"
    outputs = {group["name"]: group for group in join(program, record(program)).groups}
    assert outputs["blocks.0.{gate,up}"]["kl_of"] == "outputs"


def test_an_expanded_attention_is_expanded_here_too():
    import aqnfx
    from tests.families import build

    fused = aqnfx.trace(build("llama", num_hidden_layers=1))
    expanded = Pipeline.parse('tag-layers,decompose-attention{where="ops:softmax"},tag-ops')(fused)
    found = join(fused, record(expanded))
    assert len(found.sites) == len([site for site in expanded.sites if site.region != "position"])
    fused_sites = {site.op for site in analyze(fused).structure.sites}
    assert "sdpa" in fused_sites
    assert "softmax" not in {site.op for site in analyze(fused).structure.sites if site.layer is not None}


def broken(program: Program, path: str, value: Any) -> dict[str, Any]:
    found = copy.deepcopy(record(program, **{HEAD: cost(0.5) | statistics(rms=1.0)}))
    found["channels"] = {NORM: {"channels": 8, "top": [], "max_ratio": 60.0}}
    target: Any = found
    *keys, last = path.split("/")
    for key in keys:
        target = target[int(key) if isinstance(target, list) else key]
    target[int(last) if isinstance(target, list) else last] = value
    return found


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("per_site/0/id", "lm_head:linear:0", "another model: this one has no site 'lm_head:linear:0'"),
        ("model/parameters", 7, "another model: of 7 parameters"),
        ("model/digest", "0" * 64, "other weights"),
        ("per_site/0/predicted/0.1/kl", "much", "kl must be a number, found 'much'"),
        ("per_site/0/predicted/0.1/kl", True, "kl must be a number"),
        ("per_site/0/predicted/0.1/ci", [1], r"ci must be \[low, high\]"),
        ("per_site/0/predicted/0.1/ci", ["a", 1.0], "ci must be a number"),
        ("per_site/0/activations", {"rms": "big"}, "activations of 'inp:linear:0': rms"),
        ("per_site/0/activations", [1, 2], "activations of 'inp:linear:0'"),
        (f"channels/{NORM}/max_ratio", "large", "max_ratio"),
        ("noise/unit_error", -1, "unit_error: Input should be greater than 0"),
        ("noise/kind", "int99", "int99"),
    ],
)
def test_maps_that_do_not_fit(program: Program, path: str, value: Any, message: str):
    with pytest.raises((ArtifactError, InputError), match=message) as raised:
        join(program, broken(program, path, value))
    assert "\n" not in str(raised.value)


def test_top_must_be_positive(program: Program):
    with pytest.raises(InputError, match="top 0 must be at least 1"):
        analyze(program, top=0)
