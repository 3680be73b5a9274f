"""Weights streamed from safetensors: what is found, how it is laid out, chunks, and everything that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from aqnfx.errors import ModelError
from aqnfx.scanning import checkpoint_weights as W
from aqnfx.scanning.checkpoint_weights import Weight, chunks, open_checkpoint, value_range


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def save(directory: Path, tensors: dict[str, torch.Tensor], model_type: str | None = "llama", **config: Any) -> str:
    """Save a checkpoint in one file and return its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    if model_type is not None:
        text = json.dumps({"model_type": model_type, **config})
        (directory / "config.json").write_text(text, encoding="utf-8")
    return str(directory)


def save_shards(directory: Path, *shards: dict[str, torch.Tensor], index: dict[str, str] | None = None) -> str:
    """Save a checkpoint in several files and return its directory; ``index`` replaces what the index says."""
    directory.mkdir(parents=True, exist_ok=True)
    placed = {}
    for number, tensors in enumerate(shards):
        save_file(tensors, directory / f"part-{number}.safetensors")
        placed |= dict.fromkeys(tensors, f"part-{number}.safetensors")
    index = placed if index is None else index
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    (directory / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return str(directory)


def weights(model: str) -> dict[str, Weight]:
    return {weight.module: weight for weight in open_checkpoint(model).weights}


def rows(weight: Weight, elements: int = W.CHUNK) -> torch.Tensor:
    return torch.cat([chunk.clone() for chunk in chunks(weight, elements)])


def refused(model: str, *parts: str) -> None:
    with pytest.raises(ModelError) as caught:
        open_checkpoint(model)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, f"{part!r} is not in {text!r}"


# What is found ---------------------------------------------------------------------------------------------------------


def test_weights_are_the_floating_tensors_of_two_or_more_dimensions(tmp_path: Path) -> None:
    model = save(
        tmp_path / "m",
        {
            "a.weight": randn(4, 6), "b": randn(3, 5, dtype=torch.bfloat16), "norm.weight": randn(6), "scale": randn(),
            "a.bias": randn(4), "experts.gate_up_proj_bias": randn(2, 8), "h.0.attn.bias": torch.ones(1, 1, 4, 4).bool(),
            "position_ids": torch.arange(5)[None], "steps": torch.zeros(3, dtype=torch.int64), "none.weight": randn(0, 4),
        },
    )  # fmt: skip
    found = open_checkpoint(model)
    assert {weight.module: weight.dtype for weight in found.weights} == {"a": torch.float32, "b": torch.bfloat16}
    assert found.skipped == {"vectors and scalars": 4, "biases, masks and indices": 3, "empty tensors": 1}
    assert (found.name, found.model_type) == ("m", "llama")
    assert "2 weights are taken as (out, in), since LlamaForCausalLM does not say: a.weight" in found.notes[0]


def test_the_embedded_model_is_read_by_its_name() -> None:
    found = open_checkpoint("tinygsm")
    assert len(found.weights) == 113
    assert found.name == "tinygsm"
    assert {"model.embed_tokens", "model.layers.15.mlp.down_proj"} <= {weight.module for weight in found.weights}


def test_two_tensors_of_one_module_have_two_names(tmp_path: Path) -> None:
    assert set(weights(save(tmp_path, {"a": randn(2, 2), "a.weight": randn(2, 2), ".weight": randn(2, 2)}))) == {
        "a", "a.weight", ".weight",
    }  # fmt: skip


def test_without_a_config_the_layout_is_noted(tmp_path: Path) -> None:
    (note,) = open_checkpoint(save(tmp_path, {"a.weight": randn(2, 2)}, model_type=None)).notes
    assert "No config.json" in note


def test_the_digest_is_of_the_headers_however_they_are_sharded(tmp_path: Path) -> None:
    a, b, c = {"a.weight": randn(4, 6)}, {"b.weight": randn(2, 6)}, {"n.weight": randn(6)}
    whole = open_checkpoint(save(tmp_path / "whole", a | b | c)).digest
    assert open_checkpoint(save_shards(tmp_path / "parts", c | b, a)).digest == whole
    assert open_checkpoint(save(tmp_path / "values", {k: v * 2 for k, v in (a | b | c).items()})).digest == whole
    others = ({}, {"b.weight": randn(6, 2)}, {"b.weight": randn(2, 6).half()}, {"B.weight": randn(2, 6)})
    for number, other in enumerate(others):
        assert open_checkpoint(save(tmp_path / str(number), a | c | other)).digest != whole


def test_a_hub_id_is_read_from_the_local_cache_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refused("someone/model", "neither a directory nor in the local Hugging Face cache", "hf download")
    refused("a model?", "neither a directory")
    commit = "0" * 40
    place = tmp_path / "models--someone--model"
    save(place / "snapshots" / commit, {"a.weight": randn(2, 2)})
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit, encoding="utf-8")
    found = open_checkpoint("someone/model")
    assert (found.name, len(found.weights)) == ("someone/model", 1)


