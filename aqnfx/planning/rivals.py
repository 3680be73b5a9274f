"""Judging a plan: measured beside uniform plans, and beside one of its size, on samples that chose nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from aqnfx.graph.program import Program
from aqnfx.numerics.stats import paired_difference
from aqnfx.planning.evaluate import Measured, measure_plans
from aqnfx.planning.options import PlanOptions
from aqnfx.planning.problem import Group, Problem
from aqnfx.probes.data.batches import Batch
from aqnfx.probes.tasks import KL

Progress = Callable[[int, int], None]
_FEW = 30  # samples; intervals from fewer are said to be rough


def compare_plans(
    program: Program, held: Sequence[Batch], problem: Problem, picked: Sequence[int], options: PlanOptions,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure the plan, every uniform plan of the menu, and the plan of the same size that upgrades layers in order.

    ``held``: samples that chose nothing; ``picked``: the plan's option per group. Returns ``measured`` and ``compared`` of a
    :class:`~aqnfx.planning.precision_plan.PrecisionPlan`.
    """
    rivals = {name: chosen for name, chosen in _rivals(problem, picked, options).items() if chosen != tuple(picked)}
    plans = {"plan": problem.assignments(picked)} | {name: problem.assignments(chosen) for name, chosen in rivals.items()}
    found = measure_plans(program, held, plans, progress=progress)
    bits = problem.bits(scales=True)
    compared = [
        {
            "name": name, "effective_bits": sum(float(w[o]) for w, o in zip(bits, chosen, strict=True)) / problem.elements,
            **found[name].record(seed=options.seed), "kl_minus_plan": _difference(found[name], found["plan"], options.seed),
        }
        for name, chosen in rivals.items()
    ]  # fmt: skip
    return {"measured": found["plan"].record(seed=options.seed), "compared": compared}


def _difference(other: Measured, mine: Measured, seed: int) -> dict[str, Any]:
    return paired_difference(other.scores[KL.name], mine.scores[KL.name], mine.tokens, seed=seed).to_record()


def _rivals(problem: Problem, picked: Sequence[int], options: PlanOptions) -> dict[str, tuple[int, ...]]:
    """Return uniform plans by name, and "in order": the next larger choice for layer after layer until the size is used."""
    found: dict[str, tuple[int, ...]] = {}
    for choice in options.menu:
        if all(choice in group.choices or len(group.choices) == 1 or _is_cache(problem, group) for group in problem.groups):
            found[f"uniform {choice.text}"] = tuple(
                mine if _is_cache(problem, group) or choice not in group.choices else group.choices.index(choice)
                for group, mine in zip(problem.groups, picked, strict=True)
            )
    bits = problem.bits(scales=True)
    size = sum(float(w[o]) for w, o in zip(bits, picked, strict=True))
    current = [
        o if _is_cache(problem, group) else int(np.argmin(w))
        for w, group, o in zip(bits, problem.groups, picked, strict=True)
    ]
    total = sum(float(w[o]) for w, o in zip(bits, current, strict=True))
    for number, weights in enumerate(bits):
        larger = [o for o in np.argsort(weights) if weights[o] > weights[current[number]]]
        for option in reversed(larger):
            if total + float(weights[option] - weights[current[number]]) <= size:
                total += float(weights[option] - weights[current[number]])
                current[number] = int(option)
                break
    found["in order"] = tuple(current)
    return found


def _is_cache(problem: Problem, group: Group) -> bool:
    return all(problem.parts[n].cache for n in group.members)


def judging_notes(problem: Problem, held: Sequence[Batch]) -> list[str]:
    """Return what a reader has to know of how a plan was judged on the samples ``held`` back, in sentences."""
    found = []
    if not held:
        found.append("no samples were left to judge the plan, so it was not measured; give more data or --eval-samples")
    elif sum(batch.size for batch in held) < _FEW:
        found.append(f"the plan was judged on {sum(batch.size for batch in held)} samples: intervals are rough")
    if any(part.share != 1.0 for part in problem.parts):
        found.append("bits per weight and budgets count experts by the share of them that a token uses; bytes counts all")
    return found
