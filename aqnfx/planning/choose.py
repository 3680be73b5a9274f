"""Choosing: from what every option costs to one option per group, within the budgets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aqnfx.errors import InputError
from aqnfx.planning.costs import Costs
from aqnfx.planning.interactions import Refined, plan_kl, refine
from aqnfx.planning.knapsack import Limit, least_weight, solve
from aqnfx.planning.options import PlanOptions
from aqnfx.planning.problem import Problem, limits

Array = NDArray[np.float64]
_HALVINGS = 24  # of what the parts may cost, until it is known to a few millionths


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
    sizes = scored.problem.bits(scales=options.count_scales)

    def kl(picked: Sequence[int]) -> float:
        return plan_kl(scored.costs, flat(rows, picked)).kl

    best = solve(values, budgets)  # the least KL that there is
    if kl(best) > options.max_kl:
        raise InputError(
            f"max_kl {options.max_kl:g} cannot be kept: the least feasible is {kl(best):.4g}, as predicted with what the parts do"
            " to each other; raise it, or add larger formats"
        )
    # Parts are solved for; together they cost more, and by how much depends on what they are allowed.
    low, high = sum(float(v[o]) for v, o in zip(values, best, strict=True)), float(options.max_kl)
    room = high
    for _ in range(_HALVINGS if low < high else 0):
        picked = least_weight(sizes, values, room, budgets)
        if kl(picked) > options.max_kl:
            high = room
        elif room == high:
            return picked
        else:
            best, low = picked, room
        room = (low + high) / 2.0
    return best


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
    """Return the KL of each option of a group, what its members' errors do to each other included: to second order.

    The excess is of whole plans; charged to groups it would make parts that share a format dearer than parts that do not.
    """
    return np.array([plan_kl(found, rows).second_order if len(rows) > 1 else float(found.kl[rows[0]]) for rows in group])


def flat(rows: Sequence[Sequence[Sequence[int]]], chosen: Sequence[int]) -> list[int]:
    """Return the rows of the costs of one option per group."""
    return [row for group, option in zip(rows, chosen, strict=True) for row in group[option]]