# Layout and chunks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("elements", [1, 7, 20, 64, 10**6])
def test_chunks_are_the_rows_in_order(tmp_path: Path, dtype: torch.dtype, elements: int) -> None:
    x = randn(9, 7, dtype=dtype)
    found = weights(save(tmp_path, {"first.weight": randn(3, 3), "x.weight": x}))["x"]
    assert torch.equal(rows(found, elements), x.float() if dtype == torch.float64 else x)
    assert all(chunk.numel() <= max(elements, 7) for chunk in chunks(found, elements))
    low, high = value_range(found, elements)
    assert (low, high) == (x.float().amin(), x.float().amax())


@pytest.mark.parametrize("elements", [1, 6, 13, 10**6])
def test_weights_of_conv1d_are_read_as_those_of_a_linear(tmp_path: Path, elements: int) -> None:
    x, other = randn(6, 15, dtype=torch.bfloat16), randn(6, 15)
    tensors = {"h.0.attn.c_attn.weight": x, "h.0.mlp.c_fc.weight": x.clone(), "wte.weight": other, "c_fcx.weight": other.clone()}
    found = weights(save(tmp_path / "gpt2", tensors, "gpt2", n_layer=1))
    for name in ("h.0.attn.c_attn", "h.0.mlp.c_fc"):
        assert (found[name].rows, found[name].width, found[name].transposed) == (15, 6, True)
        assert torch.equal(rows(found[name], elements), x.t())
    assert torch.equal(rows(found["wte"], elements), other)
    assert not found["c_fcx"].transposed
    parts = {
        "encoder": {"model_type": "vit", "num_hidden_layers": 1},
        "decoder": {"model_type": "gpt2", "n_layer": 1, "add_cross_attention": True},
    }
    own = {f"decoder.transformer.{key}": value for key, value in tensors.items()}
    named = {"architectures": ["VisionEncoderDecoderModel"], **parts}
    inside = weights(save(tmp_path / "inside", own, "vision-encoder-decoder", **named))
    assert inside["decoder.transformer.h.0.attn.c_attn"].transposed
    assert not weights(save(tmp_path / "bigcode", tensors, "gpt_bigcode", n_layer=1))["h.0.attn.c_attn"].transposed


@pytest.mark.parametrize("elements", [1, 200, 10**6])
def test_stacks_of_experts_are_read_matrix_by_matrix(tmp_path: Path, elements: int) -> None:
    x = randn(3, 5, 64)
    name = "model.layers.0.mlp.experts.down_proj"
    found = weights(save(tmp_path / "qwen", {name: x}, "qwen3_moe", num_hidden_layers=1))[name]
    assert torch.equal(rows(found, elements), x.reshape(15, 64))
    found = weights(save(tmp_path / "oss", {name: x}, "gpt_oss", num_hidden_layers=1))[name]
    assert torch.equal(rows(found, elements), x.transpose(1, 2).reshape(192, 5))
    assert (found.facts["rows"], found.facts["width"], found.facts["shape"]) == (192, 5, [3, 5, 64])


def test_a_kernel_of_a_convolution_sums_over_all_but_the_first_dimension(tmp_path: Path) -> None:
    found = weights(save(tmp_path, {"a.weight": randn(4, 3, 5), "b.weight": randn(4, 3, 16, 16)}))
    assert (found["a"].rows, found["a"].width) == (4, 15)
    assert (found["b"].rows, found["b"].width) == (4, 768)
    assert torch.equal(rows(found["b"]), randn(4, 3, 16, 16).reshape(4, 768))


def test_chunks_and_their_buffers_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"long.weight": randn(700, 3000, dtype=torch.bfloat16), "h.0.mlp.c_fc.weight": randn(300, 4000)}
    model = save(tmp_path, tensors, "gpt2", n_layer=1)
    seen: list[int] = []
    real = torch.empty

    def counted(*size: Any, **options: Any) -> torch.Tensor:
        made = real(*size, **options)
        seen.append(0 if made.is_meta else made.numel() * made.element_size())
        return made

    monkeypatch.setattr(torch, "empty", counted)
    found = open_checkpoint(model).weights
    assert [weight.transposed for weight in found] == [True, False]
    for weight in found:
        sizes = [chunk.numel() for chunk in chunks(weight)]
        assert max(sizes) <= W.CHUNK < weight.elements
        value_range(weight)
    assert seen
    assert max(seen) <= W.CHUNK * 4


def test_a_row_beyond_all_bounds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(W, "_LONGEST_ROW", 10)
    refused(save(tmp_path, {"a.weight": randn(2, 11)}), "a.weight", "rows of 11 values")


# What is refused -------------------------------------------------------------------------------------------------------


