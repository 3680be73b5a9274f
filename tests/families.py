"""Tiny random models of many architecture families, and inputs for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 99
BLOCKS = 3

_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, **_IDS,
}  # fmt: skip
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 128, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_MOE: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to build one family: its config options, the auto class, and the names of its block lists."""

    options: dict[str, Any]
    stacks: tuple[str, ...] = ("model.layers",)
    auto: str = "AutoModelForCausalLM"
    any_length: bool = True  # False: the sequence length is fixed by tracing


FAMILIES: dict[str, Family] = {
    "llama": Family(options=_LLAMA),
    "qwen2": Family(options=_LLAMA),
    "qwen3": Family(options={**_LLAMA, "head_dim": 8}),
    "mistral": Family(options={**_LLAMA, "sliding_window": 8}),
    "gemma2": Family(options={**_LLAMA, "head_dim": 8, "sliding_window": 8}),
    "gemma3_text": Family(options={**_LLAMA, "head_dim": 8, "sliding_window": 8}),
    "phi3": Family(options=_LLAMA),
    "gpt2": Family(options=_GPT2, stacks=("transformer.h",)),
    "gpt_neox": Family(options=_LLAMA, stacks=("gpt_neox.layers",)),
    "opt": Family(options={**_LLAMA, "ffn_dim": 64, "word_embed_proj_dim": 32}, stacks=("model.decoder.layers",)),
    "falcon": Family(options=_LLAMA, stacks=("transformer.h",)),
    "bloom": Family(
        options={"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": BLOCKS, "n_head": 4, **_IDS},
        stacks=("transformer.h",),
    ),
    "mixtral": Family(options={**_LLAMA, "num_local_experts": 4}),
    "qwen3_moe": Family(
        options={**_LLAMA, **_MOE, "head_dim": 8, "num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": []}
    ),
    "olmo2": Family(options=_LLAMA),
    "starcoder2": Family(options=_LLAMA),
    "mamba": Family(
        options={"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": BLOCKS, "state_size": 8, **_IDS},
        stacks=("backbone.layers",),
        any_length=False,
    ),
    "bert": Family(options=_LLAMA, stacks=("bert.encoder.layer",), auto="AutoModelForMaskedLM"),
    "roberta": Family(options=_LLAMA, stacks=("roberta.encoder.layer",), auto="AutoModelForMaskedLM"),
    "t5": Family(
        options={
            "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": BLOCKS, "num_heads": 4,
            "decoder_start_token_id": 0, **_IDS,
        },
        stacks=("encoder.block", "decoder.block"),
        auto="AutoModelForSeq2SeqLM",
    ),
    "vit": Family(
        options={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": BLOCKS, "num_attention_heads": 4,
            "image_size": 16, "patch_size": 4, "num_labels": 5,
        },
        stacks=("vit.layers",),
        auto="AutoModelForImageClassification",
    ),
    "stablelm": Family(options=_LLAMA),
    "gptj": Family(options={**_GPT2, "rotary_dim": 4}, stacks=("transformer.h",)),
    "olmo": Family(options=_LLAMA),
    "cohere": Family(options=_LLAMA),
    "granite": Family(options=_LLAMA),
}  # fmt: skip

QUICK = ("llama", "gpt2", "mixtral")
"""A test that is for several families, one of these among them, is slow for all others (``tests/conftest.py``)."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A tiny configuration that is only traced and compared: its model type, its options, and for which lengths a trace holds.

    ``holds``: None for every length; else (the length traced, lengths that the trace holds for, lengths that it refuses).
    """

    kind: str
    options: dict[str, Any]
    holds: tuple[int, tuple[int, ...], tuple[int, ...]] | None = None
    auto: str = "AutoModelForCausalLM"


_TWO: dict[str, Any] = {**_LLAMA, "num_hidden_layers": 2}
_MIXED: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, **_MIXED,
}  # fmt: skip
_SSM: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
_CHUNKS = (20, (17, 19, 31, 45), (5, 12, 16))  # two chunks of 16 are traced, and any number from two on holds
_ROWS = (70, (66, 100), (9, 63, 140))  # a loop over chunks of 64: two chunks are two chunks
_SHARED: dict[str, Any] = {**_MOE, "shared_expert_intermediate_size": 16}

