"""Intervals and tests against closed forms, scipy, and simulation."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from aqnfx.errors import InputError
from aqnfx.numerics.stats import (
    Interval,
    bootstrap_pvalue,
    bootstrap_ratio,
    bootstrap_ratios,
    holm,
    mcnemar,
    paired_accuracy_drop,
    paired_difference,
    wilson,
)


def interval(low: float, high: float) -> Interval:
    return Interval(estimate=0.5, low=low, high=high, n=3, confidence=0.95, method="wilson")


def test_interval_answers_and_record():
    assert interval(0.1, 0.9).contains(0.1)
    assert not interval(0.1, 0.9).contains(0.95)
    assert interval(0.1, 0.9).excludes_zero
    assert interval(-0.9, -0.1).excludes_zero
    assert not interval(-0.1, 0.9).excludes_zero
    assert not interval(0.0, 0.9).excludes_zero
    undefined = interval(math.nan, math.nan)
    assert not undefined.contains(0.5)
    assert not undefined.excludes_zero
    record = json.loads(json.dumps(undefined.to_record(), allow_nan=False))
    assert record == {"estimate": 0.5, "low": None, "high": None, "n": 3, "confidence": 0.95, "method": "wilson"}


def test_the_estimate_is_the_ratio_of_sums():
    found = bootstrap_ratio([1.0, 2.0, 9.0], [1.0, 1.0, 4.0])
    assert found.estimate == 2.0
    assert found.low <= 2.0 <= found.high
    assert found.n == 3
    assert found == bootstrap_ratio([1.0, 2.0, 9.0], [1.0, 1.0, 4.0])
    num, den = np.random.default_rng(0).random((2, 30))
    assert bootstrap_ratio(num, den) != bootstrap_ratio(num, den, seed=1)


def test_bca_agrees_with_scipy_for_a_mean():
    x = np.random.default_rng(0).lognormal(size=60)
    ours = bootstrap_ratio(x, np.ones_like(x), resamples=8000)
    theirs = scipy_stats.bootstrap((x,), np.mean, n_resamples=8000, method="BCa", rng=np.random.default_rng(1))
    width = ours.high - ours.low
    assert abs(ours.low - theirs.confidence_interval.low) < 0.04 * width
    assert abs(ours.high - theirs.confidence_interval.high) < 0.04 * width


def test_bca_agrees_with_scipy_for_a_ratio():
    rng = np.random.default_rng(2)
    den = rng.integers(5, 50, size=40).astype(float)
    num = den * rng.gamma(2.0, size=40)
    ours = bootstrap_ratio(num, den, resamples=8000, confidence=0.9)
    theirs = scipy_stats.bootstrap(
        (num, den), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, vectorized=True, n_resamples=8000,
        confidence_level=0.9, method="BCa", rng=np.random.default_rng(3),
    )  # fmt: skip
    width = ours.high - ours.low
    assert abs(ours.low - theirs.confidence_interval.low) < 0.04 * width
    assert abs(ours.high - theirs.confidence_interval.high) < 0.04 * width


def test_coverage_of_a_skewed_ratio_is_near_nominal():
    rng = np.random.default_rng(4)
    n, trials = 50, 400
    hits = 0
    for trial in range(trials):
        den = rng.integers(10, 100, size=n).astype(float)
        found = bootstrap_ratio(den * rng.exponential(2.0, size=n), den, resamples=400, seed=trial)
        hits += found.contains(2.0)
    assert 0.90 <= hits / trials <= 0.98  # nominal 0.95; binomial error of 400 trials is 0.011


def test_batched_form_equals_one_at_a_time_and_is_paired():
    rng = np.random.default_rng(5)
    den = rng.integers(1, 9, size=30).astype(float)
    num = rng.normal(size=(2, 3, 30))
    estimate, low, high = bootstrap_ratios(num, den, resamples=300, seed=7)
    assert estimate.shape == low.shape == high.shape == (2, 3)
    one = bootstrap_ratio(num[1, 2], den, resamples=300, seed=7)
    np.testing.assert_allclose([estimate[1, 2], low[1, 2], high[1, 2]], [one.estimate, one.low, one.high], rtol=1e-12)


def test_blocks_of_resamples_do_not_change_the_result(monkeypatch):
    num, den = np.random.default_rng(6).random((2, 20))
    whole = bootstrap_ratio(num, den, resamples=500)
    monkeypatch.setattr("aqnfx.numerics.bootstrap._BLOCK", 20 * 7)
    split = bootstrap_ratio(num, den, resamples=500)
    np.testing.assert_allclose([split.low, split.high], [whole.low, whole.high], rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    data=st.lists(st.tuples(st.floats(-50, 50), st.floats(0.5, 20)), min_size=2, max_size=12),
    scale=st.sampled_from([0.25, 1.0, 8.0]),
)
def test_bounds_are_ordered_within_the_data_and_scale(data, scale):
    num, den = (np.array(column) for column in zip(*data, strict=True))
    found = bootstrap_ratio(num, den, resamples=100)
    ratios = num / den
    slack = 1e-9 * (1 + np.abs(ratios).max())
    assert ratios.min() - slack <= found.low <= found.high <= ratios.max() + slack
    scaled = bootstrap_ratio(scale * num, den, resamples=100)
    assert scaled.low == pytest.approx(scale * found.low, abs=slack * scale)
    assert scaled.high == pytest.approx(scale * found.high, abs=slack * scale)


def test_one_sample_has_an_estimate_and_no_bounds():
    found = bootstrap_ratio([3.0], [2.0])
    assert found.estimate == 1.5
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert not found.excludes_zero


def test_weights_of_zero_are_ignored():
    found = bootstrap_ratio([3.0, 0.0, 1.0], [2.0, 0.0, 2.0], resamples=200)
    assert found.estimate == 1.0
    assert 0.5 <= found.low <= found.high <= 1.5
    nothing = bootstrap_ratio([0.0, 0.0], [0.0, 0.0])
    assert math.isnan(nothing.estimate)
    assert math.isnan(nothing.low)


def test_samples_that_agree_have_no_width():
    found = bootstrap_ratio([0.3 * w for w in (1, 7, 3)], [1.0, 7.0, 3.0])
    assert found.low == pytest.approx(0.3)
    assert found.high == pytest.approx(0.3)


@pytest.mark.parametrize("n", [10, 20])
def test_ties_count_half_so_that_symmetric_scores_have_symmetric_bounds(n):
    """Where many resamples equal the estimate, as with gains and losses of one, it is not pulled to either side."""
    found = bootstrap_ratio([-1.0, 1.0] * (n // 2), [1.0] * n)
    assert found.low == -found.high < 0.0


def test_paired_difference_is_narrower_than_the_ratios():
    rng = np.random.default_rng(8)
    base = rng.exponential(size=80)
    a, b, den = base + 0.05 + 0.01 * rng.normal(size=80), base, np.ones(80)
    difference = paired_difference(a, b, den)
    alone = bootstrap_ratio(a, den)
    assert difference.excludes_zero
    assert difference.contains(0.05)
    assert difference.high - difference.low < 0.1 * (alone.high - alone.low)
    swapped = paired_difference(b, a, den)
    assert swapped.estimate == -difference.estimate
    assert swapped.high < 0


def test_paired_accuracy_drop():
    clean = np.array([1, 1, 1, 1, 0, 1, 1, 0, 1, 1], dtype=float)
    noisy = np.array([1, 0, 1, 0.5, 0, 1, 1, 0.5, 1, 1])
    found = paired_accuracy_drop(clean, noisy)
    assert found.estimate == pytest.approx((8 - 7) / 8)
    assert found.contains(found.estimate)
    assert paired_accuracy_drop(clean, clean).low == paired_accuracy_drop(clean, clean).high == 0.0
    nothing = paired_accuracy_drop([0.0, 0.0], [1.0, 0.0])
    assert math.isnan(nothing.estimate)
    assert math.isnan(nothing.low)


@given(n=st.integers(1, 400), share=st.floats(0, 1), confidence=st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_is_its_closed_form(n, share, confidence):
    k = round(share * n)
    found = wilson(k, n, confidence)
    z = scipy_stats.norm.isf((1 - confidence) / 2)
    p = k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found.estimate == p
    assert found.n == n
    assert found.contains(p)
    assert found.low == pytest.approx(max(0.0, middle - half), abs=1e-12)
    assert found.high == pytest.approx(min(1.0, middle + half), abs=1e-12)


def test_mcnemar_counts_only_disagreements():
    clean = [1] * 9 + [0] * 2 + [1] * 30
    noisy = [0] * 9 + [1] * 2 + [1] * 30
    assert mcnemar(clean, noisy) == pytest.approx(scipy_stats.binomtest(9, 11, 0.5).pvalue)
    assert mcnemar(clean, noisy) == mcnemar(noisy, clean)
    assert mcnemar([1, 0, 1], [1, 0, 1]) == 1.0
    assert mcnemar([True] * 6, [False] * 6) == pytest.approx(2 * 0.5**6)


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([]).size == 0
    assert holm([0.2]).tolist() == [0.2]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_raw_and_bonferroni_and_keeps_the_order(p):
    adjusted = holm(p)
    assert (adjusted >= np.array(p)).all()
    assert (adjusted <= np.minimum(1, len(p) * np.array(p)) + 1e-15).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


def test_bootstrap_pvalue_under_the_null_and_under_an_effect():
    rng = np.random.default_rng(9)
    den = np.ones(60)
    null = [bootstrap_pvalue(rng.normal(size=60), den, resamples=199, seed=i) for i in range(300)]
    assert 0.02 <= np.mean(np.array(null) <= 0.05) <= 0.09
    assert min(null) >= 1 / 200
    assert bootstrap_pvalue(rng.normal(size=60) + 2, den, resamples=199) == 1 / 200
    assert bootstrap_pvalue([5.0], [1.0]) == 1.0
    assert bootstrap_pvalue([0.3, 0.3, 0.3], [1.0, 1.0, 1.0]) == 0.25
    assert bootstrap_pvalue([0.0, 0.0], [1.0, 1.0]) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_ratio([], []), "no samples"),
        (lambda: bootstrap_ratio([1.0], [1.0, 2.0]), "last dimension"),
        (lambda: bootstrap_ratio([[1.0]], [1.0]), "one number per sample"),
        (lambda: bootstrap_ratio([math.nan, 1.0], [1.0, 1.0]), "finite"),
        (lambda: bootstrap_ratio([1.0, 1.0], [1.0, math.inf]), "finite"),
        (lambda: bootstrap_ratio([1.0, 1.0], [1.0, -1.0]), "negative"),
        (lambda: bootstrap_ratio([1.0, 1.0], [1.0, 1.0], confidence=1.0), "confidence"),
        (lambda: bootstrap_ratio([1.0, 1.0], [1.0, 1.0], resamples=0), "resamples"),
        (lambda: bootstrap_pvalue([1.0, 1.0], [1.0, 1.0], resamples=0), "resamples"),
        (lambda: paired_difference([1.0], [1.0, 2.0], [1.0]), "same samples"),
        (lambda: paired_accuracy_drop([1.0], [1.0, 2.0]), "same samples"),
        (lambda: wilson(0, 0), "n >= 1"),
        (lambda: wilson(5, 4), "5 of 4"),
        (lambda: wilson(1, 4, 0.0), "confidence"),
        (lambda: mcnemar([1, 0], [1]), "same samples"),
        (lambda: mcnemar([0.5], [1]), "0 or 1"),
        (lambda: holm([0.5, 1.2]), "from 0 to 1"),
        (lambda: holm([math.nan]), "from 0 to 1"),
        (lambda: holm([[0.5]]), "one sequence"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