def test_places_without_safetensors(tmp_path: Path) -> None:
    refused(str(tmp_path / "nowhere"), "nowhere", "does not exist")
    refused("a/b/c", "does not exist")
    refused(str(tmp_path), "holds no model.safetensors", "save_pretrained")
    (tmp_path / "model.gguf").touch()
    refused(str(tmp_path / "model.gguf"), "is a file", "directory")
    (tmp_path / "pytorch_model.bin").touch()
    refused(str(tmp_path), "pytorch_model.bin", "not read", "safetensors")
    save_file({"a": randn(2, 2)}, tmp_path / "adapter_model.safetensors")
    refused(str(tmp_path), "adapter_model.safetensors", "model.safetensors.index.json")


def test_damaged_files(tmp_path: Path) -> None:
    model = save(tmp_path / "m", {"a.weight": randn(40, 40), "b.weight": randn(4, 4)})
    file = tmp_path / "m" / "model.safetensors"
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    mangled = whole[8 : 8 + header].replace(b"[40,40]", b"[40,41]")
    beyond = (1 << 40).to_bytes(8, "little")
    for bad in (b"", whole[:5], whole[:30], whole[:-1], whole + b"x", beyond + whole[8:], b"\xff" * 64, whole[:8] + mangled):
        file.write_bytes(bad if bad[:8] != whole[:8] or len(bad) != 8 + header else bad + whole[8 + header :])
        refused(model, "model.safetensors", "truncated or damaged")
    file.write_bytes(whole)
    assert len(weights(model)) == 2
    (tmp_path / "m" / "config.json").write_text("{", encoding="utf-8")
    refused(model, "config.json", "damaged")
    (tmp_path / "m" / "config.json").write_text("[]", encoding="utf-8")
    refused(model, "config.json", "list")


def test_a_file_that_ends_while_it_is_read(tmp_path: Path) -> None:
    found = weights(save(tmp_path, {"a.weight": randn(40, 40)}))["a"]
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ModelError, match=r"ended within a\.weight"):
        rows(found, 400)
    with pytest.raises(ModelError, match=r"ended within a\.weight"):
        value_range(found)
    file.unlink()
    with pytest.raises(ModelError, match="cannot read"):
        rows(found)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', '{"weight_map": {"a": 3}}', '"x"', "\ud800"]
)
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    model = save_shards(tmp_path, {"a.weight": randn(2, 2)})
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    refused(model, "model.safetensors.index.json", "damaged")


def test_an_index_that_disagrees_with_its_shards(tmp_path: Path) -> None:
    a, b = {"a.weight": randn(2, 2)}, {"b.weight": randn(2, 2)}
    names = {"a.weight": "part-0.safetensors", "b.weight": "part-1.safetensors"}
    refused(save_shards(tmp_path / "gone", a, b, index=names | {"c": "part-9.safetensors"}), "missing", "part-9.safetensors")
    refused(save_shards(tmp_path / "absent", a, b, index=names | {"c": "part-1.safetensors"}), "'c'", "does not")
    swapped = {"a.weight": "part-1.safetensors", "b.weight": "part-0.safetensors"}
    refused(save_shards(tmp_path / "swapped", a, b, index=swapped), "does not")
    refused(save_shards(tmp_path / "twice", a | b, b), "b.weight", "two shards", "part-0", "part-1")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/../../x", "..\\x", "C:\\x", "", "a\0b"])
def test_an_index_that_leaves_its_directory(tmp_path: Path, name: str) -> None:
    save_file({"a.weight": randn(2, 2)}, tmp_path / "x.safetensors")
    model = save_shards(tmp_path / "m", {"a.weight": randn(2, 2)}, index={"a.weight": name})
    refused(model, "not inside of its directory", repr(name))


@pytest.mark.parametrize(
    ("tensors", "config", "parts"),
    [
        ({"a.qweight": torch.zeros(4, 4, dtype=torch.int32)}, {}, ["quantised already", "a.qweight is I32"]),
        ({"a.weight": torch.zeros(4, 4, dtype=torch.uint8)}, {"quantization_config": {"quant_method": "bitsandbytes"}},
         ["quantised already (bitsandbytes)", "a.weight is U8"]),
        ({"a.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1, 1)}, {},
         ["quantised already", "a.weight is F8_E4M3"]),
        ({"a.weight": torch.zeros(4, 4, dtype=torch.int64)}, {}, ["a.weight has the type I64", "not floating point"]),
    ],
)  # fmt: skip
def test_weights_that_are_not_floating_point(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], parts: list[str]
) -> None:
    refused(save(tmp_path, {"z.weight": randn(2, 2), **tensors}, "llama", **config), *parts)


def test_a_checkpoint_without_weights(tmp_path: Path) -> None:
    refused(save(tmp_path, {"norm.weight": randn(4)}), "no weight of two or more dimensions", "1 tensors")
