"""diagnose(perturb=FORMAT): the error of a number format in place of noise, predicted and measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import aqnfx
from aqnfx.diagnosis.diagnose import run
from aqnfx.diagnosis.interpret import interpret
from aqnfx.diagnosis.options import Options
from aqnfx.diagnosis.probe_choice import prepare_probes
from aqnfx.diagnosis.statistics.sqnr import sqnr_record
from aqnfx.errors import InputError, SelectorError
from aqnfx.numerics.formats import relative_error
from aqnfx.numerics.metrics import sensitivity_score
from aqnfx.passes.pipeline import Pipeline
from aqnfx.probes.measurements import Measurements
from aqnfx.reporting.report import build_report, report_markdown
from aqnfx.reporting.sqnr import sqnr_sentence
from tests.cli.tiny import TEXT, save_model

QUICK: dict[str, Any] = {
    "samples": 6, "max_length": 24, "window": 2, "compile": "no", "batch_size": 6, "draws": 32, "perturb": "mxfp4", "pack": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "qwen2", num_hidden_layers=4)


@pytest.fixture(scope="module")
def found(directory: Path) -> Measurements:
    return run(directory, TEXT * 2, Options(**QUICK))


@pytest.fixture(scope="module")
def smap(found: Measurements) -> aqnfx.SensitivityMap:
    return interpret(found)


@pytest.mark.slow
def test_a_format_is_not_random_and_its_level_is_one(smap: aqnfx.SensitivityMap) -> None:
    noise = smap.noise
    assert (noise["kind"], noise["levels"], noise["seeds"], smap.format) == ("mxfp4", [1.0], [0], "mxfp4")
    assert noise["unit_error"] == pytest.approx(relative_error("mxfp4"))
    assert 0.11 < relative_error("mxfp4") < 0.12


def test_operands_of_products_and_outputs_of_the_rest_are_stored(smap: aqnfx.SensitivityMap) -> None:
    roles = {op: {s["role"] for s in smap.per_site if s["op"] == op} for op in {s["op"] for s in smap.per_site}}
    assert roles["linear"] == {"input", "weight"}
    assert roles["matmul"] == {"input", "key", "value"}
    assert roles["softmax"] == roles["rms_norm"] == roles["silu"] == {"output"}
    assert set(smap.per_operator) == {"linear", "matmul", "softmax", "rms_norm", "silu"}
    assert len(smap.per_layer) == 4


def test_the_measured_kl_of_a_layer_is_that_of_the_stored_layer(found: Measurements, directory: Path) -> None:
    options = Options(**QUICK)
    ready = prepare_probes(directory, TEXT * 2, options, tell=lambda _: None)
    (batch,) = ready.batches(options)
    layer = next(p for p in found.probes if p.kind == "layer")
    stored = Pipeline.parse(f'insert-fake-quant{{where="{options.where},layers:{layer.key}" format=mxfp4}}')(ready.program)
    with torch.no_grad():
        clean, noisy = (p(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits for p in (ready.program, stored))
    p, q = clean.double().log_softmax(-1), noisy.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)[:, :-1]
    expected = (kl * batch.score_mask).sum(1).numpy()
    measured = found.scores["kl"][found.probes.index(layer), 0, 0]
    np.testing.assert_allclose(measured, expected, rtol=1e-4)
    assert expected.min() > 0


def test_predictions_hold_interactions_included(found: Measurements, smap: aqnfx.SensitivityMap) -> None:
    level = smap.agreement["1"]
    assert level["probes"] >= 10
    assert level["spearman"] > 0.8
    assert 0.5 < level["median_ratio"] < 2.0
    assert found.predictions is not None
    ratios = []
    for probe in (p for p in found.planned if p.kind == "layer"):
        sites = [site for site in probe.sites if site not in found.predictions.stored_before]
        alone = sum(found.predictions.kl([site], 1.0).sum() for site in sites)
        ratios.append(found.predictions.kl(sites, 1.0).sum() / alone)
    assert max(abs(ratio - 1.0) for ratio in ratios) > 0.01


def test_what_is_stored_twice_is_one_error(directory: Path) -> None:
    """A norm's output and the inputs that read it are one value: stored once, whatever selects it."""
    found = {}
    for ops in ("linear", "linear,rms_norm"):
        options: dict[str, Any] = {**QUICK, "ops": ops, "probes": ("layer",), "method": "both"}
        m = run(directory, TEXT * 2, Options(**options))
        assert m.predictions is not None
        layers = {p.key: p for p in m.planned}
        measured = {p.key: m.scores["kl"][m.probes.index(p)].sum() for p in m.probes if p.kind == "layer"}
        found[ops] = {k: m.predictions.kl(p.sites, 1.0).sum() for k, p in layers.items()}, measured
    for plain, other in zip(*found.values(), strict=True):
        for key in plain.keys() & other.keys():
            assert other[key] == pytest.approx(plain[key], rel=1e-5)


