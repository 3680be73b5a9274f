"""Every pass under its contract; pipelines, the registry, and what each pass does to a graph."""

from __future__ import annotations

import importlib.metadata
import json
import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import aqnfx
from aqnfx.errors import PassError, SelectorError
from aqnfx.graph.controls import site_key
from aqnfx.graph.opkinds import OpKind, op_kind
from aqnfx.graph.program import Program
from aqnfx.graph.tags import get_tag
from aqnfx.numerics.noise import NoiseKind
from aqnfx.passes.base import Pass
from aqnfx.passes.insert_noise import InsertNoise
from aqnfx.passes.lower_ops import LowerOps
from aqnfx.passes.pipeline import Pipeline
from aqnfx.passes.registry import BUILTIN, available, pass_class
from aqnfx.passes.tag_ops import TagOps
from tests.families import build, inputs
from tests.graph.small import Stack, Tiny, generator, stack, traced
from tests.passes.checks import check_pass

X = torch.randn(2, 7, 8, generator=generator(5))


# The contract --------------------------------------------------------------------------------------------------------

SPECS = [
    ("", "normalize"), ("", "tag-layers"), ("tag-layers", "tag-ops"), ("tag-layers,tag-ops", "tag-ops"),
    ("tag-layers", "decompose-attention"), ("tag-layers,tag-ops", "insert-noise"),
    ("tag-layers,tag-ops", 'insert-noise{where="layers:0-1,ops:all" level=0.25 seed=3 phases=both kind=uniform}'),
    ("tag-layers,tag-ops", 'insert-noise{where="ops:linear" channel_dim=0}'),
    ("tag-layers,tag-ops,insert-noise", 'insert-noise{where="ops:softmax"}'),
    ("tag-layers,tag-ops,insert-noise", "strip"), ("tag-layers", "strip"),
    ("tag-layers,tag-ops,insert-noise", "lower-ops"),
    ("tag-layers,tag-ops", 'insert-score{where="ops:linear" samples=3 weights=true perturb=bias}'),
    ("tag-layers,tag-ops", 'insert-capture{where="ops:linear"}'),
    ("tag-layers,tag-ops", 'insert-fake-quant{where="ops:all,roles:auto" format=mxfp4 gradient=fp8_e5m2}'),
    ("tag-layers,tag-ops", "insert-fake-quant{format=int4:g8 controls=true}"),
    ("tag-layers,tag-ops", 'insert-noise{where="ops:linear,roles:weight" level=0.1}'),
    ("tag-layers,tag-ops,insert-fake-quant", "lower-ops"),
    ("tag-layers,tag-ops", 'insert-accumulation{where="ops:core" element=fp16 every=4 controls=true}'),
    ("tag-layers,tag-ops,insert-accumulation", "lower-ops"),
    ("tag-layers,tag-ops", 'insert-scan{where="ops:core,roles:input|key" formats=mxfp4|int8:channel|int8:tensor}'),
    ("tag-layers,tag-ops", 'shift-ordinals{starts="blocks.0:add:2|blocks.1.up:linear:1"}'),
    ("", "tag-layers{stacks=blocks}"),
    ("tag-layers,tag-ops", "apply-plan{gradient=fp8_e5m2 controls=true}"), ("tag-layers,tag-ops", "apply-plan"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "spec"), SPECS)