TRIED: dict[str, Tried] = {
    "phi3 with LongRoPE": Tried(
        kind="phi3",
        options={
            **_TWO, "original_max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        },
    ),
    "qwen2_moe": Tried(
        kind="qwen2_moe", options={**_TWO, **_SHARED, "num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": []}
    ),
    "gpt_oss": Tried(
        kind="gpt_oss",
        options={**_TWO, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "deepseek_v3": Tried(
        kind="deepseek_v3",
        options={
            **_TWO, **_MOE, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "q_lora_rank": 16,
            "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
    ),
    "llama4_text": Tried(
        kind="llama4_text",
        options={
            **_TWO, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 64, "attention_chunk_size": 16,
        },
    ),
    "gemma3 (text half)": Tried(
        kind="gemma3",
        options={
            "text_config": {**_TWO, "head_dim": 8, "sliding_window": 8, "model_type": "gemma3_text"},
            "vision_config": {
                "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16,
                "patch_size": 4,
            },
            "mm_tokens_per_image": 4, "image_token_index": 98, "boi_token_index": 97, "eoi_token_index": 96,
        },
        auto="AutoModelForImageTextToText",
    ),
    "minimax": Tried(
        kind="minimax",
        options={**_TWO, **_MIXED, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 16},
        holds=(20, (19, 31), (5, 16, 40)),
    ),
    "mamba2": Tried(
        kind="mamba2",
        options={
            "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 8, "num_heads": 8, "head_dim": 8,
            "n_groups": 2, "chunk_size": 16, **_IDS,
        },
        holds=_CHUNKS,
    ),
    "bamba": Tried(kind="bamba", options={**_TWO, **_SSM, "attn_layer_indices": [1]}, holds=_CHUNKS),
    "falcon_h1": Tried(
        kind="falcon_h1",
        options={**_LLAMA, **_SSM, "num_hidden_layers": 1, "head_dim": 8, "mamba_d_ssm": 64},
        holds=_CHUNKS,
    ),
    "zamba2": Tried(
        kind="zamba2",
        options={
            **_TWO, "num_key_value_heads": 4, "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 8,
            "chunk_size": 16, "layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "num_mem_blocks": 1,
            "use_mem_rope": True, "adapter_rank": 4,
        },
        holds=_CHUNKS,
    ),
    "granitemoehybrid": Tried(
        kind="granitemoehybrid",
        options={
            **_TWO, **_SSM, "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 64,
            "layer_types": ["mamba", "attention"],
        },
        holds=_CHUNKS,
    ),
    "jamba": Tried(
        kind="jamba",
        options={
            **_TWO, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
            "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        holds=(13, (13,), (5, 14)),
    ),
    "qwen3_next": Tried(
        kind="qwen3_next", options={**_TWO, **_DELTA, **_SHARED, "head_dim": 8, "num_experts": 4}, holds=_ROWS
    ),
    "qwen3_5": Tried(kind="qwen3_5_text", options={**_TWO, **_DELTA, "head_dim": 8}, holds=_ROWS),
    "olmo_hybrid": Tried(kind="olmo_hybrid", options={**_TWO, **_DELTA}, holds=_ROWS),
}  # fmt: skip


def depth(name: str, blocks: int) -> dict[str, int]:
    """Return the change of options that gives every stack of a family ``blocks`` blocks."""
    option = next(key for key in ("num_hidden_layers", "n_layer", "num_layers") if key in FAMILIES[name].options)
    return {option: blocks}


def build(name: str, **changes: Any) -> nn.Module:
    """Return the family's tiny model with seeded random weights, in evaluation mode."""
    family = FAMILIES[name]
    return build_from(name, {**family.options, **changes}, family.auto)


def build_from(name: str, options: dict[str, Any], auto: str = "AutoModelForCausalLM") -> nn.Module:
    """Return a tiny model of the model type ``name`` with seeded random weights, in evaluation mode."""
    import transformers

    config = transformers.AutoConfig.for_model(name, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, auto).from_config(config)
    return model.eval()


def inputs(name: str, batch: int, length: int, *, pad: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Return random inputs of the family: the first sample ends in ``pad`` padded positions."""
    generator = torch.Generator().manual_seed(seed)
    if FAMILIES.get(name) is not None and FAMILIES[name].auto == "AutoModelForImageClassification":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if pad:
        mask[0, -pad:] = 0
    found = {"input_ids": ids, "attention_mask": mask}
    if name == "t5":
        found["decoder_input_ids"] = torch.randint(3, VOCABULARY, (batch, length - 2), generator=generator)
    return found
