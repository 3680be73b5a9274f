"""interpret() against synthetic runs whose truth is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from synthetic_run import BASE, TRUTH, run, sites

from aqnfx.diagnosis.interpret import interpret
from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.errors import InputError


@pytest.fixture(scope="module")
def smap() -> SensitivityMap:
    return interpret(run())


def test_truth_is_recovered(smap: SensitivityMap) -> None:
    for kind, table, kls in (
        ("operator", smap.per_operator, smap.per_operator_kl),
        ("layer", smap.per_layer, smap.per_layer_kl),
    ):
        expected = {key: pair for (k, key), pair in TRUTH.items() if k == kind}
        assert set(table) == set(expected)
        for key, (degradation, kl) in expected.items():
            assert table[key] == pytest.approx(degradation, abs=0.02)
            assert kls[key] == pytest.approx(kl, rel=0.15)


def test_detail_has_every_level_and_brackets_its_estimates(smap: SensitivityMap) -> None:
    detail = smap.per_layer_detail["2"]["levels"]
    assert list(detail) == ["0.01", "0.05", "0.1"]
    for level, values in detail.items():
        for value, ci in (
            ("kl", "ci"), ("degradation", "degradation_ci"), ("top1_agreement", "top1_ci"),
            ("nll_delta", "nll_delta_ci"), ("score", "score_ci"),
        ):  # fmt: skip
            assert values[ci][0] < values[value] < values[ci][1]
        assert values["score"] == pytest.approx(values["degradation"] / float(level))
        assert values["top1_agreement"] == pytest.approx(1.0 - values["degradation"])
        assert values["nll_delta"] == pytest.approx(1.1 * values["kl"])
        assert (values["n"], values["seeds"]) == (120, 2)


def test_one_sensitive_layer_stands_out_and_the_others_tie(smap: SensitivityMap) -> None:
    rows = smap.ranking["layers"]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["key"] == "2"
    assert not rows[0]["tied_with_next"]
    assert rows[1]["tied_with_next"]
    assert rows[2]["tied_with_next"]
    assert not any(row["tied_with_first"] for row in rows)
    assert "difference_to_next" not in rows[-1]
    assert smap.critical_layers == [2]
    assert smap.critical_ops == ["linear"]


def test_all_zero_probe_is_not_distinguishable(smap: SensitivityMap) -> None:
    silent = smap.at_base("operator", "silu")
    assert silent["degradation"] == 0.0
    assert silent["degradation_ci"] == [0.0, 0.0]
    assert silent["p"] == 1.0
    assert not silent["distinguishable"]
    assert silent["tolerance_index"] is None
    assert smap.at_base("operator", "softmax")["distinguishable"]


def test_windows(smap: SensitivityMap) -> None:
    small, large = smap.windows
    assert small["layers"] == [0, 1]
    assert large["layers"] == [1, 2, 3]
    assert large["predicted"] == pytest.approx(sum(smap.per_layer_kl[key] or 0.0 for key in "123"))
    assert large["amplification"] == pytest.approx(large["measured"] / large["predicted"])
    low, high = large["amplification_ci"]
    assert 1.0 < low < large["amplification"] < high
    assert large["superadditive"]
    assert large["class"] == "avalanche"
    assert large["avalanche"]
    assert not small["superadditive"]
    assert small["class"] == "robust"
    assert small["amplification_ci"][0] < 1.0 < small["amplification_ci"][1]
    assert smap.avalanche_points == [[1, 2, 3]]


def test_avalanche_and_superadditivity_are_separate() -> None:
    truth = {("layer", "0"): (0.1, 0.1), ("layer", "1"): (0.1, 0.1), ("window", "0-1"): (0.3, 0.1)}
    window = interpret(run(truth)).windows[0]
    assert window["avalanche"]
    assert not window["superadditive"]
    assert window["amplification"] == pytest.approx(0.5, rel=0.1)


def test_critical_threshold_is_read_off_the_curve(smap: SensitivityMap) -> None:
    limits = smap.critical_threshold
    assert limits["cost"] == 0.10
    assert limits["max_level"] == 0.1
    assert limits["layers"]["2"] == pytest.approx(BASE * 0.10 / 0.25, rel=0.1)
    assert limits["layers"]["0"] is None
    assert limits["operators"]["silu"] is None


def test_sites_with_and_without_own_probe() -> None:
    probed = sites()[0].id
    found = interpret(run({("site", probed): (0.1, 0.1)}))
    by_id = {record["id"]: record for record in found.per_site}
    assert set(by_id) == {site.id for site in sites()}
    assert by_id[probed]["measured"]["0.05"]["kl"] == pytest.approx(0.1, rel=0.15)
    assert by_id[probed]["layer"] == 0
    assert by_id[probed]["region"] == "mlp"
    assert by_id["lm_head:linear:0"]["measured"] == {}
    assert by_id["lm_head:linear:0"]["layer"] is None
    assert found.per_operator == {}
    assert found.per_layer == {}
    assert found.windows == []


def test_window_without_its_layers_has_no_prediction() -> None:
    window = interpret(run({("window", "0-1"): (0.1, 0.1), ("layer", "0"): (0.1, 0.1)})).windows[0]
    assert window["measured"] > 0.0
    assert window["predicted"] is None
    assert window["amplification"] is None
    assert not window["superadditive"]


def test_window_over_silent_layers_has_no_amplification() -> None:
    truth = {("layer", "0"): (0.0, 0.0), ("layer", "1"): (0.0, 0.0), ("window", "0-1"): (0.1, 0.1)}
    window = interpret(run(truth)).windows[0]
    assert window["predicted"] == 0.0
    assert window["amplification"] is None


def test_all_probe_is_kept() -> None:
    found = interpret(run({("all", "all"): (0.3, 0.3)}))
    assert found.all_sites["levels"]["0.05"]["degradation"] == pytest.approx(0.3, abs=0.03)


def test_exact_match_degradation_is_relative_to_clean_accuracy() -> None:
    found = interpret(run(exact_match=True))
    assert found.task["degradation"] == "exact_match"
    accuracy = found.baseline["accuracy"]
    values = found.at_base("layer", "2")
    assert values["degradation"] == pytest.approx((accuracy - values["exact_match"]["value"]) / accuracy)
    assert values["exact_match"]["ci"][0] < values["exact_match"]["value"] < values["exact_match"]["ci"][1]
    assert found.at_base("operator", "silu")["exact_match"]["mcnemar_p"] == 1.0
    heavy = found.per_layer_detail["2"]["levels"]["0.1"]
    assert heavy["exact_match"]["mcnemar_p"] < 0.001
    assert heavy["distinguishable"]


def test_exact_match_without_clean_success_falls_back() -> None:
    m = run(exact_match=True, n=30)
    m.clean["exact_match"][:] = 0.0
    m.scores["exact_match"][:] = 0.0
    found = interpret(m)
    assert found.task["degradation"] == "1 - top1"
    assert any("solves no sample" in note for note in found.notes)
    assert found.per_layer["2"] == pytest.approx(0.25, abs=0.05)


def test_numbers_that_are_not_finite_become_null() -> None:
    m = run(n=30)
    m.scores["kl"][0, 1, 0, 3] = np.inf
    m.scores["kl"][1, 1, :, 3] = np.nan  # a run that failed: a sample less
    found = interpret(m)
    record = json.loads(json.dumps(found.to_record(), allow_nan=False))
    assert record["per_operator_kl"]["linear"] is None
    assert record["per_operator_detail"]["linear"]["levels"]["0.05"]["ci"] == [None, None]
    assert record["per_operator_kl"]["softmax"] is not None
    assert any("linear" in note for note in found.notes)
    assert found.at_base("operator", "softmax")["n"] == 29
    assert found.at_base("layer", "0")["n"] == 30


def test_one_sample_one_seed_gives_no_claims() -> None:
    found = interpret(run(n=1, seeds=1))
    values = found.at_base("layer", "2")
    assert values["degradation"] is not None
    assert values["degradation_ci"] == [None, None]
    assert not values["distinguishable"]
    assert values["seed_std"] == {"kl": None, "degradation": None}
    assert found.critical_layers == []
    assert found.avalanche_points == []
    assert all(row["tied_with_next"] for row in found.ranking["layers"][:-1])
    assert any("Only 1 sample" in note for note in found.notes)


def test_partial_run_is_carried() -> None:
    found = interpret(run(n=30, complete=False, samples_requested=100))
    assert found.partial
    assert found.to_record()["partial"] is True
    assert found.task["samples_requested"] == 100
    assert any("30 of 100" in note for note in found.notes)


def test_same_measurements_give_the_same_map(smap: SensitivityMap) -> None:
    assert interpret(run()) == smap


def test_intervals_cover_the_truth() -> None:
    """At 90 % confidence, of 9 probes x 3 levels at least three quarters must cover what generated them."""
    found = interpret(run(), confidence=0.9)
    hits = [
        values["degradation_ci"][0] <= TRUTH[kind, key][0] * float(level) / BASE <= values["degradation_ci"][1]
        for kind, table in (("operator", found.per_operator_detail), ("layer", found.per_layer_detail))
        for key, entry in table.items()
        for level, values in entry["levels"].items()
    ]
    assert np.mean(hits) >= 0.75


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "0 of 0 samples"),
        ({"n": 0, "complete": False, "samples_requested": 8}, "interrupted before the first"),
        ({"base_level": 0.02}, "base level 0.02 is not one of the measured levels 0.01, 0.05, 0.1"),
        ({"truth": {}}, "0 probes"),
        ({"tokens": np.zeros(120, dtype=np.int64)}, "no scored position"),
    ],
)
def test_nothing_to_interpret(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        interpret(run(**change))  # type: ignore[arg-type]


def test_options_out_of_range() -> None:
    with pytest.raises(InputError, match="confidence"):
        interpret(run(n=5), confidence=95.0)
