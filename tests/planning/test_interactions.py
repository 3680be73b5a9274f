"""The KL of whole plans, and local search: what the sketch says, and nothing that only its noise says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from aqnfx.planning.costs import APART, NO_EXCESS, Costs, Excess, draw_error, mean_square
from aqnfx.planning.interactions import kl_difference_error, plan_kl, refine

TOKENS = np.full(16, 50.0)


def made(columns, excess=NO_EXCESS) -> Costs:
    kl = mean_square(columns, int(TOKENS.sum()))
    return Costs(
        index={(f"m{i}", "x"): i for i in range(len(columns))}, columns=columns, per_sample=TOKENS, kl=kl,
        noise=draw_error(columns, int(TOKENS.sum())), unbiased=kl, elementwise=kl, spread=0.1, truncation=0.0,
        measured=np.zeros(len(columns), dtype=bool), excess=excess,
    )  # fmt: skip


def test_errors_that_cancel_and_errors_that_add() -> None:
    random = np.random.default_rng(0)
    base = random.normal(size=(1, 8, 16))
    costs = made(np.concatenate([base, -base, base]))
    one = plan_kl(costs, [0]).kl
    assert plan_kl(costs, [0, 1]).kl < 0.1 * one
    assert plan_kl(costs, [0, 2]).kl == pytest.approx(4.0 * one, rel=0.05)
    assert plan_kl(costs, [0, 2]).additive == pytest.approx(2.0 * one)


def test_a_plan_costs_more_than_its_second_order_and_a_part_does_not() -> None:
    columns = 3.0 * np.random.default_rng(5).normal(size=(6, 8, 16))
    plain, more = made(columns), made(columns, excess=Excess(c=2.0, se=0.5, most=9.0))
    assert plan_kl(more, [0]) == plan_kl(plain, [0])
    assert plan_kl(more, [0]).se_here == plain.se[0]
    whole, bent = plan_kl(plain, range(6)), plan_kl(more, range(6))
    assert whole.kl == whole.second_order == bent.second_order
    assert bent.pairs == pytest.approx(whole.kl**2 - np.square(plain.kl).sum())
    assert bent.kl == pytest.approx(whole.kl + 2.0 * bent.pairs)
    assert whole.se_here > APART * whole.kl * 0.8  # plans scatter, however well their parts are known
    assert bent.se_here > np.hypot(whole.se_here, 0.5 * bent.pairs)
    assert bent.se > whole.se * bent.kl / whole.kl
    # Where c was fitted the excess was no more than a tenth of second order: it is not carried further.
    capped = plan_kl(made(columns, excess=Excess(c=1e6, se=1.0, most=0.1)), range(6))
    assert capped.kl == pytest.approx(1.1 * whole.kl)


def test_interactions_that_are_noise_are_hardly_believed() -> None:
    """Independent errors of 20 layers: their sum's square is off by a sixth, and the plan by less than a half of that."""
    off, whole = [], []
    for seed in range(200):
        columns = np.random.default_rng(seed).normal(size=(20, 4, 16))
        truth = 20 * 0.5 * 16 / TOKENS.sum()
        off.append(plan_kl(made(columns), range(20)).kl / truth - 1.0)
        whole.append(mean_square(columns.sum(axis=0), int(TOKENS.sum())) / truth - 1.0)
    assert np.std(off) < 0.5 * np.std(whole)
    assert abs(np.mean(off)) < 0.02


def test_plans_of_inputs_are_less_sure_and_predicted_alike() -> None:
    weights = made(np.random.default_rng(1).normal(size=(20, 4, 16)))
    joint = dataclasses.replace(weights, joint=True)
    assert plan_kl(joint, range(20)).kl == plan_kl(weights, range(20)).kl
    assert plan_kl(joint, range(20)).se_here > 1.2 * plan_kl(weights, range(20)).se_here
    assert plan_kl(joint, [0]).se_here == plan_kl(weights, [0]).se_here


