"""plan(): from a model, data and a budget to a precision plan, predicted, and measured on samples that chose nothing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from aqnfx.artifacts import jsonable, versions
from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.errors import InputError
from aqnfx.graph.frontend import model_digest
from aqnfx.graph.program import Program
from aqnfx.graph.selector import Selector
from aqnfx.passes.insert_score import InsertScore
from aqnfx.passes.partition_blocks import PartitionBlocks
from aqnfx.planning.checks import check_options
from aqnfx.planning.choose import Scored, choose, flat, frontier
from aqnfx.planning.costs import costs
from aqnfx.planning.evaluate import Evaluator
from aqnfx.planning.exchanges import settle
from aqnfx.planning.interactions import Refined, kl_difference_error, plan_kl
from aqnfx.planning.knapsack import solve
from aqnfx.planning.options import PlanOptions
from aqnfx.planning.placement import placements
from aqnfx.planning.precision_plan import PrecisionPlan
from aqnfx.planning.problem import PRODUCTS, Problem, limits, make_problem
from aqnfx.planning.rivals import Progress, compare_plans, judging_notes
from aqnfx.probes.data.batches import Batch, data_digest, make_batches
from aqnfx.probes.data.examples import Data
from aqnfx.probes.forward import eager_forward
from aqnfx.probes.predict import predict
from aqnfx.probes.prepare import Prepared, prepare


def plan(
    model: nn.Module | Program | str | Path, data: Data, *, tokenizer: Any = None, smap: SensitivityMap | None = None,
    progress: Progress | None = None, status: Callable[[str], None] | None = None, **options: Any,
) -> PrecisionPlan:  # fmt: skip
    """Choose the format of every linear layer of a language model under a budget, and measure the plan.

    ``model`` is what :func:`aqnfx.trace` takes, ``data`` a file, or texts or records; the first ``samples`` choose, the next
    ``eval_samples`` judge. ``smap``, a sensitivity map of the model, chooses nothing: the reasons that the plan names come from
    its statistics. ``options`` are the fields of :class:`~aqnfx.planning.options.PlanOptions`. KL is in nats per token.
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
    placed = placements(ready.program, problem, smap)  # before the passes: a map of another model is refused here
    scored = score_options(ready.program, problem, chosen, wanted, progress)
    tell("spot checks and choosing")
    evaluator = Evaluator.of(ready.program, chosen)
    scored = check_options(evaluator, scored, wanted, progress)
    picked, refined = choose(scored, wanted)
    settled = settle(evaluator, scored, wanted, picked, progress)
    picked = settled.chosen
    made = _record(scored, picked, refined, wanted)
    for module, place in placed.items():
        made["modules"][module]["structure"] = place
    made["predicted"] |= {"measured_here": settled.kl, "exchanges": settled.record()}
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
    """Return the predicted cost of every option, from one set of passes over ``batches``."""
    choices = [(part, choice) for part in problem.parts for choice in problem.options[part.module]]
    formats = dict.fromkeys(name for part, choice in choices for _, name in part.formats(choice))
    sites = dict.fromkeys(site for part, choice in choices for site, _ in part.formats(choice))
    if not formats:
        raise InputError("every choice leaves the model as it is; there is nothing to plan")
    first = next(iter(formats))
    scored = InsertScore(
        where=str(Selector(sites=tuple(sites))), kind=first, samples=sum(batch.size for batch in batches), draws=options.draws,
        channels=False, perturb=tuple(formats), elements=True,
    )(program)  # fmt: skip
    found = predict(scored, eager_forward(scored), batches, draws=options.draws, seed=options.seed, progress=progress)
    facts = {key: found.provenance[key] for key in ("passes", "backward_passes", "peak_memory_mib")}
    return Scored(
        problem=problem, costs=costs(found, problem.parts, problem.options), notes=found.notes,
        facts=facts | {"score_seconds": found.provenance["seconds"]},
    )  # fmt: skip


PACKAGES = ("torch", "transformers", "scipy")
"""The packages whose versions a plan records."""


