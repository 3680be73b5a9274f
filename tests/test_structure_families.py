"""The static structure of tiny models of many families: FLOPs, bytes and coupling groups."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import aqnfx
from aqnfx.graph.coupling import coupling_groups
from aqnfx.graph.program import Program
from aqnfx.graph.structure import structure
from tests.families import FAMILIES, build, depth, inputs

BLOCKS = 2
SHARED, TIED, EXPERTS = "shared input", "tied weight", "experts of one router"


@functools.cache
def traced(name: str) -> tuple[nn.Module, Program]:
    """Return (model, tagged program) of a family."""
    model = build(name, **depth(name, BLOCKS), **({"tie_word_embeddings": True} if name == "qwen2" else {}))
    return model, aqnfx.Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(model))


@pytest.fixture(scope="module", autouse=True)
def _forget_models() -> Iterator[None]:
    yield
    traced.cache_clear()


# Per family: what stands once, what stands in every layer ({}).
COUPLED: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "qwen2": (
        {"{model.embed_tokens,lm_head}": TIED},
        {"model.layers.%d.self_attn.{q_proj,k_proj,v_proj}": SHARED, "model.layers.%d.mlp.{gate_proj,up_proj}": SHARED},
    ),
    "gpt2": ({"{transformer.wte,lm_head}": TIED}, {}),  # fused qkv
    "phi3": ({}, {}),  # fused qkv, fused gate and up
    "mixtral": (
        {}, {"model.layers.%d.self_attn.{q_proj,k_proj,v_proj}": SHARED, "model.layers.%d.mlp.experts": EXPERTS},
    ),
    "t5": (
        {"{encoder.embed_tokens,decoder.embed_tokens,lm_head}": TIED},
        {
            "encoder.block.%d.layer.0.SelfAttention.{q,k,v}": SHARED, "decoder.block.%d.layer.0.SelfAttention.{q,k,v}": SHARED,
            "decoder.block.%d.layer.1.EncDecAttention.{k,v}": SHARED,
        },
    ),
    "falcon": ({"{transformer.word_embeddings,lm_head}": TIED}, {}),  # mlp beside a fused attention
    "gptj": ({}, {"transformer.h.%d.attn.{q_proj,k_proj,v_proj}": SHARED}),  # mlp beside a separate one
}  # fmt: skip


@pytest.mark.parametrize("name", COUPLED)
def test_coupling_groups(name):
    _, program = traced(name)
    once, each = COUPLED[name]
    found = coupling_groups(program)
    expected = once | {text % layer: reason for text, reason in each.items() for layer in range(BLOCKS)}
    assert {group.name: group.reason for group in found} == expected
    order = list(program.places)
    for group in found:
        assert list(group.sites) == sorted(group.sites, key=order.index)
        assert all(site.endswith(":weight") for site in group.sites)


BATCH, LENGTH = 2, 20
COUNTED = ["qwen2", "gpt2", "phi3", "mixtral", "t5", "falcon", "gptj", "mamba", "bert", "vit"]


@pytest.mark.parametrize("name", COUNTED)
def test_flops_are_those_of_the_flop_counter(name):
    model, program = traced(name)
    length = LENGTH if FAMILIES[name].any_length else 13
    batch = 3 if name == "t5" else BATCH
    if name == "t5":  # as traced: encoder and decoder see different lengths
        found = structure(program)
        defaults = [value for value in program.signature.defaults if isinstance(value, torch.Tensor)]
        arguments: dict[str, Any] = dict(zip(program.signature.tensor_names, defaults, strict=True))
    else:
        found = structure(program, batch=batch, tokens=None if name == "vit" else length)
        arguments = inputs(name, batch, length)
    config: Any = model.config
    if name == "mixtral":
        config._experts_implementation = "eager"  # the counter does not look into the operator of all experts
    # It does not know the fused attention of the CPU either, but the products that it stands for.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**arguments)
    assert found.flops == counter.get_total_flops()
    assert found.inputs[program.signature.tensor_names[0]][0] == batch


@pytest.mark.parametrize("name", COUNTED)
def test_parameter_bytes_are_those_of_the_checkpoint(name, tmp_path: Path):
    model, program = traced(name)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118  (no mapping)
    found = structure(program)
    assert found.parameter_bytes == sum(tensor.nbytes for tensor in tensors)
    assert found.parameters == sum(tensor.numel() for tensor in tensors)
    tied = sum(site.parameter_bytes for site in found.sites) > found.parameter_bytes
    assert tied == any(group.reason == TIED for group in found.groups)


@pytest.mark.parametrize("name", COUNTED)
def test_every_block_writes_to_the_residual_stream(name):
    _, program = traced(name)
    found = structure(program)
    adds = [site for site in found.sites if site.residual == "stream" and site.op == "add"]
    per_block = {"falcon": 1, "gptj": 1, "mamba": 1}.get(name, 2)  # attention and mlp are added up first, or are one
    expected = BLOCKS * (2 + 3 if name == "t5" else per_block)
    assert len(adds) - (adds[0].layer is None) == expected  # bert and gpt2 add embeddings before
    assert all(site.reaches_output for site in found.sites if site.parameters)
    if name != "t5":  # whose encoder is one of two ways to the output
        assert all(add.single_path for add in adds)
    for site in found.sites:
        if site.residual in ("read", "inside", "write"):
            assert site.merges_at in {add.id for add in adds}
            assert not site.single_path


def test_bytes_of_what_is_read_in_part():
    _, program = traced("qwen2")
    positions, size = BATCH * LENGTH, 4
    found = structure(program, batch=BATCH, tokens=LENGTH)
    table = found.site("model.embed_tokens:embedding:0")
    assert table.bytes_read == positions * (32 * size + 8)  # the rows that are looked up, and the ids
    rotary = found.site("model.layers.0.self_attn:rotary:0")
    assert rotary.bytes_read == (positions * 32 + 2 * LENGTH * 8) * size  # the queries once, cosines and sines
    _, program = traced("mixtral")
    experts = "model.layers.0.mlp.experts:grouped_mm:0"
    one, many = (structure(program, batch=1, tokens=tokens).site(experts) for tokens in (1, 20))
    weight = many.parameter_bytes
    assert weight == 4 * 32 * 128 * size
    assert weight // 2 < one.bytes_read < weight < many.bytes_read  # two of four experts for one token
