"""Thresholds at their borders, and the search for the critical level on curves with a known answer."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqnfx.errors import InputError
from aqnfx.numerics.metrics import (
    classify_sensitivity,
    classify_window,
    critical_threshold,
    noise_tolerance_index,
    relative_degradation,
    sensitivity_score,
)


def test_relative_degradation():
    assert relative_degradation(0.8, 0.6) == pytest.approx(0.25)
    assert relative_degradation(0.5, 0.6) == pytest.approx(-0.2)
    assert math.isnan(relative_degradation(0.0, 0.3))


def test_noise_tolerance_index():
    assert noise_tolerance_index(0.25) == 4.0
    assert noise_tolerance_index(0.0) == noise_tolerance_index(-0.1) == math.inf
    assert math.isnan(noise_tolerance_index(math.nan))


def test_sensitivity_score():
    assert sensitivity_score(0.1, 0.05) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("score", "expected"),
    [(3.01, "critical"), (3.0, "moderate"), (1.5, "moderate"), (1.49, "robust"), (-1.0, "robust"),
     (math.inf, "critical"), (math.nan, "undefined")],
)  # fmt: skip
def test_classify_sensitivity(score, expected):
    assert classify_sensitivity(score) == expected


@pytest.mark.parametrize(
    ("degradation", "expected"),
    [(0.151, "avalanche"), (0.15, "high"), (0.10, "high"), (0.099, "moderate"), (0.05, "moderate"), (0.049, "robust"),
     (-0.2, "robust"), (math.nan, "undefined")],
)  # fmt: skip
def test_classify_window(degradation, expected):
    assert classify_window(degradation) == expected


def test_thresholds_can_be_set():
    assert classify_sensitivity(1.2, critical=1.0, moderate=0.5) == "critical"
    assert classify_window(0.3, avalanche=0.5, high=0.25, moderate=0.1) == "high"


@given(scale=st.floats(0.5, 50), power=st.floats(0.5, 3))
def test_bisection_finds_the_level_of_a_power_law(scale, power):
    found = critical_threshold(lambda s: scale * s**power, low=1e-4, high=10.0, tolerance=1e-3, max_evaluations=60)
    truth = (0.10 / scale) ** (1 / power)
    if found.reached == "between":
        assert found.level == pytest.approx(truth, rel=2e-3)
        assert found.bracket[0] < truth <= found.bracket[1] * 1.001
        assert found.converged
        assert found.monotone
    else:
        assert truth <= 1.001e-4


def test_the_level_was_measured_to_cost_that_much_and_points_are_kept():
    calls = []

    def curve(level):
        calls.append(level)
        return level**2

    found = critical_threshold(curve, cost=0.09, low=0.01, high=1.0, tolerance=0.01)
    assert found.level**2 >= 0.09 > found.bracket[0] ** 2
    assert sorted(calls) == [level for level, _ in found.evaluations]
    assert len(calls) == len(set(calls)) <= 12
    assert found.describe() == f"{found.level:.4g}"


def test_bisection_from_zero_is_linear():
    found = critical_threshold(lambda s: s, low=0.0, high=1.0, tolerance=0.01, max_evaluations=30)
    assert found.level == pytest.approx(0.1, rel=0.011)


def test_never_reached():
    found = critical_threshold(lambda s: 0.01 * s, low=0.01, high=0.5)
    assert found.level is None
    assert found.reached == "never"
    assert found.bracket is None
    assert found.describe() == "not reached up to 0.5"


def test_already_reached_at_low():
    found = critical_threshold(lambda s: 0.2, low=0.01, high=0.5)
    assert found.level == 0.01
    assert found.reached == "at low"
    assert found.describe().startswith("<= 0.01")
    assert len(found.evaluations) == 1


def test_evaluations_run_out():
    found = critical_threshold(lambda s: s, low=1e-6, high=1.0, tolerance=1e-6, max_evaluations=5)
    assert len(found.evaluations) == 5
    assert not found.converged
    assert "between" in found.describe()


def test_a_hump_is_found_and_said():
    found = critical_threshold(lambda s: 0.3 if 0.02 < s < 0.3 else 0.05, low=0.001, high=1.0, max_evaluations=20)
    assert found.level == pytest.approx(0.02, rel=0.06)
    assert not found.monotone
    assert "not monotone" in found.describe()


def test_a_wiggle_is_said_though_bisection_passes_it():
    found = critical_threshold(lambda s: -0.01 if 0.02 < s < 0.05 else s, low=0.001, high=1.0)
    assert found.level == pytest.approx(0.1, rel=0.06)
    assert not found.monotone


def test_points_are_interpolated_after_the_running_maximum():
    found = critical_threshold(((0.1, 0.2, 0.3, 0.4), (0.0, 0.06, 0.02, 0.14)))
    assert found.level == pytest.approx(0.35)
    assert found.bracket == (0.3, 0.4)
    assert not found.monotone
    assert critical_threshold(((0.1, 0.2), (0.0, 0.2))).level == pytest.approx(0.15)
    assert critical_threshold(((0.1, 0.2), (0.0, 0.1))).level == pytest.approx(0.2)


def test_points_never_and_at_low():
    assert critical_threshold(((0.1, 0.2), (0.0, 0.01))).describe() == "not reached up to 0.2"
    found = critical_threshold(((0.1, 0.2), (0.11, 0.3)))
    assert found.reached == "at low"
    assert found.level == 0.1
    assert critical_threshold(((0.1, 0.2, 0.9), (0.0, 0.01, 0.5)), high=0.5).level is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: relative_degradation(math.nan, 0.5), "finite"),
        (lambda: relative_degradation(1.0, math.inf), "finite"),
        (lambda: sensitivity_score(0.1, 0.0), "level"),
        (lambda: classify_sensitivity(1.0, critical=1.0, moderate=2.0), "rise"),
        (lambda: classify_window(1.0, high=0.5), "rise"),
        (lambda: critical_threshold(lambda s: s, cost=0.0), "cost"),
        (lambda: critical_threshold(lambda s: s, low=0.5, high=0.5), "low < high"),
        (lambda: critical_threshold(lambda s: s, low=-0.1), "low < high"),
        (lambda: critical_threshold(lambda s: s, tolerance=0.0), "tolerance"),
        (lambda: critical_threshold(lambda s: s, max_evaluations=1), "max_evaluations"),
        (lambda: critical_threshold(lambda s: math.nan), "clean score of 0"),
        (lambda: critical_threshold(((0.1, 0.2), (0.1,))), "2 levels but 1"),
        (lambda: critical_threshold(((0.2, 0.1), (0.1, 0.2))), "must rise"),
        (lambda: critical_threshold(((), ())), "no levels"),
        (lambda: critical_threshold(((0.1,), (math.inf,))), "0.1 is inf"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
