"""The exact choice under a budget: a multiple-choice knapsack, solved by HiGHS (Huangfu and Hall 2018)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from aqnfx.errors import InputError

Array = NDArray[np.float64]

# HiGHS stops 1e-6 short of the optimum whatever is asked, so the objective is scaled far above that.
_SCALE = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One budget: what every option of every group weighs, and how much there is, in any unit."""

    name: str
    weights: tuple[Array, ...]
    budget: float

    def used(self, chosen: Sequence[int]) -> float:
        """Return what a choice weighs."""
        return float(sum(w[option] for w, option in zip(self.weights, chosen, strict=True)))

    @property
    def least(self) -> float:
        """The least that any choice weighs."""
        return float(sum(w.min() for w in self.weights))


def solve(values: Sequence[Array], limits: Sequence[Limit]) -> tuple[int, ...]:
    """Return one option per group with the least sum of ``values`` that keeps within all ``limits``.

    ``values``: per group fp64 (options,), finite and not negative. The result is optimal, and no limit is passed by any
    amount: what the solver's tolerance lets through is cut off and solved again. Raises :class:`InputError` where nothing is
    feasible, naming the limit and the least that is.
    """
    for limit in limits:
        if limit.least > limit.budget:
            raise InputError(
                f"{limit.name} {limit.budget:.6g} cannot be kept: the least feasible is {limit.least:.6g}; raise it, add "
                "smaller formats, or keep fewer modules as they are"
            )
    sizes = [len(v) for v in values]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    flat = np.concatenate([np.asarray(v, dtype=np.float64) - np.min(v) for v in values])
    top = float(flat.max())
    if top == 0.0 and not limits:
        return (0,) * len(sizes)
    rows = np.repeat(np.arange(len(sizes)), sizes)
    once = csr_array((np.ones(len(flat)), (rows, np.arange(len(flat)))), shape=(len(sizes), len(flat)))
    constraints = [LinearConstraint(once, 1.0, 1.0)]
    for limit in limits:
        weights = np.concatenate(limit.weights)
        scale = float(np.abs(weights).max()) or 1.0
        constraints.append(LinearConstraint(weights[None, :] / scale, -np.inf, limit.budget / scale))
    while True:
        found = milp(
            flat / (top or 1.0) * _SCALE, constraints=constraints, integrality=np.ones(len(flat)), bounds=Bounds(0.0, 1.0),
            options={"mip_rel_gap": 0.0},
        )  # fmt: skip
        if found.x is None:
            raise InputError(
                f"no choice keeps all of {', '.join(f'{limit.name} {limit.budget:.6g}' for limit in limits)} together; raise one"
            )
        chosen = tuple(int(np.argmax(found.x[a:b])) for a, b in itertools.pairwise(starts))
        if all(limit.used(chosen) <= limit.budget for limit in limits):
            return chosen
        picked = np.zeros(len(flat))
        picked[[a + option for a, option in zip(starts, chosen, strict=False)]] = 1.0
        constraints.append(LinearConstraint(picked[None, :], -np.inf, len(sizes) - 1.0))


def least_weight(weights: Sequence[Array], values: Sequence[Array], budget: float) -> tuple[int, ...]:
    """Return one option per group with the least sum of ``weights`` whose ``values`` sum to at most ``budget``.

    Among those of equal weight, one of least value. Raises :class:`InputError` as :func:`solve` does.
    """
    limit = Limit(name="KL", weights=tuple(values), budget=budget)
    chosen = solve(weights, [limit])
    spent = sum(float(w[option]) for w, option in zip(weights, chosen, strict=True))
    return solve(values, [Limit(name="size", weights=tuple(weights), budget=spent)])
