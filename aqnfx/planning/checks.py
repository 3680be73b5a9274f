"""Spot checks: the single choices that decide a plan, and whole plans, run on the samples that were scored.

A run of the model costs as much as a projection draw, and says exactly what a draw says with noise; but it says so of one option
only. So the few runs go where they decide something: to options whose cost is uncertain by as much as separates them from the
runner-up at the going price of a bit. What was measured takes the place of the prediction. Plans whose parts all have the same
format say how much more a plan costs than its parts.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from aqnfx.graph.assignments import Assignment
from aqnfx.planning.choose import Scored, choose, flat, group_values
from aqnfx.planning.costs import NO_EXCESS, Costs, Excess, excess_from, truncation_from
from aqnfx.planning.evaluate import Evaluator
from aqnfx.planning.interactions import PlanKL, plan_kl
from aqnfx.planning.knapsack import Limit, prices
from aqnfx.planning.options import PlanOptions
from aqnfx.planning.problem import limits
from aqnfx.planning.rivals import Progress

Array = NDArray[np.float64]

SINGLES = 2
"""Single choices that are measured: they say how far second order holds; see exchanges.py for what decides."""
WHOLE_PLANS = 3
_CHECKED_KL = 0.3  # nats; options beyond it are no guide to a plan
_NEAR = 5.0  # a whole plan that has a fifth of the plan's KL tells of it, one that has less does not
_TRUSTED_KL = 1.0  # nats; beyond it second order means nothing, and nobody wants the plan


def check_options(
    evaluator: Evaluator, scored: Scored, options: PlanOptions, progress: Progress | None = None
) -> Scored:
    """Return ``scored`` with the choices that decide the plan of ``options`` measured, and whole plans.

    ``evaluator`` has the samples that were scored; ``progress`` is told the runs done and their number. Raises
    :class:`~aqnfx.errors.InputError` for a budget that nothing keeps.
    """
    started, first, whole = time.perf_counter(), scored.costs, _whole_plans(scored)
    worth = deciding(scored, options, SINGLES)
    plans = {f"{row}": _alone(scored, row) for row in worth}
    plans |= {name: scored.problem.assignments(chosen) for name, chosen in whole.items()}
    measured = evaluator.measure(plans, progress=progress) if plans else {}
    made = _with(first, {row: measured[f"{row}"].kl for row in worth})
    rows = list(worth)
    made = dataclasses.replace(made, truncation=truncation_from(first.kl[rows], first.noise[rows], made.kl[rows]))
    table = scored.problem.rows(made.index)
    seen = {name: plan_kl(made, flat(table, chosen)) for name, chosen in whole.items()}
    known = {name: measured[name].kl for name in whole}
    made = dataclasses.replace(made, excess=_excess(dataclasses.replace(scored, costs=made), options, seen, known))
    return dataclasses.replace(
        scored, costs=made, checks=_records(first, made, worth),
        whole_plans=tuple(
            {"plan": name, "second_order": plan.second_order, "se": plan.second_order_se, "measured": known[name]}
            for name, plan in seen.items()
        ),
        facts={**scored.facts, "check_seconds": time.perf_counter() - started},
    )  # fmt: skip


def _excess(scored: Scored, options: PlanOptions, seen: Mapping[str, PlanKL], measured: Mapping[str, float]) -> Excess:
    """Return what plans cost beyond second order, from whole plans that are not far below the plan of ``options``."""
    plain = dataclasses.replace(scored, costs=dataclasses.replace(scored.costs, excess=NO_EXCESS))
    picked, _ = choose(plain, dataclasses.replace(options, refine=False))
    mine = plan_kl(plain.costs, flat(scored.problem.rows(plain.costs.index), picked))
    plans = list(seen.values())
    return excess_from(
        np.array([p.second_order for p in plans]), np.array([p.second_order_se for p in plans]),
        np.array([p.pairs for p in plans]), np.array([measured[name] for name in seen]), least=mine.second_order / _NEAR,
    )  # fmt: skip


def _records(first: Costs, made: Costs, worth: Mapping[int, bool]) -> tuple[dict[str, Any], ...]:
    """Return what a plan records of its spot checks: predicted, its standard error, measured, and whether it may decide."""
    names = {row: key for key, row in made.index.items()}
    se = np.hypot(first.noise, made.truncation * first.kl**1.5)
    return tuple(
        {
            "module": names[row][0], "choice": names[row][1], "predicted": float(first.kl[row]), "se": float(se[row]),
            "measured": float(made.kl[row]), "decides": decides,
        }
        for row, decides in worth.items()
    )  # fmt: skip


def deciding(scored: Scored, options: PlanOptions, count: int) -> dict[int, bool]:
    """Return the rows of up to ``count`` options to measure, the most telling first, and whether each may change the plan.

    An option and the plan's own are apart by a gap at the prices of the budgets; what knowing it saves (:func:`information`) is
    shared among the rows that make its error. Where no gap is in question, the options of the plan that are known least follow:
    they are what its prediction is unsure of.
    """
    found, problem = scored.costs, scored.problem
    # What plans cost beyond second order is not known yet, and bends all plans of one size alike.
    plain = dataclasses.replace(scored, costs=dataclasses.replace(found, excess=NO_EXCESS))
    picked, _ = choose(plain, dataclasses.replace(options, refine=False))
    table, worth = problem.rows(found.index), dict[int, float]()
    totals, se = priced(plain, options, picked), found.se
    for group, total, mine in zip(table, totals, picked, strict=True):
        for option, rows in enumerate(group):
            both = [*rows, *group[mine]]
            s = float(np.sqrt(np.square(se[both]).sum()))
            if option == mine or s == 0.0:
                continue
            gain = information(float(total[option] - total[mine]), s)
            for row in both:
                worth[row] = max(worth.get(row, 0.0), gain * float(se[row] / s) ** 2)
    # A thousandth of the plan's cost, shared among what may be measured, is not worth a run for the choice alone.
    own = flat(table, picked)
    least = 1e-3 * float(found.kl[own].sum()) / SINGLES
    telling = sorted((row for row, gain in worth.items() if gain > least), key=lambda row: -worth[row])
    rest = sorted((row for row in own if se[row] > 0.0), key=lambda row: -se[row])
    order = [row for row in dict.fromkeys((*telling, *rest)) if 0.0 < found.kl[row] < _CHECKED_KL]
    return {row: worth.get(row, 0.0) > least for row in order[:count]}


def information(gap: float, error: float) -> float:
    """Return what knowing a gap saves in the mean: s·φ(|d|/s) − |d|·Φ(−|d|/s) for d with the standard error s, positive.

    The expected value of perfect information about which of two is less (Raiffa and Schlaifer 1961, unit normal loss).
    """
    z = abs(gap) / error
    return error * float(norm.pdf(z) - z * norm.sf(z))


def priced(scored: Scored, options: PlanOptions, picked: Sequence[int]) -> list[Array]:
    """Return, per group, the KL of each option plus what it takes of the budgets at their prices."""
    problem = scored.problem
    values = [group_values(scored.costs, group) for group in problem.rows(scored.costs.index)]
    budgets = limits(problem, options)
    if options.max_kl is not None:  # the budget that the plan has come to
        sizes = problem.bits(scales=options.count_scales)
        spent = sum(float(w[o]) for w, o in zip(sizes, picked, strict=True))
        budgets = [*budgets, Limit(name="size", weights=sizes, budget=spent)]
    worth = prices(values, budgets)
    return [
        value + sum(price * limit.weights[group] for price, limit in zip(worth, budgets, strict=True))
        for group, value in enumerate(values)
    ]


def _whole_plans(scored: Scored) -> dict[str, tuple[int, ...]]:
    """Return up to three plans of one format throughout: of those below a nat, the ones of largest KL, which say most.

    A plan of a twentieth of the largest has a twentieth of its excess, which is less than what interactions hide.
    """
    problem, table = scored.problem, scored.problem.rows(scored.costs.index)
    sizes = [
        weights + caches
        for weights, caches in zip(problem.bits(scales=True), problem.bits(scales=True, cache=True), strict=True)
    ]
    order = [np.argsort(size, kind="stable") for size in sizes]
    found: dict[tuple[int, ...], float] = {}
    for rank in range(max(len(o) for o in order)):
        chosen = tuple(int(o[min(rank, len(o) - 1)]) for o in order)
        kl = plan_kl(scored.costs, flat(table, chosen)).second_order
        if 0.0 < kl < _TRUSTED_KL:
            found.setdefault(chosen, kl)
    telling = max(found.values(), default=0.0) / 20.0
    largest = sorted((c for c in found if found[c] >= telling), key=lambda chosen: -found[chosen])[:WHOLE_PLANS]
    named: dict[str, tuple[int, ...]] = {}
    for chosen in largest:
        name = _called(scored, chosen)
        named[name if name not in named else f"{name} ({len(named) + 1})"] = chosen
    return named


def _called(scored: Scored, chosen: Sequence[int]) -> str:
    """Return what a plan is called by the formats of the groups that have a choice: "all in int4:g32, caches in int8:row"."""
    free = [(group, option) for group, option in zip(scored.problem.groups, chosen, strict=True) if len(group.choices) > 1]
    parts = []
    for cache, word in ((False, "all"), (True, "caches")):
        texts = [g.choices[o].text for g, o in free if scored.problem.parts[g.members[0]].cache is cache]
        if texts:
            parts.append(f"{word} in {' or '.join(dict.fromkeys(texts))}")
    return ", ".join(parts)


def _alone(scored: Scored, row: int) -> dict[str, Assignment]:
    module, text = next(key for key, found in scored.costs.index.items() if found == row)
    part = next(part for part in scored.problem.parts if part.module == module)
    choice = next(choice for choice in scored.problem.options[module] if choice.text == text)
    return {module: choice.assignment(part)}


def _with(costs: Costs, found: dict[int, float]) -> Costs:
    """Return the costs with the KL of rows as it was measured."""
    kl, measured = costs.kl.copy(), costs.measured.copy()
    for row, value in found.items():
        kl[row], measured[row] = value, True
    return dataclasses.replace(costs, kl=kl, measured=measured)
