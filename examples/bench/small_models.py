"""Small models of several architectures, trained here in a minute or two on the embedded word problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aqnfx.data import EMBEDDED, embedded_problems
from aqnfx.probes.data.batches import load_examples
from aqnfx.probes.data.samples import load_tokenizer

HELD_OUT = 64  # problems that no training sees; the samples are the first of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a small model is made: its width and number of layers, the steps and the problems per step."""

    layers: Mapping[str, int]
    hidden: int = 64
    steps: int = 300
    batch_size: int = 32
    learning_rate: float = 3e-3


# As many layers as give at least 46 core sites, the number of the five-layer llama models.
FULL = Training(layers={"gpt2": 8, "gemma3_text": 5, "mixtral": 5})
BRIEF = Training(layers={"gpt2": 2, "gemma3_text": 2, "mixtral": 2}, hidden=32, steps=20, batch_size=8)


def configuration(kind: str, vocabulary: int, training: Training) -> Any:
    """Return the configuration of a small model of the model type ``kind``, with heads of 16 dimensions."""
    import transformers

    hidden, layers = training.hidden, training.layers[kind]
    common = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        options = {
            "n_embd": hidden, "n_layer": layers, "n_head": hidden // 16, "n_positions": 256, "resid_pdrop": 0.0,
            "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        }  # fmt: skip
    else:
        options = {
            "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 2 * hidden, "head_dim": 16,
            "num_attention_heads": hidden // 16, "num_key_value_heads": hidden // 32, "max_position_embeddings": 256,
        }  # fmt: skip
    options |= {"gemma3_text": {"sliding_window": 32}, "mixtral": {"num_local_experts": 4}}.get(kind, {})
    return transformers.AutoConfig.for_model(kind, **common, **options)


def train(kind: str, training: Training, *, length: int = 160) -> tuple[torch.nn.Module, float]:
    """Return a model of the type ``kind`` trained on the embedded problems, and the mean loss of its last steps.

    The loss is in nats per character. Seeded; the first ``HELD_OUT`` problems are left out.
    """
    import transformers

    tokenizer = load_tokenizer(EMBEDDED)
    texts = problem_texts()[HELD_OUT:]
    ids = tokenizer(texts, padding=True, truncation=True, max_length=length, padding_side="right", return_tensors="pt")
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(configuration(kind, len(tokenizer), training)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.learning_rate, total_steps=training.steps)
        for _ in range(training.steps):
            rows = torch.randint(len(texts), (training.batch_size,))
            chosen, mask = ids.input_ids[rows], ids.attention_mask[rows]
            labels = chosen.masked_fill(mask == 0, -100)
            loss = model(input_ids=chosen, attention_mask=mask, labels=labels, use_cache=False).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return model.eval(), float(np.mean(losses[-max(1, training.steps // 20) :]))


def problem_texts() -> list[str]:
    """Return the embedded problems with their answers, as texts of which every token is scored."""
    return [example.text for example in load_examples(embedded_problems())]
