"""Trainers of others on an instrumented model: they see the model that they know, and train it with noise."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from aqnfx.live.instrument import instrument
from tests.families import build


def rows(count: int = 8, length: int = 12) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def train(folder: Path, level: float | None, seed: int = 0) -> tuple[list[float], dict[str, dict[str, int]]]:
    """Return the losses of four steps of Hugging Face's Trainer, and how often noise was injected where."""
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model: Any = build("llama")
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        logging_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows())
    if level is None:
        model.compile(backend="eager")
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], {}
    with instrument(model, inner="eager") as handle:
        handle.set_noise(level=level, ops="linear", phases="both", seed=seed)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], handle.stats()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the trainer's own
@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate, which Trainer needs, is absent")
def test_trainer_of_transformers(tmp_path: Path) -> None:
    plain, _ = train(tmp_path, None)
    silent, _ = train(tmp_path, 0.0)
    assert silent == plain
    noisy, stats = train(tmp_path, 0.05)
    assert noisy != plain
    assert train(tmp_path, 0.05)[0] == noisy
    assert train(tmp_path, 0.05, seed=1)[0] != noisy
    linear = {site: count for site, count in stats.items() if ":linear:" in site}
    assert linear
    # Four steps of two batches each.
    assert all(count == {"forward": 8, "backward": 8} for count in linear.values())


@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is absent")
def test_adapters_of_peft_are_sites() -> None:
    from peft import LoraConfig, get_peft_model

    base: Any = build("llama")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    ids = torch.stack([row["input_ids"] for row in rows(2)])
    clean = model(input_ids=ids).logits
    with instrument(model, inner="eager") as handle:
        assert torch.equal(model(input_ids=ids).logits, clean)
        adapters = [site for site in handle.sites if ".lora_A." in site and ":linear:" in site]
        assert adapters
        with handle.noise(level=0.1, sites=adapters, seed=0, phases="both"):
            out = model(input_ids=ids, labels=ids)
            out.loss.backward()
        assert not torch.equal(out.logits, clean)
        assert all(handle.stats()[site] == {"forward": 1, "backward": 1} for site in adapters)
