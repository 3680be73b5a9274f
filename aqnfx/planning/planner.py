"""plan(): from a model, data and a budget to a precision plan, predicted, and measured on samples that chose nothing."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import aqnfx
from aqnfx.diagnosis.options import Options
from aqnfx.diagnosis.prepare import Data, Prepared, prepare
from aqnfx.diagnosis.sensitivity import jsonable
from aqnfx.errors import InputError
from aqnfx.graph.frontend import model_digest
from aqnfx.graph.program import Program
from aqnfx.passes.pipeline import Pipeline
from aqnfx.planning.costs import Costs, costs, truncation_from
from aqnfx.planning.evaluate import measure_plans
from aqnfx.planning.interactions import Refined, kl_difference_error, plan_kl, refine
from aqnfx.planning.knapsack import Limit, least_weight, solve
from aqnfx.planning.options import PlanOptions
from aqnfx.planning.precision_plan import PrecisionPlan
from aqnfx.planning.problem import PRODUCTS, Problem, limits, make_problem
from aqnfx.planning.rivals import Progress, compare_plans, judging_notes
from aqnfx.probes.data import Batch, data_digest, make_batches
from aqnfx.probes.forward import eager_forward
from aqnfx.probes.predict import predict

SPOT_CHECKS = 8
_CHECKED_KL = 0.3  # options beyond it are no guide to a plan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """What every option of a problem costs, the spot checks, and what was run for it."""

    problem: Problem
    costs: Costs
    checks: tuple[dict[str, Any], ...]
    facts: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def plan(
    model: nn.Module | Program | str | Path, data: Data, *, tokenizer: Any = None, progress: Progress | None = None,
    status: Callable[[str], None] | None = None, **options: Any,
) -> PrecisionPlan:  # fmt: skip
    """Choose the format of every linear layer of a language model under a budget, and measure the plan.

    ``model`` is what :func:`aqnfx.trace` takes, ``data`` a file, or texts or records; the first ``samples`` choose, the next
    ``eval_samples`` judge. ``options`` are the fields of :class:`~aqnfx.planning.options.PlanOptions`. KL is in nats per token.
    ``progress(done, total)`` and ``status(text)`` are called as the work goes on. Raises subclasses of
    :class:`~aqnfx.errors.AqnfxError` for bad input and for budgets that nothing can keep.
    """
    wanted, tell, began = PlanOptions(**options), status or (lambda _text: None), time.perf_counter()
    if wanted.rule == "threshold":
        raise InputError("rule threshold reads a sensitivity map, not data; use aqnfx.planning.threshold.threshold_plan")
    ready = prepare_plan(model, data, wanted, tokenizer, tell)
    problem = make_problem(ready.program, wanted)
    for limit in limits(problem, wanted):  # before anything slow
        solve([np.zeros(len(group.choices)) for group in problem.groups], [limit])
    count = min(wanted.samples, len(ready.encoded))
    chosen, held = batches_of(ready, wanted, 0, count), batches_of(ready, wanted, count, len(ready.encoded))
    tell("scoring formats")
    scored = score_options(ready.program, problem, chosen, wanted, progress)
    tell("choosing")
    picked, refined = choose(scored, wanted)
    made = _record(scored, picked, refined, wanted)
    made["predicted"]["measured_here"] = measure_plans(
        ready.program, chosen, {"plan": problem.assignments(picked)}
    )["plan"].kl
    notes = [*ready.notes, *scored.notes, *judging_notes(problem, held)]
    if held:
        tell("measuring")
        made |= compare_plans(ready.program, held, problem, picked, wanted, progress)
    if wanted.pareto:
        made["frontier"] = frontier(scored, wanted)
    if wanted.couple == "fused":
        made["coupling"] |= _coupling_cost(ready.program, scored, picked, wanted)
    facts = {**run_facts(ready, data, wanted, count), **scored.facts, "seconds": time.perf_counter() - began}
    return PrecisionPlan(
        **jsonable(
            made | {"model": model_facts(model, ready.program), "notes": notes, "provenance": facts}
        )
        | {"assignments": problem.assignments(picked)}
    )


def score_options(
    program: Program, problem: Problem, batches: Sequence[Batch], options: PlanOptions, progress: Progress | None = None
) -> Scored:
    """Return the cost of every option from one set of passes over ``batches``, with spot checks measured on them."""
    choices = [(part, choice) for part in problem.parts for choice in problem.options[part.module]]
    formats = dict.fromkeys(name for part, choice in choices for _, name in part.formats(choice))
    sites = dict.fromkeys(site for part, choice in choices for site, _ in part.formats(choice))
    if not formats:
        raise InputError("every choice leaves the model as it is; there is nothing to plan")
    first = next(iter(formats))
    scored = Pipeline.parse(
        f'insert-score{{where="sites:{"|".join(sites)}" kind={first} samples={sum(batch.size for batch in batches)} '
        f'draws={options.draws} channels=false perturb="{"|".join(formats)}" elements=true}}'
    )(program)
    found = predict(scored, eager_forward(scored), batches, draws=options.draws, seed=options.seed, progress=progress)
    made = costs(found, problem.parts, problem.options, truncation=0.0)
    checks = _spot_checks(program, problem, made, batches, options)
    truncation = truncation_from(*(np.array([check[key] for check in checks]) for key in ("predicted", "se", "measured")))
    facts = {key: found.provenance[key] for key in ("passes", "backward_passes", "peak_memory_mib")}
    made = dataclasses.replace(made, truncation=truncation, se=np.hypot(made.se, truncation * made.kl**1.5))
    rows = tuple(check | {"se": float(np.hypot(check["se"], truncation * check["predicted"] ** 1.5))} for check in checks)
    return Scored(problem=problem, costs=made, checks=rows, notes=found.notes,
        facts=facts | {"score_seconds": found.provenance["seconds"]},
    )  # fmt: skip


def choose(scored: Scored, options: PlanOptions) -> tuple[tuple[int, ...], Refined | None]:
    """Return one option per group: the exact optimum of the additive costs, refined where the sketch is sure.

    Raises :class:`InputError` for a budget that nothing keeps.
    """
    problem, rows = scored.problem, scored.problem.rows(scored.costs.index)
    values = [_group_values(scored.costs, group) for group in rows]
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
        kl = plan_kl(scored.costs, _flat(rows, picked)).kl
        if kl <= options.max_kl:
            return picked
        room = min(room * options.max_kl / kl, room * 0.98)  # parts are solved for; together they cost more


def frontier(scored: Scored, options: PlanOptions) -> list[dict[str, Any]]:
    """Return the best plan at each of ``options.pareto`` budgets between the smallest and the largest, from the same costs."""
    problem, rows = scored.problem, scored.problem.rows(scored.costs.index)
    values = [_group_values(scored.costs, group) for group in rows]
    bits = problem.bits(scales=options.count_scales)
    others = [limit for limit in limits(problem, options) if limit.name == "kv_bits"]
    least, most = (sum(float(pick(w)) for w in bits) for pick in (np.min, np.max))
    found = []
    for budget in np.linspace(least, most, max(options.pareto, 2)):
        limit = Limit(name="avg_bits", weights=bits, budget=math.floor(budget + 1e-6), unit=problem.elements)
        chosen = solve(values, [limit, *others])
        predicted = plan_kl(scored.costs, _flat(rows, chosen))
        asked = float(budget) / problem.elements
        found.append({"budget": asked, "used": limit.used(chosen), "kl": predicted.kl, "se": predicted.se})
    return found


def model_facts(model: Any, program: Program) -> dict[str, Any]:
    """Return what a plan records of its model: ``name``, ``digest``, and where it comes from."""
    source = {key: value for key, value in program.source.items() if key not in ("trace_seconds", "origin")}
    name = str(model) if isinstance(model, (str, Path)) else str(getattr(model, "name_or_path", "")) or "(in memory)"
    return source | {"name": name, "digest": model_digest(program)}


def versions() -> dict[str, Any]:
    """Return the versions that a plan records."""
    return {**{package: version(package) for package in ("torch", "transformers", "scipy")}, "aqnfx": aqnfx.__version__}


def run_facts(ready: Prepared, data: Data, options: PlanOptions, count: int) -> dict[str, Any]:
    """Return what a plan records of its run on ``data``, whose first ``count`` samples chose."""
    return versions() | {
        "data": Path(data).name if isinstance(data, (str, Path)) else "(values)", "data_digest": data_digest(ready.encoded),
        "samples": count, "eval_samples": len(ready.encoded) - count, "draws": options.draws, "seed": options.seed,
        "max_length": ready.longest, "device": str(ready.device),
    }  # fmt: skip


def prepare_plan(model: Any, data: Data, wanted: PlanOptions, tokenizer: Any, tell: Callable[[str], None]) -> Prepared:
    """Load, encode, trace and tag for a plan; the samples keep their order, those that choose first."""
    roles = "weight|input|key|value" if wanted.kv_formats is not None else "weight|input"
    options = Options(
        samples=wanted.samples + wanted.eval_samples, batch_size=wanted.batch_size, max_length=wanted.max_length,
        ops=f"{PRODUCTS}|sdpa|matmul|bmm" if wanted.kv_formats is not None else PRODUCTS, roles=roles,
        text_field=wanted.text_field, pack=wanted.pack, device=wanted.device, dtype=wanted.dtype, probes=("site",),
        adaptive=True, perturb=_any_format(wanted),
    )  # fmt: skip  # adaptive keeps the samples in their order; nothing is stopped early here
    return prepare(model, data, options, tokenizer=tokenizer, tell=tell)


def _any_format(wanted: PlanOptions) -> str:
    named = (name for choice in wanted.menu for name in (choice.weight, choice.input) if name is not None)
    if (found := next(named, None)) is None:
        raise InputError("every choice leaves the model as it is; there is nothing to plan")
    return found


def batches_of(ready: Prepared, options: PlanOptions, first: int, last: int) -> list[Batch]:
    """Return samples ``first`` to ``last`` as batches on the device; none where there are no such samples."""
    chosen = ready.encoded[first:last]
    if not chosen:
        return []
    made = make_batches(
        chosen, batch_size=min(options.batch_size, len(chosen)), pad_id=ready.pad, fixed_length=ready.fixed
    )
    return [batch.to(ready.device) for batch in made]


def _group_values(found: Costs, group: Sequence[Sequence[int]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the predicted KL of each option of a group, what its members' errors do to each other included."""
    return np.array([plan_kl(found, rows).kl if len(rows) > 1 else float(found.kl[rows[0]]) for rows in group])


