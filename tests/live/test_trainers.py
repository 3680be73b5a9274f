"""Trainers of others on an instrumented model: they see the model that they know, and train it with noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aqnfx.live.instrument import instrument
from tests.cli.tiny import TEXT, save_model
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
@pytest.mark.filterwarnings("default", "ignore:.*will be removed in v6:FutureWarning")  # the trainer's own
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


@pytest.mark.slow
@pytest.mark.filterwarnings("default", "ignore:.*will be removed in v6:FutureWarning")
@pytest.mark.parametrize("kind", ["SFT", "GRPO"])
def test_trainers_of_trl(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SFT breaks the graph at its fused loss and changes values in place; GRPO generates, and learns from what it said."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    directory = save_model(tmp_path / "model", num_hidden_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    common: dict[str, Any] = {
        "output_dir": str(tmp_path), "max_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False,
        "save_strategy": "no", "disable_tqdm": True, "seed": 0, "per_device_train_batch_size": 2,
        "gradient_checkpointing": False,
    }  # fmt: skip
    parts: dict[str, Any] = {"SFT": {"max_length": 16}, "GRPO": {"num_generations": 2, "max_completion_length": 4}}[kind]
    if kind == "GRPO":
        rewarded = {"reward_funcs": lambda completions, **_: [float(sum(map(ord, text)) % 17) for text in completions]}
    else:
        rewarded = {}
    data = Dataset.from_dict({"text" if kind == "SFT" else "prompt": list(TEXT[:4])})

    def run(level: float | None) -> tuple[list[Any], dict[str, dict[str, int]]]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
        arguments = getattr(trl, f"{kind}Config")(**common, **parts)
        trainer = getattr(trl, f"{kind}Trainer")(
            model=model, args=arguments, train_dataset=data, processing_class=tokenizer, **rewarded
        )
        stats: dict[str, dict[str, int]] = {}
        if level is None:
            model.compile(backend="eager", dynamic=True)
            trainer.train()
        else:
            with instrument(model, inner="eager", dynamic=True) as handle:
                handle.set_noise(level=level, ops="linear", phases="both", seed=0)
                trainer.train()
                stats = handle.stats()
        return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry], stats

    plain, _ = run(None)
    assert run(0.0)[0] == plain
    noisy, stats = run(0.2)
    assert noisy != plain
    layers = [count for site, count in stats.items() if ".layers." in site and ":linear:" in site]
    assert layers
    assert all(count["backward"] == 2 and count["forward"] >= 2 for count in layers)


@pytest.mark.filterwarnings("default", "ignore:.*will be removed in v6:FutureWarning")
@pytest.mark.slow
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