def test_contract(before, spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assignments = {"blocks.0.up": {"weight": "int4:g8", "input": None}, "blocks.1.up": {"weight": "mxfp4", "input": "int8"}}
    (tmp_path / "plan.json").write_text(json.dumps({"schema": "aqnfx.plan/1", "assignments": assignments}))
    program = traced(Stack(2), 3, 7, 8, tags=False)
    if before:
        program = Pipeline.parse(before)(program)
    (step,) = Pipeline.parse(spec).passes
    check_pass(step, program, X)


def test_contract_of_decompose_attention_on_a_model():
    program = Pipeline.parse("tag-layers")(aqnfx.trace(build("llama")))
    (step,) = Pipeline.parse("decompose-attention").passes
    result = check_pass(step, program, **inputs("llama", 2, 9))
    assert result.history[-1].op_diff["aten.scaled_dot_product_attention"] == -3
    assert result.history[-1].op_diff["aten.matmul"] == 6


def test_every_pass_has_a_contract_test():
    elsewhere = {"partition-blocks"}  # tests/passes/test_partition_blocks.py
    assert {spec.split("{")[0] for _, spec in SPECS} == set(BUILTIN) - elsewhere


def test_tag_passes_and_normalize_do_not_change_the_graph():
    program = traced(Stack(2), 3, 7, 8, tags=False)
    result = Pipeline.parse("normalize,tag-layers,tag-ops,normalize")(program)
    assert [step.modified for step in result.history] == [False] * 4
    assert result.fingerprint == program.original
    assert result.pipeline == "normalize,tag-layers,tag-ops,normalize"


def test_a_pass_that_breaks_the_graph_is_reported():
    class BreakGraph(Pass):
        name = "break-graph"

        def run(self, program: Program) -> None:
            node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.silu.default)
            node.args = (next(reversed(program.graph.nodes)).prev,)

    with pytest.raises(aqnfx.AqnfxError, match="break-graph: the graph is malformed"):
        BreakGraph()(stack())


# Pipelines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("tag-layers", "tag-layers"),
        (" tag-layers , tag-ops ", "tag-layers,tag-ops"),
        ("insert-noise{level=0.05 where='layers:0-4,ops:linear'}", 'insert-noise{where="layers:0-4,ops:linear" level=0.05}'),
        ('insert-noise{where="ops:core"}', "insert-noise"),  # the default
        ("insert-noise{allow_empty=true compiled=false}", "insert-noise{allow_empty=true}"),
        ("insert-noise{level=1 seed=-4}", "insert-noise{level=1.0 seed=-4}"),
        ("insert-noise{level=1e-3}", "insert-noise{level=0.001}"),
    ],
)
def test_pipeline_text(text, canonical):
    pipeline = Pipeline.parse(text)
    assert str(pipeline) == canonical
    assert Pipeline.parse(canonical) == pipeline


@given(
    where=st.text(st.characters(codec="ascii", exclude_characters='"{}', exclude_categories=("Cc",)), max_size=20),
    level=st.floats(0, 10), seed=st.integers(-(2**40), 2**40), kind=st.sampled_from(list(NoiseKind)),
    phases=st.sampled_from(["forward", "backward", "both"]), compiled=st.booleans(),
)  # fmt: skip
def test_pipeline_text_round_trips(where, level, seed, kind, phases, compiled):
    step = InsertNoise(where=where, level=level, seed=seed, kind=str(kind), phases=phases, compiled=compiled)
    assert Pipeline.parse(f"tag-ops,{step.spec()},strip").passes[1] == step


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the pipeline is empty"),
        ("tag-layer", "unknown pass 'tag-layer'; known: .*did you mean 'tag-layers'"),
        ("tag-layers,,tag-ops", "pipeline part '' is not NAME"),
        ("insert-noise{", "a brace is not closed"),
        ("insert-noise}", "unbalanced brace at position 12"),
        ("insert-noise{{}}", "unbalanced brace"),
        ("insert-noise{level}", "cannot read option 'level'; write key=value"),
        ("insert-noise{levle=1}", "insert-noise has no option 'levle'; it has where, level"),
        ("tag-ops{x=1}", "tag-ops has no option 'x'; it has none"),
        ("insert-noise{level=1 level=2}", "option 'level' is given twice"),
        ("insert-noise{level=loud}", "level=loud must be float"),
        ("insert-noise{seed=1.5x}", "seed=1.5x must be int"),
        ("insert-noise{compiled=yes}", "compiled=yes must be true or false"),
        ("insert noise", "'insert noise' is not NAME"),
    ],
)
def test_pipeline_errors(text, message):
    with pytest.raises(PassError, match=message):
        Pipeline.parse(text)


