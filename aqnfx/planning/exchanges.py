"""Exchanges at the plan: what switching single parts changes where all other parts are stored as planned, measured.

A part costs more, or less, among parts that are stored coarsely than by itself, and not all parts alike. The few switches that
are closest to being worth their bits are run; half of what they change there and half of what they change alone takes the place
of the prediction, which is the trapezoid between a clean model and the plan. The choice is made again, and kept if it measures
better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aqnfx.planning.checks import information, priced
from aqnfx.planning.choose import Scored, group_values
from aqnfx.planning.evaluate import Evaluator
from aqnfx.planning.knapsack import solve
from aqnfx.planning.options import PlanOptions
from aqnfx.planning.problem import limits
from aqnfx.planning.rivals import Progress

SWITCHES = 8
"""Switches that are run at a plan: about as many runs as four draws cost."""
_DIFFERENT = 0.3  # standard deviation of log(change at the plan / change alone), in a trial on two small models


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A plan after exchanges: option per group, its KL on the samples that chose, that of the plan before, and the switches."""

    chosen: tuple[int, ...]
    kl: float
    kl_before: float
    switches: tuple[dict[str, Any], ...] = ()

    def record(self) -> dict[str, Any]:
        """Return what a plan records: in nats per token, measured on the samples that chose."""
        return {"kl_before": self.kl_before, "kl": self.kl, "switches": list(self.switches)}


def settle(
    evaluator: Evaluator, scored: Scored, options: PlanOptions, picked: Sequence[int], progress: Progress | None = None
) -> Settled:
    """Return the plan ``picked``, or a better one within the same budgets, and what it measures on the evaluator's samples.

    With a goal of KL the plan stays: what keeps the goal is decided by what is predicted.
    """
    problem, current = scored.problem, tuple(picked)
    switches = [] if options.max_kl is not None else _nearest(scored, options, current, SWITCHES)
    plans = {"plan": problem.assignments(current)}
    for group, option in switches:
        plans[f"{group} {option}"] = problem.assignments(_switched(current, group, option))
    measured = {name: found.kl for name, found in evaluator.measure(plans, base="plan", progress=progress).items()}
    before = measured["plan"]
    if not switches:
        return Settled(chosen=current, kl=before, kl_before=before)
    values = [group_values(scored.costs, rows) for rows in problem.rows(scored.costs.index)]
    alone = np.array([values[g][o] - values[g][current[g]] for g, o in switches])
    there = np.array([measured[f"{g} {o}"] - before for g, o in switches])
    settled = [value.copy() for value in values]
    # All parts cost more among others than alone, those that were not run too.
    telling = alone * there > 0.0
    more = float(np.exp(np.median(np.log(there[telling] / alone[telling])))) if telling.any() else 1.0
    for group, value in enumerate(values):
        settled[group] = (value - value[current[group]]) * (1.0 + more) / 2.0
    for (group, option), a, t in zip(switches, alone, there, strict=True):
        settled[group][option] = (a + t) / 2.0
    settled = [value - value.min() for value in settled]
    chosen, kl = solve(settled, limits(problem, options)), before
    if chosen != current:
        found = evaluator.measure({"plan": problem.assignments(chosen)}, base="plan")["plan"].kl
        chosen, kl = (chosen, found) if found < before else (current, before)
    records = tuple(
        {
            "modules": [problem.parts[n].module for n in problem.groups[g].members],
            "from": problem.groups[g].choices[current[g]].text, "to": problem.groups[g].choices[o].text,
            "alone": float(a), "measured": float(t), "taken": chosen[g] == o,
        }
        for (g, o), a, t in zip(switches, alone, there, strict=True)
    )  # fmt: skip
    return Settled(chosen=chosen, kl=kl, kl_before=before, switches=records)


def _switched(chosen: Sequence[int], group: int, option: int) -> tuple[int, ...]:
    return (*chosen[:group], option, *chosen[group + 1 :])


def _nearest(scored: Scored, options: PlanOptions, picked: tuple[int, ...], count: int) -> list[tuple[int, int]]:
    """Return up to ``count`` switches (group, option), those first whose worth at the prices of the budgets is least sure."""
    values = [group_values(scored.costs, rows) for rows in scored.problem.rows(scored.costs.index)]
    worth: dict[tuple[int, int], float] = {}
    for group, totals in enumerate(priced(scored, options, picked)):
        mine = picked[group]
        for option, total in enumerate(totals):
            error = _DIFFERENT * abs(float(values[group][option] - values[group][mine]))
            if option != mine and error > 0.0:
                worth[group, option] = information(float(total - totals[mine]), error)
    order = sorted((key for key, gain in worth.items() if gain > 0.0), key=lambda key: -worth[key])
    return order[:count]
