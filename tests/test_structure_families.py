"""The static structure of tiny models of many families: coupling groups."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
from torch import nn

import aqnfx
from aqnfx.graph.coupling import coupling_groups
from aqnfx.graph.program import Program
from tests.families import build

SHARED, TIED, EXPERTS = "shared input", "tied weight", "experts of one router"


@functools.cache
def traced(name: str) -> tuple[nn.Module, Program]:
    """Return (model, tagged program) of a family."""
    model = build(name, **({"tie_word_embeddings": True} if name == "qwen2" else {}))
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
    expected = once | {text % layer: reason for text, reason in each.items() for layer in range(3)}
    assert {group.name: group.reason for group in found} == expected
    order = list(program.places)
    for group in found:
        assert list(group.sites) == sorted(group.sites, key=order.index)
        assert all(site.endswith(":weight") for site in group.sites)