def test_a_quote_cannot_be_written():
    with pytest.raises(PassError, match="contains a quote"):
        InsertNoise(where='a"b').spec()


# The registry --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILTIN)
def test_names_match_classes_and_files(name):
    cls = pass_class(name)
    assert cls.name == name
    assert cls.__name__ == "".join(part.title() for part in name.split("-"))
    assert cls.__module__ == "aqnfx.passes." + name.replace("-", "_")
    assert set(cls.needs) <= set(BUILTIN)
    assert cls.__doc__
    assert cls.__dataclass_params__.frozen


def test_every_pass_file_is_registered(repo_root):
    helpers = {"__init__", "base", "pipeline", "registry"}
    files = {path.stem for path in (repo_root / "passes").glob("*.py")} - helpers
    defined = {file for file in files if "(Pass):" in (repo_root / "passes" / f"{file}.py").read_text()}
    assert defined == {name.replace("-", "_") for name in BUILTIN}


def entry_points(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    entry = importlib.metadata.EntryPoint(name=name, value=value, group="aqnfx.passes")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [entry] if group == entry.group else [])


def test_third_party_passes(monkeypatch):
    entry_points(monkeypatch, "my-pass", "aqnfx.passes.strip:Strip")
    assert available()["my-pass"] == "aqnfx.passes.strip:Strip"
    assert pass_class("my-pass").__name__ == "Strip"


def test_duplicate_names_are_refused(monkeypatch):
    entry_points(monkeypatch, "strip", "other.module:Strip")
    with pytest.raises(PassError, match=r"pass 'strip' is defined twice: aqnfx.passes.strip:Strip and other.module:Strip"):
        pass_class("tag-ops")


def test_an_entry_that_is_no_pass_is_refused(monkeypatch):
    entry_points(monkeypatch, "odd", "pathlib:Path")
    with pytest.raises(PassError, match="pathlib:Path is not a Pass"):
        pass_class("odd")


# Orders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("tag-ops", PassError, r"tag-ops needs tag-layers to have run before it; history: \(none\)"),
        ("insert-noise", PassError, "insert-noise needs tag-layers, tag-ops"),
        ("decompose-attention", PassError, "decompose-attention needs tag-layers"),
        ("tag-layers,tag-ops,lower-ops", PassError, "found no aqnfx operations; run insert-noise or insert-fake-quant first"),
        ("tag-layers,tag-ops,insert-noise,lower-ops,strip", PassError, "lower-ops has expanded the inserted nodes"),
        ("tag-layers,tag-ops,insert-noise,lower-ops,insert-noise", PassError, "insert before lowering"),
        ("tag-layers,tag-ops,insert-noise,insert-noise", PassError, "inp:linear:0 has controls already; strip first"),
        ("tag-layers,tag-ops,insert-noise{kind=pink}", PassError, "kind 'pink' is not one of relative_gaussian"),
        ("tag-layers,tag-ops,insert-noise{phases=up}", PassError, "phases 'up' is not one of forward"),
        ("tag-layers,tag-ops,insert-noise{level=-1}", PassError, "level -1.0 must be finite and not negative"),
        ("tag-layers,tag-ops,insert-noise{channel_dim=3}", PassError, "channel_dim 3 does not exist at inp:linear:0"),
        ("tag-layers,tag-ops,insert-noise{where=ops:gelu}", SelectorError, "'ops:gelu' matched 0 of 41 sites"),
        ("tag-layers,tag-ops,insert-noise{where=layers:9}", SelectorError, "the model has layers 0-2"),
    ],
)  # fmt: skip
def test_illegal_orders_and_options(text, error, message):
    with pytest.raises(error, match=message):
        Pipeline.parse(text)(traced(Stack(3), 3, 7, 8, tags=False))


def test_an_empty_selection_can_be_allowed():
    program = stack()
    result = Pipeline.parse("insert-noise{where=ops:gelu allow_empty=true}")(program)
    assert not result.history[-1].modified


# insert-noise --------------------------------------------------------------------------------------------------------