def model_facts(model: Any, program: Program) -> dict[str, Any]:
    """Return what a plan records of its model: ``name``, ``digest``, and where it comes from."""
    source = {key: value for key, value in program.source.items() if key not in ("trace_seconds", "origin")}
    name = str(model) if isinstance(model, (str, Path)) else str(getattr(model, "name_or_path", "")) or "(in memory)"
    return source | {"name": name, "digest": model_digest(program)}


def run_facts(ready: Prepared, data: Data, options: PlanOptions, count: int) -> dict[str, Any]:
    """Return what a plan records of its run on ``data``, whose first ``count`` samples chose."""
    return versions(*PACKAGES) | {
        "data": Path(data).name if isinstance(data, (str, Path)) else "(values)", "data_digest": data_digest(ready.encoded),
        "samples": count, "eval_samples": len(ready.encoded) - count, "draws": options.draws, "seed": options.seed,
        "max_length": ready.longest, "device": str(ready.device),
    }  # fmt: skip


def prepare_plan(model: Any, data: Data, wanted: PlanOptions, tokenizer: Any, tell: Callable[[str], None]) -> Prepared:
    """Load, encode, trace and tag for a plan; the samples keep their order, those that choose first."""
    _check_menu(wanted)
    roles = "weight|input|key|value" if wanted.kv_formats is not None else "weight|input"
    ops = f"{PRODUCTS}|sdpa|matmul|bmm" if wanted.kv_formats is not None else PRODUCTS
    read = dataclasses.replace(wanted, samples=wanted.samples + wanted.eval_samples)
    where = f"ops:{ops},roles:{roles}"
    ready = prepare(model, data, read, where=where, in_order=True, tokenizer=tokenizer, tell=tell)
    return dataclasses.replace(ready, program=PartitionBlocks()(ready.program))  # plans start from blocks


def _check_menu(wanted: PlanOptions) -> None:
    if all(name is None for choice in wanted.menu for name in (choice.weight, choice.input)):
        raise InputError("every choice leaves the model as it is; there is nothing to plan")


def batches_of(ready: Prepared, options: PlanOptions, first: int, last: int) -> list[Batch]:
    """Return samples ``first`` to ``last`` as batches on the device; none where there are no such samples."""
    chosen = ready.encoded[first:last]
    if not chosen:
        return []
    made = make_batches(
        chosen, batch_size=min(options.batch_size, len(chosen)), pad_id=ready.pad, fixed_length=ready.fixed
    )
    return [batch.to(ready.device) for batch in made]


def _record(scored: Scored, picked: Sequence[int], refined: Refined | None, options: PlanOptions) -> dict[str, Any]:
    problem, found = scored.problem, scored.costs
    predicted = plan_kl(found, flat(problem.rows(found.index), picked))
    goal = next(name for name in ("avg_bits", "bytes", "seconds", "max_kl") if getattr(options, name) is not None)
    used = {limit.name: limit.used(picked) for limit in limits(problem, options)}
    modules = {}
    for part, choice in problem.choices(picked):
        rows = {c.text: found.index[part.module, c.text] for c in problem.options[part.module]}
        modules[part.module] = {
            "parameters": part.elements, "chosen": choice.text,
            "options": {
                c.text: {"bits": part.bits(c), "kl": float(found.kl[row]), "se": float(found.se[row])}
                | ({"measured": True} if found.measured[row] else {})
                for c, row in ((c, rows[c.text]) for c in problem.options[part.module])
            },
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
            "second_order_kl": predicted.second_order, "refined": tried, "estimator_spread": found.spread,
            "truncation": found.truncation, "excess": found.excess.c, "excess_se": found.excess.se,
            "spot_checks": list(scored.checks), "whole_plans": list(scored.whole_plans),
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
    rows = [flat(problem.rows(scored.costs.index), chosen) for problem, chosen in both]
    fused, free_kl = (plan_kl(scored.costs, chosen).kl for chosen in rows)
    error = kl_difference_error(scored.costs, *rows)
    return {"kl": fused, "kl_without": free_kl, "difference": fused - free_kl, "se": error}
