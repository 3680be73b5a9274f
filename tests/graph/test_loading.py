"""A model is what its checkpoint says: whatever is missing, unexpected or no number is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import aqnfx
from aqnfx.errors import InputError, ModelError
from aqnfx.graph.loading import load_model
from tests.families import FAMILIES, build, depth

Weights = dict[str, Tensor]


def save(directory: Path, family: str, change: Callable[[Weights], Weights] = dict, **config: Any) -> str:
    """Save a one-layer model of a family with changed tensors and a changed config."""
    build(family, **depth(family, 1)).save_pretrained(directory)  # type: ignore[operator]
    file = directory / "model.safetensors"
    weights = {key: value.contiguous() for key, value in change(load_file(file)).items()}
    save_file(weights, file, metadata={"format": "pt"})
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings | config))
    return str(directory)


def refusal(model: str, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(model, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_no_family_is_refused(family: str, tmp_path: Path) -> None:
    built: Any = build(family, **depth(family, 1))
    built.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path)).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in built.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "student."])
def test_a_prefix_is_named(prefix: str, tmp_path: Path) -> None:
    model = save(tmp_path, "olmo2", lambda weights: {prefix + key: value for key, value in weights.items()})
    assert f"without the prefix {prefix!r} the names would fit" in refusal(model)


def test_an_adapter_that_is_not_merged_is_named(tmp_path: Path) -> None:
    wrap = {"query_key_value.weight": "query_key_value.base_layer.weight"}

    def adapt(weights: Weights) -> Weights:
        return {f"base_model.model.{key.replace(*next(iter(wrap.items())))}": value for key, value in weights.items()}

    message = refusal(save(tmp_path, "gpt_neox", adapt))
    assert "prefix 'base_model.model.'" in message
    assert "adapter is not merged" in message


def test_missing_unexpected_and_mismatched_tensors_are_counted_and_named(tmp_path: Path) -> None:
    def change(weights: Weights) -> Weights:
        del weights["model.norm.weight"]
        weights["model.layers.0.mlp.down_proj.weight"] = torch.zeros(32, 48)
        return weights | {"model.layers.0.extra.weight": torch.zeros(2, 2)}

    message = refusal(model := save(tmp_path, "granite", change))
    assert "1 missing (model.norm.weight)" in message
    assert "1 unexpected (model.layers.0.extra.weight)" in message
    assert "1 of another shape (model.layers.0.mlp.down_proj.weight: (32, 48) where the model has (32, 64))" in message
    assert "1 of another shape" in refusal(model, allow_missing=["model.norm.*", "*extra*"])
    assert "'*bias' names no tensor" in refusal(model, allow_missing=["*bias", "*"])


def test_what_is_allowed_has_the_same_values_in_every_run_and_is_noted(tmp_path: Path) -> None:
    model = save(tmp_path, "starcoder2", lambda weights: {k: v for k, v in weights.items() if "c_fc.weight" not in k})
    first, second = (load_model(model, allow_missing=["*.c_fc.weight"]).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    program = aqnfx.trace(model, allow_missing=["*.c_fc.weight"])
    assert any("1 tensors have fresh random values" in note for note in program.notes)
    with pytest.raises(InputError, match="allow_missing is for models that are loaded here"):
        aqnfx.trace(build("starcoder2", num_hidden_layers=1), allow_missing=["*"])


def test_a_tied_head_and_buffers_of_earlier_days_are_no_fault(tmp_path: Path) -> None:
    def change(weights: Weights) -> Weights:
        assert "lm_head.weight" not in weights
        mask = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()
        return weights | {"transformer.h.0.attn.bias": mask, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}

    load_model(save(tmp_path / "tied", "gpt2", change))
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    load_model(save(tmp_path / "old", "mistral", lambda weights: weights | old))


def test_a_missing_expert_tensor_is_named(tmp_path: Path) -> None:
    def change(weights: Weights) -> Weights:
        return {key: value for key, value in weights.items() if "experts.2.up_proj" not in key}

    assert "1 parts are missing (model.layers.0.mlp.experts.2.up_proj.weight)" in refusal(save(tmp_path, "qwen3_moe", change))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e5m2])
def test_codes_are_not_read_as_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    def change(weights: Weights) -> Weights:
        return {key: value.to(dtype) if "o_proj" in key else value for key, value in weights.items()}

    message = refusal(save(tmp_path, "phi3", change))
    assert "1 weights are stored as" in message
    assert "model.layers.0.self_attn.o_proj.weight" in message


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"architectures": ["Olmo2ForCasualLM"]}, "did you mean 'Olmo2ForCausalLM'"),
        ({"architectures": ["pipeline"]}, "which is no model class"),
        ({"architectures": ["BertTokenizer"]}, "which is no model class"),
        ({"architectures": [3]}, "which is no model class"),
        ({"architectures": ["OlmoForCausalLM"]}, "OlmoForCausalLM is of olmo"),
        ({"num_hidden_layers": 2, "layer_types": None}, "11 missing (model.layers.1."),
        ({"quantization_config": {"quant_method": "house"}}, "quant_method 'house'"),
        ({"transformers_weights": "../other.safetensors"}, "names other weights"),
    ],
)
def test_a_config_that_says_something_else(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(save(tmp_path, "olmo2", **changed))


def test_a_folder_of_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is an adapter (adapter_config.json); merge it" in refusal(str(tmp_path))


# Files -------------------------------------------------------------------------------------------------------------------


def sharded(directory: Path) -> tuple[str, dict[str, Any]]:
    """Save a model in several shards; return its directory and its index."""
    built: Any = build("cohere", num_hidden_layers=1)
    built.save_pretrained(directory, max_shard_size="20KB")
    index: dict[str, Any] = json.loads((directory / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    return str(directory), index


def write_index(directory: Path, index: dict[str, Any]) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("place", ["weights.bin", "../outside.safetensors", "/tmp/outside.safetensors", "a/../../b.safetensors"])
def test_an_index_leads_to_safetensors_inside_only(place: str, tmp_path: Path) -> None:
    model, index = sharded(tmp_path / "model")
    write_index(tmp_path / "model", index | {"weight_map": dict.fromkeys(index["weight_map"], place)})
    torch.save(build("cohere", num_hidden_layers=1).state_dict(), tmp_path / "model" / "weights.bin")
    said = "which is not safetensors" if place.endswith(".bin") else "not inside of its directory"
    assert said in refusal(model)
    with pytest.raises(ModelError, match=said):
        aqnfx.scan(model, "int8")


def test_shards_that_are_not_what_the_index_says(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model, index = sharded(folder)
    load_model(model)
    names = sorted(set(index["weight_map"].values()))
    first, second = (load_file(folder / name) for name in names[:2])
    for one, other in ((names[0], second), (names[1], first)):
        save_file(other, folder / one, metadata={"format": "pt"})
    assert "index and shards differ" in refusal(model)  # swapped
    save_file(first, folder / names[0], metadata={"format": "pt"})
    key, *rest = second
    save_file({name: second[name] for name in rest}, folder / names[1], metadata={"format": "pt"})
    assert f"holds '{key}', which it does not" in refusal(model)
    kept = {name: place for name, place in index["weight_map"].items() if place != names[1]}
    write_index(folder, index | {"weight_map": kept})
    assert f"{len(second)} missing" in refusal(model)


def test_links_of_a_hub_cache_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0"
    sharded(blobs)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    for number, file in enumerate(sorted(blobs.iterdir())):
        blob = file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("../..") / "blobs" / blob.name)
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download", "transformers.utils.hub"):
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            monkeypatch.setattr(f"{module}.{name}", str(tmp_path / "hub"), raising=False)
    assert load_model("someone/tiny").name_or_path == "someone/tiny"
    assert load_model(str(snapshot)).name_or_path == str(snapshot)
