"""diagnose --method: predictions first, the right probes measured, estimates marked, and everything checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aqnfx
from aqnfx.diagnosis.advice.recommend import recommend
from aqnfx.diagnosis.diagnose import run
from aqnfx.diagnosis.interpret import interpret
from aqnfx.diagnosis.options import Options
from aqnfx.diagnosis.probe_choice import CHECKS, choose_probes
from aqnfx.diagnosis.statistics.fit import Fit, FitError, agreement, with_estimates
from aqnfx.diagnosis.statistics.thresholds import confirm, predicted_threshold
from aqnfx.errors import Interrupted
from aqnfx.probes.measurements import Measurements, Probe
from aqnfx.reporting.report import save_report
from tests.cli.tiny import TEXT, save_model

QUICK: dict[str, Any] = {
    "samples": 6, "seeds": 2, "levels": (0.1, 0.3), "max_length": 24, "window": 2, "compile": "no", "batch_size": 4,
    "draws": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "qwen2", num_hidden_layers=9)


@pytest.fixture(scope="module")
def both(directory: Path) -> Measurements:
    return run(directory, TEXT * 2, Options(**QUICK))


@pytest.fixture(scope="module")
def smap(both: Measurements) -> Any:
    return interpret(both)


def test_the_default_predicts_and_measures(both: Measurements) -> None:
    assert both.predictions is not None
    assert Options().method == "both"
    assert {p.kind for p in both.planned} == {"operator", "layer", "window", "all"}
    assert {p.kind for p in both.probes} == {"operator", "layer", "window", "all", "site"}
    assert sum(p.kind == "site" for p in both.probes) == sum(CHECKS["site"])
    assert sum(p.kind == "layer" for p in both.probes) == sum(CHECKS["layer"]) < 9
    assert both.predictions.samples == both.samples == 6
    assert set(both.predictions.kl(both.probes[0].sites, 0.1).shape) == {6}


def test_the_top_probes_are_measured(both: Measurements) -> None:
    predictions = both.predictions
    assert predictions is not None
    for kind in ("operator", "layer"):
        cost = {p: predictions.kl(p.sites, 0.3).sum() for p in both.planned if p.kind == kind}
        top = sorted(cost, key=lambda p: -cost[p])[: CHECKS[kind][0]]
        assert set(top) <= set(both.probes)


def test_another_seed_samples_other_sites(both: Measurements) -> None:
    assert both.predictions is not None
    candidates = tuple(Probe(kind="site", key=s.id, sites=(s.id,)) for s in both.predictions.sites)
    first, again, other = (choose_probes(candidates, both.predictions, 0.3, CHECKS, seed=s) for s in (0, 0, 1))
    assert first == again != other


def test_every_operator_layer_and_window_is_in_the_map(smap: Any) -> None:
    assert len(smap.per_layer) == 9
    assert len(smap.windows) == 8
    estimated = [k for k, v in smap.per_layer_detail.items() if v["estimated"]]
    assert len(estimated) == 9 - sum(CHECKS["layer"])
    for key in estimated:
        record = smap.per_layer_detail[key]["levels"]["0.3"]
        assert record["estimated"]
        assert not record["distinguishable"]
        assert record["p"] is None
        low, high = record["degradation_ci"]
        assert low <= record["degradation"] <= high
        assert record["kl"] == pytest.approx(record["predicted"]["kl"])
        assert int(key) not in smap.critical_layers
    assert all(v["levels"]["0.3"]["predicted"]["kl"] > 0 for v in smap.per_layer_detail.values())
    assert any("were predicted and not measured" in note for note in smap.notes)


def test_every_site_is_predicted_and_some_are_measured(smap: Any, both: Measurements) -> None:
    assert both.predictions is not None
    assert len(smap.per_site) == len(both.predictions.sites)
    measured = [s for s in smap.per_site if s["measured"]]
    assert len(measured) == sum(CHECKS["site"])
    for site in smap.per_site:
        assert site["predicted"]["0.3"]["kl"] == pytest.approx(9 * site["predicted"]["0.1"]["kl"])
        assert site["activations"]["mean_magnitude"] > 0
    assert smap.channels


def test_agreement_is_that_of_the_measured_probes(both: Measurements, smap: Any) -> None:
    found = agreement(both)
    assert found.keys() == {"0.1", "0.3"}
    assert found == smap.agreement
    assert found["0.1"]["probes"] == len(both.probes)
    assert 0.8 < found["0.1"]["median_ratio"] < 1.2
    assert found["0.1"]["spearman"] > 0.95
    assert not found["0.1"]["second_order_fails"]


def test_wrong_predictions_are_seen(both: Measurements) -> None:
    import dataclasses

    assert both.predictions is not None
    wrong = dataclasses.replace(both.predictions, costs=both.predictions.costs * 2.0)
    broken = interpret(dataclasses.replace(both, predictions=wrong))
    assert broken.agreement["0.1"]["second_order_fails"]
    assert any("second order does not hold" in note for note in broken.notes)
    base = dataclasses.replace(broken, agreement={"0.3": broken.agreement["0.1"]})
    (last,) = (item for item in recommend(base) if item.priority == 4)
    estimated = [row["key"] for row in base.ranking["layers"] if row["estimated"]]
    assert "were only predicted: use --method measure" in last.reason
    assert all(key in last.reason for key in estimated)
    assert not any(set(item.targets) & set(estimated) for item in recommend(base) if item.subject == "layer")


def test_windows_compare_with_their_prediction(smap: Any) -> None:
    for window in smap.windows:
        if window.get("estimated"):
            assert window["measured"] is None
            assert window["amplification"] is None
            assert not window["avalanche"]
        else:
            assert window["amplification"] == pytest.approx(window["measured"] / window["predicted"])
            low, high = window["amplification_ci"]
            assert low <= window["amplification"] <= high
            assert window["avalanche"] <= (low > 1.0)
    assert any(not w.get("estimated") for w in smap.windows)


def test_thresholds_are_measured_where_they_were_predicted(both: Measurements, smap: Any) -> None:
    confirmed = smap.critical_threshold["confirmed"]
    for single in both.confirmed:
        probe, level = single.probes[0], single.levels[0]
        expected = predicted_threshold(both, probe)
        assert expected is not None
        assert 0.5 * expected <= level <= 2.0 * expected  # moved once at most
        record = confirmed[f"{probe.kind}s"][probe.key]
        assert (record["level"], record["predicted_level"]) == (level, expected)
        assert record["degradation"] == pytest.approx(0.1, abs=0.05)
    assert both.confirmed


def test_the_fit_is_monotone_and_goes_through_zero() -> None:
    fit = Fit.through(np.array([0.01, 0.04, 0.09, np.nan]), np.array([0.1, 0.05, 0.3, 1.0]))
    assert fit(0.0) == 0.0
    grid = fit(np.linspace(0.0, 0.2, 50))
    assert (np.diff(grid) >= 0).all()
    assert fit(0.01) == fit(0.04) == pytest.approx(0.075)
    assert fit(5.0) == pytest.approx(0.3) == fit(fit.largest)
    assert np.isnan(fit(np.nan))
    assert Fit.through(np.array([]), np.array([]))(1.0) == 0.0


def test_the_error_of_the_fit_is_that_of_probes_left_out() -> None:
    rng = np.random.default_rng(0)
    kl = np.exp(rng.uniform(-7, -1, (40, 2)))
    truth = np.sqrt(kl) / 2

    def error(spread: float, rows: int = 40) -> FitError:
        noisy = np.clip(truth * (1 + spread * rng.standard_normal(kl.shape)), 0, 1)
        return FitError.of(kl[:rows], noisy[:rows], 1000.0, 0.95)

    wide, narrow = error(0.5), error(0.01)
    assert wide.quantile > 3 * narrow.quantile
    # As an interval it holds what it promises: new probes of the same kind lie inside it about as often.
    fresh = np.exp(rng.uniform(-7, -1, 4000))
    seen = np.clip(np.sqrt(fresh) / 2 * (1 + 0.5 * rng.standard_normal(fresh.shape)), 0, 1)
    noisy = np.clip(truth * (1 + 0.5 * rng.standard_normal(kl.shape)), 0, 1)
    fit, half = Fit.through(kl, noisy), FitError.of(kl, noisy, 1000.0, 0.95)
    expected = fit(fresh)
    assert np.mean(np.abs(seen - expected) <= half(expected)) > 0.85
    assert error(0.5, rows=1).quantile > wide.quantile  # nothing to read the one probe off but zero
    assert FitError.of(kl[:0], kl[:0], 10.0, 0.95).quantile == np.inf


def test_estimated_intervals_hold_the_error_of_the_fit(both: Measurements, smap: Any) -> None:
    filled, errors = with_estimates(both)
    assert errors
    for row, error in errors.items():
        probe = filled.probes[row]
        if probe.kind == "layer":
            record = smap.per_layer_detail[probe.key]["levels"]["0.1"]
            low, high = record["degradation_ci"]
            assert 0.0 <= low <= record["degradation"] <= high <= 1.0
            assert high == pytest.approx(1.0) or high - record["degradation"] >= error[0] * (1 - 1e-9)
    assert all(s["activations"].keys() >= {"grad_magnitude", "grad_rms"} for s in smap.per_site)


def test_without_predictions_nothing_is_estimated(directory: Path) -> None:
    measured = run(directory, TEXT, Options(**QUICK | {"method": "measure", "probes": ("layer",)}))
    assert with_estimates(measured) == (measured, {})
    found = interpret(measured)
    assert found.method == "measure"
    assert found.agreement == {} == found.channels
    assert all(s["predicted"] == {} for s in found.per_site)


def test_estimated_sites_are_not_called_measured(directory: Path, tmp_path: Path) -> None:
    found = run(directory, TEXT, Options(**QUICK | {"method": "predict", "probes": ("site",)}))
    smap = interpret(found)
    measured = {p.key for p in found.probes}
    assert {s["id"] for s in smap.per_site if s["measured"]} == measured
    assert len([s for s in smap.per_site if s.get("estimated")]) == len(smap.per_site) - len(measured) > 10
    text = save_report(smap, tmp_path)["markdown"].read_text(encoding="utf-8")
    assert "not measured" in text
    assert "Nothing was found" not in text
    assert "the most sensitive is" in text
    assert "single sites" in text


def test_few_noisy_samples_settle_nothing(both: Measurements) -> None:
    """Predictions that are off by less than their own noise are not said to fail."""
    import dataclasses

    assert both.predictions is not None
    noisy = both.predictions.costs * np.resize([3.0, 0.2], both.samples)
    found = agreement(dataclasses.replace(both, predictions=dataclasses.replace(both.predictions, costs=noisy)))
    assert abs(found["0.1"]["median_ratio"] - 1.0) > 0.25
    assert not found["0.1"]["second_order_fails"]
    assert found["0.1"]["unsettled"]


@pytest.mark.slow
def test_predict_measures_little_and_still_checks(directory: Path) -> None:
    found = run(directory, TEXT, Options(**QUICK | {"method": "predict"}))
    assert len(found.probes) < 12
    assert not any(p.kind == "window" for p in found.probes)
    assert interpret(found).agreement["0.1"]["probes"] == len(found.probes)


@pytest.mark.parametrize("metric", ["fisher-trace", "hessian-trace"])
def test_classical_metrics_are_in_map_and_report(directory: Path, tmp_path: Path, metric: str) -> None:
    options = QUICK | {"method": "predict", "metric": metric, "samples": 3, "batch_size": 1, "layers": "0-1"}
    found = aqnfx.diagnose(directory, TEXT, **options)
    values = [v["value"] for v in found.weights["values"].values()]
    assert values == sorted(values, reverse=True)
    assert found.weights["metric"] == metric
    assert all(v["error"] is not None for v in found.weights["values"].values())
    text = save_report(found, tmp_path)["markdown"].read_text(encoding="utf-8")
    assert f"Weights by {metric}" in text
    assert "Predictions against measurements" in text


@pytest.mark.slow
def test_the_batch_size_changes_no_prediction(directory: Path, both: Measurements) -> None:
    other = run(directory, TEXT * 2, Options(**QUICK | {"batch_size": 1, "method": "predict"}))
    assert other.predictions is not None
    assert both.predictions is not None
    np.testing.assert_allclose(other.predictions.costs, both.predictions.costs, rtol=2e-3)
    light = run(directory, TEXT * 2, Options(**QUICK | {"checkpoint": True, "method": "predict"}))
    assert light.predictions is not None
    np.testing.assert_allclose(light.predictions.costs, both.predictions.costs, rtol=1e-6)
    assert light.captures is not None
    assert both.captures is not None
    for site in both.captures.records:  # recomputed forward passes count neither values nor gradients twice
        assert light.captures.statistics(site) == pytest.approx(both.captures.statistics(site), rel=1e-6)


def test_an_interruption_of_the_confirmation_keeps_the_map(both: Measurements) -> None:
    calls: list[str] = []

    def stopped(probe: Probe, _level: float) -> Measurements:
        calls.append(probe.key)
        if len(calls) > 1:
            raise Interrupted("interrupted before the first probe was finished on the first samples")
        return both.confirmed[0]

    assert confirm(both, stopped) == ((both.confirmed[0],), False)
    assert len(calls) == 2
