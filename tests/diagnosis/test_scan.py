"""scan(): figures by a second computation, what they must not depend on, decisions, rankings, refusals."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import aqnfx
from aqnfx.errors import InputError, ModelError
from aqnfx.numerics.format_stats import NO_ERROR, NO_SIGNAL, OVERFLOW
from aqnfx.numerics.formats import parse_format, quantize
from aqnfx.probes.compile_choice import compiler_problem
from aqnfx.scanning import scan as module
from aqnfx.scanning.findings import decide, rank
from aqnfx.scanning.scan import scan

FORMATS = ("mxfp4", "nvfp4", "int8", "int4:g48", "int8:tensor", "int4:channel", "int4:tensor:asym", "fp16")
EXACT = ("dead_zone", "saturation", "class", "sigma")


def randn(*shape: int, seed: int = 0, std: float = 0.02) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Return weights with outliers, a gain of norms, and rows of no round width."""
    wild = randn(50, 77, seed=1)
    wild[3] *= 30.0
    found = {
        "model.embed_tokens.weight": randn(200, 64), "model.layers.0.q_proj.weight": randn(64, 64, seed=2),
        "model.layers.0.down_proj.weight": wild, "model.layers.0.conv.weight": randn(8, 4, 3),
        "model.norm.weight": torch.ones(64),
    }  # fmt: skip
    return {name: value.to(dtype) for name, value in found.items()}


def save(directory: Path, values: dict[str, torch.Tensor], model_type: str = "llama", shards: int = 1) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    if shards == 1:
        save_file(values, directory / "model.safetensors")
        return directory
    placed = {name: f"model-{number % shards}.safetensors" for number, name in enumerate(values)}
    for file in set(placed.values()):
        save_file({name: value for name, value in values.items() if placed[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}), encoding="utf-8")
    return directory


def same(first: dict[str, Any], second: dict[str, Any], rel: float = 1e-12) -> None:
    """Counts are equal bit for bit, sums to 12 digits."""
    assert set(first["weights"]) == set(second["weights"])
    for name, formats in first["weights"].items():
        assert first["weight_facts"][name] == alike(second["weight_facts"][name], 10 * rel)
        for fmt, record in formats.items():
            other = second["weights"][name][fmt]
            assert {k: record[k] for k in EXACT} == {k: other[k] for k in EXACT}, (name, fmt)
            assert record == alike(other, rel), (name, fmt)


