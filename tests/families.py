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

CORE = ("llama", "gemma2", "phi3", "gpt2", "falcon", "bloom", "mixtral", "mamba", "bert", "t5", "vit")
"""What differs most: norms, fused and shared projections, attention with a bias, experts, a scan, an encoder, pictures."""


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