def test_one_sample_where_all_meet_is_no_interaction() -> None:
    """All errors add up in one sample of sixteen, in every draw: this says nothing of the others."""
    columns = 0.1 * np.random.default_rng(2).normal(size=(20, 4, 16))
    columns[:, :, 3] = 2.0
    found = plan_kl(made(columns), range(20))
    assert found.second_order < 3.0 * found.additive
    columns[:] = 2.0  # in all samples
    found = plan_kl(made(columns), range(20))
    assert found.second_order > 19.0 * found.additive


def test_standard_errors_cover_other_draws_and_other_samples() -> None:
    random, tokens = np.random.default_rng(1), TOKENS.sum()
    scale = random.gamma(0.5, 2.0, size=16 * 500)  # samples differ widely
    truth_here, covered, anywhere = [], [], []
    for run in range(500):
        part = scale[16 * run : 16 * run + 16]
        found = plan_kl(made(np.sqrt(part) * random.normal(size=(1, 8, 16))), [0])
        truth_here.append(0.5 * part.sum() / tokens)
        covered.append(abs(found.kl - truth_here[-1]) < 1.96 * found.se_here)
        anywhere.append(abs(found.kl - 0.5 * 16.0 / tokens) < 1.96 * found.se)
    assert 0.85 <= np.mean(covered) <= 0.99
    assert 0.8 <= np.mean(anywhere) <= 0.97  # skewed: a normal interval covers a little less


def test_the_error_of_a_difference_knows_that_draws_are_shared() -> None:
    random = np.random.default_rng(2)
    base = random.normal(size=(1, 8, 16))
    costs = made(np.concatenate([base, 1.05 * base, random.normal(size=(1, 8, 16))]))
    assert kl_difference_error(costs, [0], [1]) < 0.2 * kl_difference_error(costs, [0], [2])


def refined(costs: Costs, chosen, fits):
    return refine(costs, choices(costs), chosen, fits)


def test_what_was_measured_is_not_refined_away() -> None:
    """The sketch says that the first part is the dearer one to store coarsely, and measurement says the second."""
    random = np.random.default_rng(7)
    columns = np.stack([4.0 * random.normal(size=(8, 16)), np.zeros((8, 16)), random.normal(size=(8, 16)), np.zeros((8, 16))])
    told = made(columns)
    one_upgrade = lambda chosen: sum(chosen) <= 1  # noqa: E731
    assert refined(told, (0, 1), one_upgrade).chosen == (1, 0)
    kl = np.array([told.kl[2], 0.0, told.kl[0], 0.0])
    known = dataclasses.replace(told, kl=kl, measured=np.ones(4, dtype=bool))
    found = refined(known, (0, 1), one_upgrade)
    assert (found.chosen, found.taken) == ((0, 1), 0)


def choices(costs: Costs) -> list[list[list[int]]]:
    """Return groups of two options, rows in pairs."""
    return [[[2 * g], [2 * g + 1]] for g in range(len(costs.columns) // 2)]


def test_an_exchange_that_cancels_errors_is_found() -> None:
    random = np.random.default_rng(3)
    first, other = random.normal(size=(2, 8, 16))
    # The second option of group 1 is a little more expensive alone and cancels what group 0 does.
    costs = made(np.stack([first, 1.2 * other, other, -first * 1.05]))
    found = refined(costs, (0, 0), lambda chosen: True)
    assert found.chosen == (0, 1)
    assert found.taken >= 1
    assert found.gain > 0.0
    kept = refined(costs, (0, 0), lambda chosen: chosen == (0, 0))
    assert kept.chosen == (0, 0)


def test_noise_moves_nothing() -> None:
    moved = 0
    for seed in range(20):
        columns = np.random.default_rng(seed).normal(size=(24, 8, 16))
        found = refined(made(columns), (0,) * 12, lambda chosen: True)
        moved += found.taken
        assert found.tried > 0
    assert moved <= 1


def test_with_one_draw_nothing_is_held_out() -> None:
    columns = np.random.default_rng(0).normal(size=(4, 1, 16))
    found = refined(made(columns), (0, 0), lambda chosen: True)
    assert (found.chosen, found.tried) == ((0, 0), 0)