def test_insert_noise_golden():
    program = traced(Tiny(), 3, 4)
    noisy = Pipeline.parse('insert-noise{where="modules:up"}')(program)
    assert noisy.history[-1].op_diff == {"aqnfx.count": 1, "aqnfx.noise": 1, "aten.sym_size.int": 1}
    lines = noisy.render(tags=True).splitlines()
    assert lines[2:5] == [
        "%2 = aten.linear(%x, @up.weight, @up.bias)  # up:linear:0",
        "%3 = aqnfx.noise(%2, @aqnfx_noise_up_linear_0_1c35_level, @aqnfx_noise_up_linear_0_1c35_key, @aqnfx_noise_run, "
        "@aqnfx_noise_up_linear_0_1c35_channels, @aqnfx_columns_6, %1, 'relative_gaussian', -1)  # insert-noise at up:linear:0",
        "%4 = aqnfx.count(@aqnfx_noise_up_linear_0_1c35_level, @aqnfx_noise_up_linear_0_1c35_hits)"
        "  # insert-noise at up:linear:0",
    ]


def test_insert_noise_counts():
    noisy = Pipeline.parse('insert-noise{where="ops:all"}')(stack())
    assert noisy.history[-1].op_diff == {"aqnfx.count": 41, "aqnfx.noise": 41, "aten.sym_size.int": 1}
    assert [site.id for site in noisy.sites] == list(noisy.controls.sites)


def test_site_keys_are_stable_and_distinct():
    assert site_key("model.layers.3.self_attn.k_proj:linear:0") == SITE_KEY
    keys = {site_key(f"model.layers.{layer}.{m}:linear:{n}") for layer in range(200) for m in "qkvogud" for n in range(4)}
    assert len(keys) == 200 * 7 * 4


SITE_KEY = 1505551061


# tag-ops -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, {"rms_norm": 7, "rotary": 6, "silu": 3, "glu": 3, "linear": 22, "sdpa": 3, "add": 6, "embedding": 1}),
        ("gemma2", {}, {"rms_norm": 13, "rotary": 6, "gelu": 3, "glu": 3, "linear": 22, "softmax": 3, "matmul": 6}),
        ("gpt2", {}, {"layer_norm": 7, "gelu": 3, "linear": 13, "sdpa": 3, "embedding": 2}),
        ("gpt2", {"activation_function": "gelu"}, {"layer_norm": 7, "gelu": 3, "linear": 13}),
        ("gpt2", {"activation_function": "gelu_pytorch_tanh"}, {"layer_norm": 7, "gelu": 3, "linear": 13}),
    ],
)  # fmt: skip
def test_composites(family, changes, expected):
    program = Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(build(family, **changes)))
    counts = {kind: sum(str(site.op) == kind for site in program.sites) for kind in expected}
    assert counts == expected
    for site in program.sites:
        if site.op in (OpKind.RMS_NORM, OpKind.GELU, OpKind.GLU, OpKind.LAYER_NORM, OpKind.SILU):
            assert site.ordinal == 0, site.id


