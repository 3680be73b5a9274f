"""The knapsack: optimal by brute force, never over a budget, and clear where nothing is feasible."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from aqnfx.errors import InputError
from aqnfx.planning.knapsack import Limit, least_weight, prices, solve


def total(tables, chosen) -> float:
    return float(sum(t[o] for t, o in zip(tables, chosen, strict=True)))


@st.composite
def problems(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    # KL is small and spans decades.
    values = [np.array([draw(st.integers(0, 10**6)) * 1e-10 for _ in range(n)]) for n in sizes]
    weights = [np.array([float(draw(st.integers(1, 30))) for _ in range(n)]) for n in sizes]
    return values, weights, draw(st.integers(0, 100)) / 100


@given(problems())
@settings(max_examples=60, deadline=None)
def test_the_optimum_is_that_of_brute_force(problem) -> None:
    values, weights, share = problem
    least, most = (sum(float(pick(w)) for w in weights) for pick in (np.min, np.max))
    budget = float(np.floor(least + share * (most - least)))
    chosen = solve(values, [Limit(name="bytes", weights=tuple(weights), budget=budget)])
    assert total(weights, chosen) <= budget
    feasible = [c for c in itertools.product(*(range(len(v)) for v in values)) if total(weights, c) <= budget]
    assert total(values, chosen) == pytest.approx(min(total(values, c) for c in feasible), rel=1e-9, abs=1e-16)


def test_two_budgets_hold_together() -> None:
    values = [np.array([3.0, 0.0]), np.array([2.0, 0.0]), np.array([1.0, 0.0])]
    first = Limit(name="bits", weights=(np.array([1.0, 2.0]),) * 3, budget=5.0)
    second = Limit(name="kv", weights=(np.array([0.0, 1.0]), np.zeros(2), np.zeros(2)), budget=0.0)
    assert solve(values, [first]) == (1, 1, 0)
    assert solve(values, [first, second]) == (0, 1, 1)


def test_a_budget_is_kept_to_the_last_bit() -> None:
    # A solver's tolerance of 1e-6 would let the second option through.
    values = [np.array([1.0, 0.0])]
    limit = Limit(name="avg_bits", weights=(np.array([4.0, 5.0 + 1e-8]),), budget=5.0)
    assert solve(values, [limit]) == (0,)


@pytest.mark.parametrize("layers", [24, 40, 84, 96])
@pytest.mark.parametrize("bits", [5.5, 6.0, 6.5, 6.5 - 1e-9, 7.0, 4.5, 8.5])
def test_equal_layers_use_an_attainable_budget_up(layers: int, bits: float) -> None:
    """Sizes per weight are no whole numbers, every layer ties with every other, and the budget is met to the last bit."""
    random, elements = np.random.default_rng(layers), 64 * 96
    values = [np.array([1.0 + random.random(), 0.0]) for _ in range(layers)]
    weights = tuple(np.array([4.5 * elements, 8.5 * elements]) for _ in range(layers))
    limit = Limit(name="avg_bits", weights=weights, budget=float(bits * elements * layers), unit=elements * layers)
    chosen = solve(values, [limit])
    large = int((bits - 4.5 + 1e-12) / 4.0 * layers + 1e-7) if bits != 6.5 - 1e-9 else int((bits - 4.5) / 4.0 * layers)
    assert sum(chosen) == large
    kept = sorted((v[0] for v in values), reverse=True)[:large]
    assert sum(v[0] for v, o in zip(values, chosen, strict=True) if o) == pytest.approx(sum(kept))
    assert limit.keeps(chosen)


def test_decimal_weights_are_taken_as_written() -> None:
    values = [np.array([1.0, 0.0])] * 3
    limit = Limit(name="seconds", weights=(np.array([0.0, 0.1]),) * 3, budget=0.3)
    assert solve(values, [limit]) == (1, 1, 1)  # 0.1 + 0.1 + 0.1 > 0.3 in floats
    thirds = Limit(name="seconds", weights=(np.array([0.0, 1 / 3]),) * 3, budget=0.99)
    assert sum(solve(values, [thirds])) == 2


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    for _ in range(5):
        values, weights = [random.random(4) for _ in range(40)], tuple(random.random(4) for _ in range(40))
        solve(values, [Limit(name="bytes", weights=weights, budget=20.0)])
    assert capfd.readouterr().out == ""


def test_an_impossible_budget_says_what_is_feasible() -> None:
    limit = Limit(name="avg_bits", weights=(np.array([4.5, 8.5]),) * 2, budget=8.0)
    with pytest.raises(InputError, match="avg_bits 8 cannot be kept: the least feasible is 9;"):
        solve([np.array([1.0, 0.0])] * 2, [limit])
    fine = [Limit(name=n, weights=(np.array(w),), budget=1.0) for n, w in (("a", [1.0, 5.0]), ("b", [5.0, 1.0]))]
    with pytest.raises(InputError, match="no choice keeps all of a 1, b 1 together"):
        solve([np.array([1.0, 0.0])], fine)


def test_the_smallest_size_that_keeps_a_kl() -> None:
    weights = [np.array([4.0, 8.0, 8.0]), np.array([4.0, 8.0, 16.0])]
    values = [np.array([0.5, 0.2, 0.1]), np.array([0.4, 0.15, 0.0])]
    # 12 bits reach at best 0.5; of the two options of 8 bits the cheaper one.
    assert least_weight(weights, values, 0.5) == (2, 0)
    assert least_weight(weights, values, 0.1) == (2, 2)
    with pytest.raises(InputError, match=r"max_kl 0\.05 cannot be kept: the least feasible is 0\.1"):
        least_weight(weights, values, 0.05)


def test_prices_are_what_one_more_unit_saves() -> None:
    values = [np.array([3.0, 1.0]), np.array([10.0, 2.0]), np.array([1.0, 0.5])]
    weights = tuple(np.array([4.0, 8.0]) for _ in values)

    def limit(budget: float) -> Limit:
        return Limit(name="size", weights=weights, budget=budget)

    # 16 units upgrade the second part, and one more goes into the first: 2 of KL for 4 units.
    assert prices(values, [limit(17.0)]) == pytest.approx((0.5,))
    assert prices(values, [limit(13.0)]) == pytest.approx((2.0,))
    assert prices(values, [limit(24.0)]) == pytest.approx((0.0,), abs=1e-9)
    assert prices(values, []) == ()
    free = Limit(name="other", weights=tuple(np.zeros(2) for _ in values), budget=1.0)
    assert prices(values, [limit(17.0), free]) == pytest.approx((0.5, 0.0))
    with pytest.raises(InputError, match="no choice keeps all of size"):
        prices(values, [limit(11.0)])


def test_prices_of_two_limits_that_bind() -> None:
    random = np.random.default_rng(0)
    values = [np.sort(random.gamma(1.0, size=3))[::-1] for _ in range(12)]
    first = tuple(np.array([2.0, 4.0, 8.0]) * random.integers(1, 5) for _ in values)
    second = tuple(np.array([1.0, 5.0, 6.0]) * random.integers(1, 5) for _ in values)
    spans = [(sum(float(w.min()) for w in table), sum(float(w.max()) for w in table)) for table in (first, second)]
    room = [low + 0.4 * (high - low) for low, high in spans]

    def relaxed(a: float, b: float) -> float:
        """Return the optimum of the linear relaxation, by another formulation: weights of all options in one table."""
        found = linprog(
            np.concatenate(values), A_ub=np.stack([np.concatenate(first), np.concatenate(second)]), b_ub=[a, b],
            A_eq=np.kron(np.eye(len(values)), np.ones(3)), b_eq=np.ones(len(values)), bounds=(0.0, 1.0),
        )  # fmt: skip
        return float(found.fun)

    limits = [Limit(name="bytes", weights=first, budget=room[0]), Limit(name="seconds", weights=second, budget=room[1])]
    step = 1e-4
    expected = (
        (relaxed(*room) - relaxed(room[0] + step, room[1])) / step, (relaxed(*room) - relaxed(room[0], room[1] + step)) / step,
    )  # fmt: skip
    assert min(expected) > 1e-3
    assert prices(values, limits) == pytest.approx(expected, rel=1e-3)
