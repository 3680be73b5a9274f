"""Costs: the two estimators together are better than each, their errors cover, and what they are made of."""

from __future__ import annotations

import numpy as np
import pytest

from aqnfx.planning.costs import (
    EXCESS,
    TRUNCATION,
    Excess,
    combine,
    draw_error,
    excess_from,
    mean_square,
    truncation_from,
)

OPTIONS, SAMPLES, TOKENS = 400, 32, 3200


def simulated(draws: int, spread: float, seed: int = 0):
    """Return columns with squares of known mean, elementwise estimates off by ``spread`` in the log, and the truth."""
    random = np.random.default_rng(seed)
    truth = np.exp(random.normal(-8.0, 2.0, OPTIONS))
    shares = random.dirichlet(np.full(SAMPLES, 3.0), OPTIONS) * (2.0 * truth * TOKENS)[:, None]
    columns = np.sqrt(shares)[:, None, :] * random.normal(size=(OPTIONS, draws, SAMPLES))
    return columns, truth * np.exp(random.normal(0.0, spread, OPTIONS)), truth


def spread_of(estimate, truth) -> float:
    return float(np.std(np.log(estimate / truth)))


@pytest.mark.parametrize("draws", [2, 4, 8, 16])
@pytest.mark.parametrize("spread", [0.05, 0.12, 0.3])
def test_together_they_are_better_than_each_and_the_errors_cover(draws: int, spread: float) -> None:
    columns, elementwise, truth = simulated(draws, spread)
    kl, se, found = combine(columns, elementwise, TOKENS)
    best = min(spread_of(mean_square(columns, TOKENS), truth), spread_of(elementwise, truth))
    assert spread_of(kl, truth) < 0.9 * spread_of(mean_square(columns, TOKENS), truth) or spread > 0.2
    if draws > 4 or spread > 0.1:  # few draws hardly know their own variance, and 0.05 is better than what they add
        assert spread_of(kl, truth) < 1.03 * best
    assert abs(float(np.mean(np.log(kl / truth)))) < 0.03
    assert found == pytest.approx(spread, rel=0.35, abs=0.02)
    covered = np.mean(np.abs(np.log(kl / truth)) < 1.96 * se / kl)
    assert 0.9 <= covered <= 0.98


def test_middling_estimators_gain_most() -> None:
    columns, elementwise, truth = simulated(8, 0.12)
    kl, _, _ = combine(columns, elementwise, TOKENS)
    assert spread_of(kl, truth) < 0.85 * min(spread_of(mean_square(columns, TOKENS), truth), spread_of(elementwise, truth))


@pytest.mark.parametrize("draws", [1, 2, 8])
def test_the_error_of_the_squares_covers(draws: int) -> None:
    columns, _, truth = simulated(draws, 0.1)
    found = mean_square(columns, TOKENS)
    covered = np.mean(np.abs(found - truth) < 1.96 * draw_error(columns, TOKENS))
    assert 0.88 <= covered <= 0.98


def test_an_option_that_is_far_off_is_not_believed() -> None:
    columns, elementwise, truth = simulated(8, 0.1)
    elementwise[0] = truth[0] * 20.0  # errors of its elements cancel
    kl, _, found = combine(columns, elementwise, TOKENS)
    assert abs(np.log(kl[0] / truth[0])) < 0.5
    assert found == pytest.approx(0.1, rel=0.35)  # nor does it speak for the others


def test_options_without_an_error_cost_nothing() -> None:
    columns, elementwise, _ = simulated(4, 0.1)
    columns[3], elementwise[3] = 0.0, 0.0
    kl, se, _ = combine(columns, elementwise, TOKENS)
    assert kl[3] == se[3] == 0.0
    nothing = combine(np.zeros((2, 4, SAMPLES)), np.zeros(2), TOKENS)
    assert nothing[0].tolist() == [0.0, 0.0]


def test_spot_checks_move_what_second_order_leaves_out() -> None:
    predicted = np.array([0.01, 0.05, 0.1, 0.2])
    exact = truncation_from(predicted, 0.0 * predicted, predicted)
    assert exact < TRUNCATION
    off = truncation_from(predicted, 0.0 * predicted, predicted * np.exp(2.0 * np.sqrt(predicted)))
    assert TRUNCATION < off < 2.0
    many = np.repeat(predicted, 200)
    assert truncation_from(many, 0.0 * many, many * np.exp(2.0 * np.sqrt(many))) == pytest.approx(2.0, rel=0.02)
    # What the draws explain is not held against second order.
    noisy = truncation_from(many, 0.5 * many, many * np.exp(0.5 * np.sign(np.arange(len(many)) % 2 - 0.5)))
    assert noisy < 0.1
    # Tiny KL says nothing of third order, however far off it is.
    assert truncation_from(predicted * 1e-6, 0.0 * predicted, predicted * 2e-6) == pytest.approx(TRUNCATION, rel=0.6)
    assert truncation_from(np.zeros(0), np.zeros(0), np.zeros(0)) == TRUNCATION


def test_whole_plans_say_how_far_second_order_goes() -> None:
    second = np.array([0.05, 0.2, 0.6])
    pairs, se = 0.95 * second**2, 0.03 * second
    assert excess_from(second[:0], se[:0], pairs[:0], second[:0]) == Excess()
    found = excess_from(second, se, pairs, second + 2.0 * pairs)
    assert found.c == pytest.approx(2.0, rel=0.1)
    assert 0.05 < found.se < 0.5 * EXCESS
    assert found.most == pytest.approx(2.0 * 0.95 * 0.6)
    assert excess_from(second, se, pairs, second).c < 0.2
    assert excess_from(second, se, pairs, 0.5 * second).c == 0.0  # never a discount
    # A small plan whose interactions were missed says nothing of one of a hundred times its KL.
    assert excess_from(second[:1] / 50, se[:1] / 50, pairs[:1] / 2500, second[:1] / 40, least=0.02) == Excess()
    # Small plans cannot tell: the prior stands.
    small = 1e-3 * second
    assert excess_from(small, se * 1e-3, 0.95 * small**2, small * 1.02).c == pytest.approx(EXCESS, rel=0.05)
    # Where they can, it gives way: KL that sits in a few tokens.
    sure = excess_from(small, se * 1e-3, 0.95 * small**2, small + 2000.0 * 0.95 * small**2)
    assert sure.c == pytest.approx(2000.0, rel=0.15)
    assert sure.of(small[2], 0.95 * small[2] ** 2) == pytest.approx(2000.0 * 0.95 * small[2] ** 2, rel=0.15)