def test_tag_ops_is_idempotent():
    once = stack()
    assert TagOps()(once).render(tags=True) == once.render(tags=True)


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        (torch.nn.functional.linear, OpKind.LINEAR), (torch._C._nn.linear, OpKind.LINEAR), (torch.matmul, OpKind.MATMUL),
        (operator.matmul, OpKind.MATMUL), ("matmul", OpKind.MATMUL), (torch.bmm, OpKind.BMM), ("bmm", OpKind.BMM),
        (torch.nn.functional.scaled_dot_product_attention, OpKind.SDPA), (torch.softmax, OpKind.SOFTMAX),
        (torch.nn.functional.softmax, OpKind.SOFTMAX), ("softmax", OpKind.SOFTMAX),
        (torch.nn.functional.layer_norm, OpKind.LAYER_NORM), (torch.nn.functional.rms_norm, OpKind.RMS_NORM),
        (torch.nn.functional.silu, OpKind.SILU), (torch.nn.functional.gelu, OpKind.GELU), (torch.relu, OpKind.RELU),
        (torch.nn.functional.relu, OpKind.RELU), ("relu_", OpKind.RELU), (torch.nn.functional.embedding, OpKind.EMBEDDING),
        (operator.add, OpKind.ADD), (operator.iadd, OpKind.ADD), (operator.sub, OpKind.ADD), ("add_", OpKind.ADD),
        (torch.add, OpKind.ADD), (operator.mul, OpKind.MUL), (operator.truediv, OpKind.MUL), (torch.mul, OpKind.MUL),
        ("__mul__", OpKind.MUL), (torch.conv1d, OpKind.CONV), (torch.nn.functional.conv2d, OpKind.CONV),
        (torch.ops.aten.addmm.default, OpKind.LINEAR), (torch.ops.aten.mm, OpKind.MATMUL),
        (torch.ops.aten._softmax.default, OpKind.SOFTMAX), (torch.ops.aten.add_.Tensor, OpKind.ADD),
        (torch.ops.aten.cos.default, OpKind.OTHER), (torch.cos, OpKind.OTHER), (operator.neg, OpKind.OTHER),
        (operator.getitem, None), (torch.cat, None), ("view", None), ("transpose", None), (torch.ops.aten.view.default, None),
        (torch.nn.functional.dropout, None), ("to", None), (3, None),
    ],
    ids=lambda value: str(value).partition(" at 0x")[0],  # without addresses: parallel workers must agree on names
)  # fmt: skip
def test_kinds_of_targets(target, kind):
    assert op_kind(target) is kind


# lower-ops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(NoiseKind))
def test_lowered_program_gives_the_same_numbers(kind):
    noisy = Pipeline.parse(f'insert-noise{{where="ops:all" kind={kind}}}')(stack(1))
    lowered = LowerOps()(noisy)
    assert "aqnfx" not in {name.split(".")[0] for name in lowered.history[-1].op_diff if lowered.history[-1].op_diff[name] > 0}
    assert "aqnfx.noise" not in lowered.render()
    for batch in (2, 5):  # the batch is dynamic
        x = torch.randn(batch, 7, 8, generator=generator(batch))
        assert torch.equal(lowered(x), noisy(x))
        for program in (noisy, lowered):
            for name, buffer in program.module.named_buffers():
                if name.endswith("_level"):
                    buffer[0] = 0.05
                if name.endswith("noise_run"):
                    buffer[0] = batch
        assert not torch.equal(noisy(x), Pipeline.parse("strip")(noisy)(x))
        torch.testing.assert_close(lowered(x), noisy(x), rtol=1e-6, atol=1e-6)
        for program in (noisy, lowered):
            for name, buffer in program.module.named_buffers():
                if name.endswith("_level"):
                    buffer.zero_()


def test_lowered_programs_keep_their_counters():
    noisy = Pipeline.parse("insert-noise{level=0.1}")(stack(1))
    lowered = LowerOps()(noisy)
    lowered(X)
    lowered(X)
    hits = {name: int(b) for name, b in lowered.module.named_buffers() if name.endswith("_hits")}
    assert len(hits) == 9
    assert set(hits.values()) == {2}


# Selectivity ---------------------------------------------------------------------------------------------------------


def test_inserted_nodes_carry_layer_and_site():
    noisy = Pipeline.parse('insert-noise{where="layers:1"}')(stack())
    inserted = [n for n in noisy.graph.nodes if get_tag(n).site]
    assert inserted
    for node in inserted:
        if node.op == "call_function":
            assert get_tag(node).layer == 1
            assert get_tag(node).inserted_by == "insert-noise"


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.matmul(x, y)


def test_matmul_of_inputs_is_a_matmul():
    program = aqnfx.trace(TwoInputs(), ((torch.randn(2, 3, 4), torch.randn(2, 4, 5)), {}))
    (site,) = Pipeline.parse("tag-layers,tag-ops")(program).sites
    assert (site.op, site.id) == (OpKind.MATMUL, ".:matmul:0")
