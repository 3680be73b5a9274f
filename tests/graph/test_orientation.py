"""Along what products sum is read from the model's own class and from what transformers turns round as it loads."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from aqnfx.graph.orientation import Layout, layouts, layouts_of
from tests.families import FAMILIES, depth

SMALL: dict[str, Any] = {**FAMILIES["llama"].options, "head_dim": 8, "num_hidden_layers": 1, "num_local_experts": 4}


def meta(kind: str, options: dict[str, Any], auto: str = "AutoModelForCausalLM") -> Any:
    config = transformers.AutoConfig.for_model(kind, **options)
    with torch.device("meta"):
        return getattr(transformers, auto).from_config(config)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.named_parameters() if value.dim() > 1}


@pytest.mark.parametrize(("kind", "top"), [("gpt_oss", 2), ("llama4_text", 1)])
def test_experts_that_are_stored_as_in_out(kind: str, top: int) -> None:
    """Those of Llama 4 declare nothing: what they do with their weights tells."""
    model = meta(kind, {**SMALL, "num_experts_per_tok": top, "intermediate_size_mlp": 64})
    found, unknown = layouts(model, shapes(model))
    assert {key.rpartition(".")[2]: layout for key, layout in found.items()} == {
        "gate_up_proj": Layout(stack=4, rows=128, width=32), "down_proj": Layout(stack=4, rows=32, width=64),
    }  # fmt: skip
    assert not unknown


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3_moe", "t5", "bert", "bloom", "mamba"])
def test_everything_else_is_out_in(kind: str) -> None:
    family = FAMILIES[kind]
    model = meta(kind, {**family.options, **depth(kind, 1)}, family.auto)
    assert layouts(model, shapes(model)) == ({}, ())


def test_stacks_of_which_only_one_is_turned() -> None:
    """A square matrix tells nothing by its shape, and a weight may hold the matrices of all experts one below the other."""
    ffn = {"ffn_hidden_size": 64, "moe_num_experts": 2, "moe_top_k": 1, "hidden_size": 64}
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}
    sizes = {"d_model": 64, "n_heads": 2, "n_layers": 1, "max_seq_len": 32, "vocab_size": 50}
    model = meta("dbrx", {**sizes, "attn_config": attention, "ffn_config": ffn})
    found, _ = layouts(model, shapes(model))
    assert {key.rpartition(".")[2]: layout for key, layout in found.items()} == {"w2": Layout(stack=2, rows=64, width=64)}


def test_what_transformers_turns_round_as_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    conversion_mapping = importlib.import_module("transformers.conversion_mapping")
    from transformers.core_model_loading import Transpose, WeightConverter

    monkeypatch.setattr(conversion_mapping, "USER_REGISTERED_MAPPINGS", set())
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", {"legacy": []})
    model = meta("mixtral", {**FAMILIES["mixtral"].options, "num_hidden_layers": 1})
    stored = {"model.layers.0.mlp.experts.down_proj": (4, 64, 32), "model.layers.0.mlp.experts.gate_up_proj": (4, 128, 32)}
    assert layouts(model, stored) == ({}, ())
    turn = [  # gate_up_proj has the shape of the model already
        WeightConverter(source_patterns=f"experts.{name}", target_patterns=f"experts.{name}", operations=[Transpose(1, 2, check)])
        for name, check in (("down_proj", False), ("gate_up_proj", True))
    ]
    conversion_mapping.register_checkpoint_conversion_mapping("mixtral", turn, overwrite=True)
    found, _ = layouts(model, stored)
    assert found == {"model.layers.0.mlp.experts.down_proj": Layout(stack=4, rows=32, width=64)}


def test_what_nobody_says_is_noted(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("llama", **{**SMALL, "architectures": ["LlamaForCausalLM"]})
    config.save_pretrained(tmp_path)
    found, note = layouts_of(tmp_path, {"module.model.layers.0.mlp.up_proj.weight": (64, 32)})
    assert not found
    assert "1 weights are taken as (out, in), since LlamaForCausalLM does not say: module.model" in note
    (tmp_path / "config.json").write_text('{"model_type": "house"}')
    found, note = layouts_of(tmp_path, {"a": (2, 2)})
    assert not found
    assert "cannot be built" in note