def alike(record: dict[str, Any], rel: float) -> dict[str, Any]:
    return {key: pytest.approx(value, rel=rel) if isinstance(value, float) else value for key, value in record.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_scan_says_what_storing_each_weight_changes(tmp_path: Path, dtype: torch.dtype) -> None:
    values = tensors(dtype)
    found = scan(save(tmp_path, values), FORMATS, chunk=500).to_record()
    for name, x in values.items():
        if x.dim() < 2:
            continue
        x = x.float().reshape(x.shape[0], -1)
        for text in FORMATS:
            q = quantize(x, parse_format(text))
            record = found["weights"][name.removesuffix(".weight")][text]
            assert record["sqnr_db"] == sqnr(x, q), (name, text)
            assert record["dead_zone"] == float(((q == 0) & (x != 0)).sum() / (x != 0).sum().double())


def sqnr(x: torch.Tensor, q: torch.Tensor) -> Any:
    """Return the ratio in dB for a comparison to 7 digits, None without an error."""
    noise = (q.double() - x.double()).square().sum()
    return pytest.approx(10.0 * math.log10(float(x.double().square().sum() / noise)), rel=1e-7) if noise else None


def test_the_record_has_a_place_for_everything(tmp_path: Path) -> None:
    made = scan(str(save(tmp_path / "m", tensors())), "mxfp4, INT8 ,int4:g64")
    record = made.to_record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["schema"] == "aqnfx.scan/1"
    assert list(record["formats"]) == ["mxfp4", "int8", "int4:g64"]
    assert record["formats"]["int8"]["name"] == "int8:row"
    assert record["formats"]["mxfp4"]["bits"] > 4.25  # blocks that end early have a scale too
    assert record["formats"]["int4:g64"]["partial_blocks"] == 2
    assert record["activations"] == {}
    names = {"model.embed_tokens", "model.layers.0.q_proj", "model.layers.0.down_proj", "model.layers.0.conv"}
    assert set(record["weights"]) == set(record["weight_facts"]) == names
    assert set(record["weights"]["model.embed_tokens"]) == {"mxfp4", "int8", "int4:g64"}
    facts = record["weight_facts"]["model.layers.0.down_proj"]
    assert (facts["shape"], facts["dtype"], facts["elements"], facts["transposed"]) == ([50, 77], "bfloat16", 3850, False)
    assert facts["outlier_ratio"] == pytest.approx(30, rel=0.3)
    assert facts["kurtosis"] > 20
    assert {"sqnr_db", "dead_zone", "saturation", "relative_error", "dead_noise", "class", "sigma"} == set(
        record["weights"]["model.embed_tokens"]["mxfp4"]
    )
    assert record["model"]["name"] == "m"
    provenance = record["provenance"]
    assert provenance["skipped"] == {"vectors and scalars": 1}
    assert provenance["bytes"] == 2 * provenance["elements"] == 2 * (200 * 64 + 64 * 64 + 3850 + 96)
    assert {"aqnfx", "torch", "transformers", "seconds", "gb_per_second", "peak_memory_mib"} <= set(provenance)
    assert any("1 vectors and scalars" in note for note in record["notes"])
    assert any(note.startswith("int4:g64: 2 of 4 weights") for note in record["notes"])
    for name, ranking in record["ranking"].items():
        assert [row["rank"] for row in ranking] == [1, 2, 3, 4]
        values = [record["weights"][row["module"]][name]["sqnr_db"] for row in ranking]
        assert values == sorted(values)
        assert record["summary"][name]["worst"] == {"module": ranking[0]["module"], "sqnr_db": values[0]}
        assert record["summary"][name]["median_sqnr_db"] == pytest.approx((values[1] + values[2]) / 2)
        assert sum(record["summary"][name]["classes"].values()) == 4


@pytest.mark.parametrize(("name", "sqnr", "dead", "relative"), [("mxfp4", 18.79, 0.088, 0.21), ("nvfp4", 20.44, 0.068, 0.18)])
def test_the_known_figures_of_gaussian_weights(tmp_path: Path, name: str, sqnr: float, dead: float, relative: float) -> None:
    found = scan(save(tmp_path, {"a.weight": randn(1024, 1024, std=1.0)}), name).weights["a"][name]
    assert found["sqnr_db"] == pytest.approx(sqnr, abs=0.02)
    assert found["dead_zone"] == pytest.approx(dead, abs=0.001)
    assert found["relative_error"] == pytest.approx(relative, abs=0.002)


@pytest.mark.parametrize("chunk", [1, 100, 640, 1 << 22])
def test_nothing_depends_on_the_size_of_chunks(tmp_path: Path, chunk: int) -> None:
    model = save(tmp_path, tensors())
    same(scan(model, FORMATS, chunk=chunk).to_record(), scan(model, FORMATS).to_record())


def test_nothing_depends_on_shards_or_their_order(tmp_path: Path) -> None:
    whole = scan(save(tmp_path / "whole", tensors()), FORMATS).to_record()
    parts = scan(save(tmp_path / "parts", tensors(), shards=3), FORMATS).to_record()
    assert whole["weights"] == parts["weights"]
    assert whole["weight_facts"] == parts["weight_facts"]
    assert whole["ranking"] == parts["ranking"]
    assert whole["model"]["digest"] == parts["model"]["digest"]


@pytest.mark.parametrize("chunk", [50, 1 << 19])
def test_conv1d_weights_are_those_of_a_linear_turned_round(tmp_path: Path, chunk: int) -> None:
    x = tensors()["model.layers.0.down_proj.weight"]
    turned = scan(save(tmp_path / "gpt2", {"h.0.mlp.c_fc.weight": x.t().contiguous()}, "gpt2"), FORMATS, chunk=chunk).to_record()
    plain = scan(save(tmp_path / "llama", {"h.0.mlp.c_fc.weight": x}), FORMATS).to_record()
    for record in (turned, plain):
        for key in ("shape", "transposed"):
            record["weight_facts"]["h.0.mlp.c_fc"].pop(key)
    same(turned, plain)
    # As quantize() is told the same: sums over dimension 0, channels in dimension 1.
    stored = x.t().contiguous().float()
    for text in FORMATS:
        q = quantize(stored, parse_format(text), dim=0, channel_dim=1)
        assert turned["weights"]["h.0.mlp.c_fc"][text]["sqnr_db"] == sqnr(stored, q)


def test_tied_weights_stand_once() -> None:
    found = scan("tinygsm", ["mxfp4"])
    assert "lm_head" not in found.weights
    assert "model.embed_tokens" in found.weights
    assert len(found.weights) == 113


def test_progress_counts_every_reading(tmp_path: Path) -> None:
    model = save(tmp_path, tensors())
    for formats, readings in (("mxfp4", 1), ("nvfp4,mxfp4", 2)):
        told: list[tuple[int, int]] = []
        size = scan(model, formats, progress=lambda *now, told=told: told.append(now), chunk=999).provenance["bytes"]
        assert told[-1] == (size * readings, size * readings)
        assert [done for done, _ in told] == sorted(done for done, _ in told)
        assert {total for _, total in told} == {size * readings}


def test_scan_is_exported() -> None:
    assert aqnfx.scan is scan
    assert isinstance(aqnfx.scan("tinygsm", "int8"), aqnfx.Scan)


# Decisions -------------------------------------------------------------------------------------------------------------


def record_of(sqnr: float | None, dead: float | None = 0.05, **more: Any) -> dict[str, Any]:
    return {"sqnr_db": sqnr, "dead_zone": dead, "relative_error": 0.2, "dead_noise": 0.02, "class": "", **more}


@pytest.mark.parametrize(
    ("record", "name", "sigma"),
    [
        (record_of(17.99), "critical", [0.05, 0.0005]),
        (record_of(17.99, 0.5), "critical", [0.05, 0.0005]),
        (record_of(18.0, 0.11), "recommended", [0.02, 0.0005]),
        (record_of(20.0, 0.11), "recommended", [0.02, 0.0005]),
        (record_of(18.0, 0.10), "optional", [0.01, 0.0001]),
        (record_of(20.01, 0.11), "optional", [0.01, 0.0001]),
        (record_of(22.0), "optional", [0.01, 0.0001]),
        (record_of(22.01, 0.5), "skip", None),
        (record_of(None, reason=NO_ERROR), "skip", None),
        (record_of(None, None, reason=NO_SIGNAL), "skip", None),
        (record_of(None, reason=OVERFLOW), "critical", [0.05, 0.0005]),
    ],
)
def test_the_decision_table(record: dict[str, Any], name: str, sigma: list[float] | None) -> None:
    assert decide(record) == {"class": name, "sigma": sigma}


def test_sqnr_ranks_and_a_far_rank_by_relative_error_is_explained() -> None:
    weights = {f"w{i}": {"f": record_of(18.0 + i, relative_error=0.3 - 0.01 * i)} for i in range(8)}
    weights["odd"] = {"f": record_of(25.5, 0.25, relative_error=0.5, dead_noise=0.125)}
    rows = rank(weights, "f")
    assert [row["module"] for row in rows] == [*(f"w{i}" for i in range(8)), "odd"]
    assert [row.get("note") for row in rows[:-1]] == [None] * 8
    note = rows[-1]["note"]
    assert rows[-1]["rank_by_relative_error"] == 1
    for part in ("odd in f is 9 of 9 by SQNR (25.5 dB) and 1 by", "(0.500)", "exactly 1", "25.0 %", "50 %", "12.5 %"):
        assert part in note, (part, note)


def test_ranks_that_differ_by_chance_are_not_explained() -> None:
    records = [record_of(18.0 + 0.01 * i, relative_error=0.2 + 0.01 * i) for i in range(9)]
    weights = {f"w{i}": {"f": record} for i, record in enumerate(records)}
    assert all("note" not in row for row in rank(weights, "f"))


def test_overflow_ranks_first_and_weights_without_an_error_last(tmp_path: Path) -> None:
    values = {"zero": torch.zeros(4, 4), "huge": torch.full((4, 4), 1e6), "exact": torch.ones(4, 4)}
    values |= {"a": randn(4, 4), "b": randn(4, 4)}
    found = scan(save(tmp_path, values), ["fp16"])
    assert [row["module"] for row in found.ranking["fp16"]] == ["huge", "a", "b", "exact", "zero"]
    assert found.weights["huge"]["fp16"]["reason"] == OVERFLOW
    assert found.weights["huge"]["fp16"]["class"] == "critical"
    assert found.summary["fp16"]["worst"] == {"module": "huge", "sqnr_db": None}
    json.dumps(found.to_record(), allow_nan=False)
    assert scan(save(tmp_path / "exact", {"a.weight": torch.ones(2, 2)}), "bf16").to_record()["summary"]["bf16"] == {
        "median_sqnr_db": None, "worst": {"module": "a", "sqnr_db": None},
        "classes": {"critical": 0, "recommended": 0, "optional": 0, "skip": 1},
    }  # fmt: skip


# Refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formats", "parts"),
    [
        ("", ["no format", "mxfp4,nvfp4,int8"]),
        (" , ", ["no format"]),
        ([], ["no format"]),
        ("mxfp5", ["unknown format 'mxfp5'", "did you mean 'mxfp4'"]),
        ("mxfp4,mxfp4", ["mxfp4 was given twice"]),
        ("int8,mxfp4,int8:row", ["int8:row was given twice", "int8 before"]),
        (["int8:g0"], ["int8:g0"]),
    ],
)
def test_formats_that_cannot_be_scanned(formats: Any, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        scan("tinygsm", formats)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("formats", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize(("bad", "what"), [(math.nan, "NaN"), (math.inf, "infinite"), (-math.inf, "infinite")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, bad: float, what: str, formats: str) -> None:
    x = randn(40, 40)
    x[39, 39] = bad
    model = save(tmp_path, {"a.weight": randn(40, 40), "b.weight": x})
    with pytest.raises(ModelError, match=rf"b\.weight of model\.safetensors holds {what}"):
        scan(model, formats, chunk=400)


def test_values_at_both_ends_of_fp32_are_finite(tmp_path: Path) -> None:
    model = save(tmp_path, {"a.weight": torch.tensor([[3e38, 2e38], [3e38, 3e38]]), "b.weight": torch.tensor([[1e-42, 0.0]])})
    assert scan(model, "nvfp4,int8:tensor").weights["a"]["int8:tensor"]["sqnr_db"] > 40
    wide = save(tmp_path / "wide", {"a.weight": torch.tensor([[1e300, 1.0]], dtype=torch.float64)})
    with pytest.raises(ModelError, match="infinite"):
        scan(wide, "mxfp4")


# Kernels ---------------------------------------------------------------------------------------------------------------


def test_compile_is_one_of_three_words() -> None:
    with pytest.raises(InputError, match="'maybe' is not one of auto, yes, no"):
        scan("tinygsm", "mxfp4", compile="maybe")


def test_small_checkpoints_are_not_compiled_for_and_large_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scan("tinygsm", "mxfp4").provenance["compile"] is False
    monkeypatch.setattr(module, "_WORTH_COMPILING", 1000)
    monkeypatch.setattr(module, "compiler_problem", lambda device: "there is no compiler")
    assert scan("tinygsm", "mxfp4").provenance["compile"] is False
    with pytest.raises(InputError, match="there is no compiler"):
        scan("tinygsm", "mxfp4", compile="yes")
    monkeypatch.setattr(module, "compiler_problem", lambda device: None)
    calls: list[bool] = []
    real = module.format_sums
    monkeypatch.setattr(module, "format_sums", lambda *a, compiled: calls.append(compiled) or real(*a, compiled=False))
    monkeypatch.setattr(module.ValueStatistics, "add", lambda self, x, compiled, add=module.ValueStatistics.add: add(self, x))
    assert scan("tinygsm", "mxfp4").provenance["compile"] is True
    assert set(calls) == {True}


def test_a_compiler_that_fails_is_noted_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.format_sums

    def broken(*arguments: Any, compiled: bool) -> torch.Tensor:
        if compiled:
            raise RuntimeError("\nomp.h was not found\nmore")
        return real(*arguments)

    plain = scan("tinygsm", "mxfp4", compile="no")
    monkeypatch.setattr(module, "_WORTH_COMPILING", 1000)
    monkeypatch.setattr(module, "compiler_problem", lambda device: None)
    monkeypatch.setattr(module, "format_sums", broken)
    monkeypatch.setattr(module.ValueStatistics, "add", lambda self, x, compiled, add=module.ValueStatistics.add: add(self, x))
    found = scan("tinygsm", "mxfp4")
    assert found.weights == plain.weights
    assert found.provenance["compile"] is False
    assert found.notes[-1] == "Compiling failed (omp.h was not found); the operations ran one by one."
    with pytest.raises(InputError, match=r"compiling failed \(omp.h was not found\); use --compile no"):
        scan("tinygsm", "mxfp4", compile="yes")


@pytest.mark.slow
def test_kernels_agree_with_operations(tmp_path: Path) -> None:
    if compiler_problem("cpu"):
        pytest.skip("a C++ compiler is absent")
    x = randn(700, 320)
    x[5] *= 100.0
    model = save(tmp_path, {"a.weight": x.bfloat16(), "b.weight": randn(300, 1000), "h.c_fc.weight": randn(500, 300)}, "gpt2")
    formats = "mxfp4,nvfp4,int8"
    plain, kernels = (scan(model, formats, compile=mode).to_record() for mode in ("no", "yes"))
    assert kernels["provenance"]["compile"] is True
    same(plain, kernels, rel=1e-6)


def test_names_from_files_do_not_steer_the_terminal(tmp_path):
    from rich.console import Console

    from aqnfx.reporting.scan import print_scan

    name = "\x1b[31mevil\nsecond.weight"
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({name: torch.ones(4, 8)}, tmp_path / "model.safetensors")
    console = Console(width=200, record=True, file=io.StringIO())
    print_scan(aqnfx.scan(tmp_path, "int8"), console)
    assert "\x1b[31mevil" not in console.export_text()
    save_file({name: torch.full((4, 8), float("nan"))}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"weight \\x1b\[31mevil\\nsecond\.weight of .* holds NaN"):
        aqnfx.scan(tmp_path, "int8")
