"""Choosing: from what every option costs to one option per group, within the budgets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aqnfx.planning.costs import Costs
from aqnfx.planning.interactions import Refined, plan_kl, refine
from aqnfx.planning.knapsack import Limit, least_weight, solve
from aqnfx.planning.options import PlanOptions
from aqnfx.planning.problem import Problem, limits

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """What every option of a problem costs, what was run for it, and the spot checks: of single options and of whole plans."""

    problem: Problem
    costs: Costs
    facts: Mapping[str, Any]
    checks: tuple[dict[str, Any], ...] = ()
    whole_plans: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


def choose(scored: Scored, options: PlanOptions) -> tuple[tuple[int, ...], Refined | None]:
    """Return one option per group: the exact optimum of the additive costs, refined where the sketch is sure.

    Raises :class:`InputError` for a budget that nothing keeps.
    """
    problem, rows = scored.problem, scored.problem.rows(scored.costs.index)
    values = [group_values(scored.costs, group) for group in rows]
    budgets = limits(problem, options)
    if options.max_kl is not None:
        return _smallest(scored, values, rows, budgets, options), None
    picked = solve(values, budgets)
    if not options.refine:
        return picked, None

    def fits(chosen: tuple[int, ...]) -> bool:
        return all(limit.keeps(chosen) for limit in budgets)

    refined = refine(scored.costs, rows, picked, fits)
    return refined.chosen, refined


def _smallest(
    scored: Scored, values: Sequence[Any], rows: Sequence[Sequence[Sequence[int]]], budgets: Sequence[Limit],
    options: PlanOptions,
) -> tuple[int, ...]:  # fmt: skip
    """Return the smallest plan whose predicted KL, interactions included, keeps ``max_kl``."""
    assert options.max_kl is not None  # the goal that this is for
    sizes, room = scored.problem.bits(scales=options.count_scales), options.max_kl
    while True:
        picked = least_weight(sizes, values, room, budgets)
        kl = plan_kl(scored.costs, flat(rows, picked)).kl
        if kl <= options.max_kl:
            return picked
        room = min(room * options.max_kl / kl, room * 0.98)  # parts are solved for; together they cost more


def frontier(scored: Scored, options: PlanOptions) -> list[dict[str, Any]]:
    """Return the best plan at each of ``options.pareto`` budgets between the smallest and the largest, from the same costs."""
    problem, rows = scored.problem, scored.problem.rows(scored.costs.index)
    values = [group_values(scored.costs, group) for group in rows]
    bits = problem.bits(scales=options.count_scales)
    others = [limit for limit in limits(problem, options) if limit.name == "kv_bits"]
    least, most = (sum(float(pick(w)) for w in bits) for pick in (np.min, np.max))
    found = []
    for budget in np.linspace(least, most, max(options.pareto, 2)):
        limit = Limit(name="avg_bits", weights=bits, budget=math.floor(budget + 1e-6), unit=problem.elements)
        chosen = solve(values, [limit, *others])
        predicted = plan_kl(scored.costs, flat(rows, chosen))
        asked = float(budget) / problem.elements
        found.append({"budget": asked, "used": limit.used(chosen), "kl": predicted.kl, "se": predicted.se})
    return found


def group_values(found: Costs, group: Sequence[Sequence[int]]) -> Array:
    """Return the predicted KL of each option of a group, what its members' errors do to each other included."""
    return np.array([plan_kl(found, rows).kl if len(rows) > 1 else float(found.kl[rows[0]]) for rows in group])


def flat(rows: Sequence[Sequence[Sequence[int]]], chosen: Sequence[int]) -> list[int]:
    """Return the rows of the costs of one option per group."""
    return [row for group, option in zip(rows, chosen, strict=True) for row in group[option]]
