"""The statistics that diagnosis adds to the numeric library."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from aqnfx.diagnosis.statistics.samples import Intervals, holm_columns, paired_p, ratios, seed_spread


def test_paired_p_is_the_t_test() -> None:
    values = np.random.default_rng(0).normal(0.3, 1.0, size=(4, 3, 25))
    np.testing.assert_allclose(paired_p(values), ttest_1samp(values, 0.0, axis=-1).pvalue, rtol=1e-9)


@pytest.mark.parametrize(
    ("row", "p"),
    [
        ([0.0, 0.0, 0.0], 1.0), ([2.0], 1.0), ([1.0, 1.0], 0.5), ([1.0] * 6, 2.0 * 0.5**6), ([1.0, 1.0, np.nan], 0.5),
        ([np.nan], np.nan),
    ],
)
def test_paired_p_without_scale(row: list[float], p: float) -> None:
    np.testing.assert_allclose(paired_p(np.asarray([row]))[0], p)


def test_holm_is_per_group_and_level_and_skips_nan() -> None:
    p = np.asarray([[0.01, 0.5], [0.04, np.nan], [0.03, 0.02]])
    found = holm_columns(p, [[0, 1], [2]])
    np.testing.assert_allclose(found, [[0.02, 0.5], [0.04, np.nan], [0.03, 0.02]])


def test_ratios_mark_bad_rows_and_empty_denominators() -> None:
    num = np.asarray([[1.0, 2.0, 3.0], [1.0, np.inf, 3.0]])
    found = ratios(num, np.full(3, 2.0), Intervals(resamples=200))
    assert found.value[0] == 1.0
    assert found.low[0] <= 1.0 <= found.high[0]
    assert np.isnan(found.value[1])
    assert np.isnan(found.low[1])
    assert np.isnan(ratios(num, np.zeros(3), Intervals()).value).all()
    assert ratios(np.zeros((0, 3)), np.ones(3), Intervals()).value.shape == (0,)


def test_seed_spread() -> None:
    np.testing.assert_allclose(seed_spread(np.asarray([[1.0, 3.0]])), [np.sqrt(2.0)])
    assert np.isnan(seed_spread(np.asarray([[1.0]]))).all()