def test_classes_take_the_error_of_the_format_as_the_level(smap: aqnfx.SensitivityMap) -> None:
    record = smap.per_layer_detail["0"]["levels"]["1"]
    assert record["score"] == pytest.approx(sensitivity_score(record["degradation"], relative_error("mxfp4")))


def test_the_report_names_the_format_and_where_sqnr_misleads(smap: aqnfx.SensitivityMap) -> None:
    report = build_report(smap)
    text = report_markdown(smap, report)
    assert report["title"].endswith("to mxfp4")
    assert "with the error of mxfp4 (relative to normal values 0.11" in report["summary"][0]
    assert "by SQNR" in str(sqnr_sentence(smap)) or "no site is far off" in str(sqnr_sentence(smap))
    assert "## Where SQNR alone would have misled" in text
    assert "the square of the sum of gradient x error of mxfp4" in text
    again = aqnfx.SensitivityMap.from_record(smap.to_record())
    assert again.sqnr == smap.sqnr


def test_every_site_has_its_signal_to_noise_ratio(smap: aqnfx.SensitivityMap) -> None:
    found = [s["activations"]["snr_db"] for s in smap.per_site]
    assert min(found) > 8.0
    assert {s["activations"]["perturbation"] for s in smap.per_site} == {"mxfp4"}
    weights = [s["activations"]["snr_db"] for s in smap.per_site if s["role"] == "weight"]
    assert np.ptp(weights) < 4.0
    assert smap.sqnr["sites"] == len(smap.per_site)


def test_the_map_and_the_scan_agree_on_what_they_share(smap: aqnfx.SensitivityMap, directory: Path) -> None:
    data = {"data": TEXT * 2, "samples": 6, "max_length": 24}
    scanned = aqnfx.scan(directory, "mxfp4", **data)  # type: ignore[arg-type]
    for role, table in (("weight", scanned.weights), ("input", scanned.activations)):
        found = {s["module"]: s for s in smap.per_site if s["role"] == role and s["op"] == "linear"}
        assert len(found) >= 28
        for module, site in found.items():
            assert table[module]["mxfp4"]["sqnr_db"] == pytest.approx(site["activations"]["snr_db"], abs=0.02), module


def test_misled_sites_are_those_whose_ranks_differ(found: Measurements) -> None:
    def site(name: str, sqnr: float, kl: float) -> dict[str, Any]:
        return {"id": name, "measured": {}, "predicted": {"1": {"kl": kl}}, "activations": {"snr_db": sqnr}}

    sites = [site(f"s{i}", 10.0 + i, 1.0 / (1 + i)) for i in range(12)]
    assert sqnr_record(found, sites)["spearman"] == pytest.approx(1.0)
    assert sqnr_record(found, sites)["misled"] == []
    sites[0]["predicted"]["1"]["kl"] = 1e-6  # the lowest ratio, and the lowest cost
    record = sqnr_record(found, sites)
    assert [(r["id"], r["sqnr_rank"], r["kl_rank"]) for r in record["misled"]] == [("s0", 1, 12)]
    assert record["spearman"] < 0.8
    assert sqnr_record(found, sites[:2]) == {}
    assert sqnr_record(dataclasses.replace(found, noise_kind="uniform"), sites) == {}


def test_single_roles_and_levels(directory: Path) -> None:
    options = {**QUICK, "perturb": "int4:g32", "roles": "weight", "ops": "linear", "levels": (0.5, 1.0), "method": "measure"}
    smap = aqnfx.diagnose(directory, TEXT * 2, **options, probes=("layer",))
    kl = [smap.per_layer_detail["0"]["levels"][level]["kl"] for level in ("0.5", "1")]
    assert kl[1] == pytest.approx(4 * kl[0], rel=0.2)
    assert smap.sqnr == {}  # nothing was predicted, so no statistics of values were read


@pytest.mark.slow
def test_checkpoints_and_traces_go_with_formats(directory: Path) -> None:
    options: dict[str, Any] = {**QUICK, "ops": "linear", "roles": "weight,input", "method": "predict", "probes": ("layer",)}
    plain = run(directory, TEXT * 2, Options(**options))
    other = run(directory, TEXT * 2, Options(**options, checkpoint=True, metric="fisher-trace"))
    assert plain.predictions is not None
    assert other.predictions is not None
    sites = [site.id for site in plain.predictions.sites]
    for site in (sites[:1], sites[-1:], sites):
        np.testing.assert_allclose(other.predictions.kl(site, 1.0), plain.predictions.kl(site, 1.0), rtol=1e-4)
    assert other.weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perturb": "mxfp5"}, "unknown format 'mxfp5'.*did you mean"),
        ({"perturb": "mxfp4", "noise": "uniform"}, "noise uniform and perturb mxfp4 were both asked"),
        ({"perturb": "mxfp4", "seeds": 3}, "seeds 3 was asked; a format is not random"),
    ],
)
def test_misuse_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Options(**options)
    with pytest.raises(SelectorError, match=r"unknown role 'weigth'.*did you mean 'weight'"):
        Options(perturb="mxfp4", roles="weigth")