def _flat(rows: Sequence[Sequence[Sequence[int]]], chosen: Sequence[int]) -> list[int]:
    return [row for group, option in zip(rows, chosen, strict=True) for row in group[option]]


def _spot_checks(
    program: Program, problem: Problem, found: Costs, batches: Sequence[Batch], options: PlanOptions
) -> list[dict[str, Any]]:
    """Measure single options, spread evenly over the predicted KL below 0.3 nats, on the samples that they were scored on."""
    order = [row for row in np.argsort(found.kl) if 0.0 < found.kl[row] < _CHECKED_KL]
    # From the upper half: small errors are second order, and a plan's KL is made by the large ones.
    upper = order[len(order) // 2 :]
    rows = {upper[int(i)] for i in np.linspace(0, len(upper) - 1, min(SPOT_CHECKS, len(upper)))} if upper else set()
    named = {row: key for key, row in found.index.items()}
    parts = {part.module: part for part in problem.parts}
    plans, records = {}, []
    for row in sorted(rows):
        module, text = named[row]
        choice = next(choice for choice in problem.options[module] if choice.text == text)
        plans[f"{row}"] = {module: choice.assignment(parts[module])}
        records.append({"module": module, "choice": text, "predicted": float(found.kl[row]), "se": float(found.se[row])})
    if not plans:
        return []
    measured = measure_plans(program, batches, plans)
    return [record | {"measured": measured[name].kl} for record, name in zip(records, plans, strict=True)]


def _record(scored: Scored, picked: Sequence[int], refined: Refined | None, options: PlanOptions) -> dict[str, Any]:
    problem, found = scored.problem, scored.costs
    predicted = plan_kl(found, _flat(problem.rows(found.index), picked))
    goal = next(name for name in ("avg_bits", "bytes", "seconds", "max_kl") if getattr(options, name) is not None)
    used = {limit.name: limit.used(picked) for limit in limits(problem, options)}
    modules = {}
    for part, choice in problem.choices(picked):
        costs_of = {c.text: (part.bits(c), *found.of(part.module, c)) for c in problem.options[part.module]}
        modules[part.module] = {
            "parameters": part.elements, "chosen": choice.text,
            "options": {text: {"bits": bits, "kl": kl, "se": se} for text, (bits, kl, se) in costs_of.items()},
        }  # fmt: skip
    tried = {} if refined is None else {"tried": refined.tried, "taken": refined.taken, "gain": refined.gain}
    value = getattr(options, goal)
    return {
        **problem.sizes(picked), "rule": options.rule, "modules": modules,
        "budget": {"kind": goal, "value": value, "count_scales": options.count_scales, "used": used.get(goal, predicted.kl)}
        | ({"kv_bits": options.kv_bits, "kv_used": used["kv_bits"]} if options.kv_bits is not None else {}),
        "coupling": {
            "mode": options.couple,
            "groups": [
                {"modules": [problem.parts[n].module for n in group.members], "reason": group.reason}
                for group in problem.groups if group.reason is not None
            ],
        },
        "predicted": {
            "kl": predicted.kl, "se": predicted.se, "se_here": predicted.se_here, "additive_kl": predicted.additive,
            "refined": tried, "estimator_spread": found.spread, "truncation": found.truncation,
            "spot_checks": list(scored.checks),
        },
    }  # fmt: skip


def _coupling_cost(program: Program, scored: Scored, picked: Sequence[int], options: PlanOptions) -> dict[str, Any]:
    """Return what sharing formats costs: predicted KL with and without groups, or bits where the KL is what is given."""
    free = dataclasses.replace(options, couple="none")
    alone = dataclasses.replace(scored, problem=make_problem(program, free))
    best, _ = choose(alone, free)
    both = ((scored.problem, picked), (alone.problem, best))
    if options.max_kl is not None:  # both are at the limit of KL: what coupling costs is size
        bits, free_bits = (problem.sizes(chosen)["effective_bits"] for problem, chosen in both)
        return {"effective_bits": bits, "effective_bits_without": free_bits}
    rows = [_flat(problem.rows(scored.costs.index), chosen) for problem, chosen in both]
    fused, free_kl = (plan_kl(scored.costs, chosen).kl for chosen in rows)
    error = kl_difference_error(scored.costs, *rows)
    return {"kl": fused, "kl_without": free_kl, "difference": fused - free_kl, "se": error}
