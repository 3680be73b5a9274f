"""A model directory that a command can be pointed at: a tiny random model with a character tokenizer, and data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

TEXT = [
    "A small dog ran to the old red barn and slept there all day long.",
    "Two birds sat on the fence, and one of them sang a song to the sun.",
    "The rain fell on the roof of the house while the cat drank her milk.",
    "My friend found a blue stone by the river; it was round and cold.",
]


def tokenizer() -> Any:
    """Return a character tokenizer: ASCII 32-126 have the ids 4-98."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "\n": 3} | {chr(c): c - 28 for c in range(32, 127)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.Sequence([])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save_model(directory: Path, name: str = "llama", *, nan: bool = False, **options: Any) -> Path:
    """Save a random model of the model type ``name`` and its tokenizer; ``nan`` poisons the last norm's weights."""
    import torch

    from tests.families import build

    model: Any = build(name, **options)
    if nan:
        with torch.no_grad():
            model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def save_text(path: Path, copies: int = 1) -> Path:
    """Save JSON lines with a field ``text``."""
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXT * copies), encoding="utf-8")
    return path


def save_answers(directory: Path, path: Path, questions: Sequence[str], new: int) -> Path:
    """Save JSON lines of questions whose answers are the ``new`` tokens that a model says; the last is wrong."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    found = transformers.AutoTokenizer.from_pretrained(directory)
    rows = []
    for question in questions:
        ids = torch.tensor([found(f"Q: {question}\nA: ")["input_ids"]])
        made = model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        # Token by token: this tokenizer puts spaces between tokens where it decodes several.
        rows.append({"question": question, "answer": "".join(found.decode(t) for t in made if t >= 3)})
    rows[-1]["answer"] = "no"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def encoded(samples: int, length: int, *, seed: int = 0, ragged: bool = False) -> tuple[Any, ...]:
    """Return random samples of ``length`` tokens; ``ragged`` gives each its own length up to that."""
    from aqnfx.probes.data.batches import Encoded

    rng = np.random.default_rng(seed)
    lengths = rng.integers(max(2, length // 3), length + 1, size=samples) if ragged else [length] * samples
    return tuple(
        Encoded(input_ids=tuple(int(t) for t in rng.integers(3, 99, size=n)), score_from=1) for n in lengths
    )  # fmt: skip
