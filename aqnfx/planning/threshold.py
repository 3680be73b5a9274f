"""The threshold rule: a format per linear layer from its sensitivity alone, to compare plans under budgets with.

A layer that loses more than 0.15 gets the first of three formats, one that loses more than 0.05 the second, any other the
third. The rule knows neither sizes nor how much worse the next format is, and asks for a map at a level that resembles the
formats' errors: that is what an optimal plan does better.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aqnfx.artifacts import jsonable, versions
from aqnfx.diagnosis.explain.map_of_model import as_probed, check_interval, check_number, map_facts
from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.errors import InputError
from aqnfx.graph.lengths import recorded, trace_for
from aqnfx.graph.program import Program
from aqnfx.graph.sites import Role
from aqnfx.planning.menu import Part
from aqnfx.planning.options import DEFAULT_FORMATS, THRESHOLDS, PlanOptions
from aqnfx.planning.planner import PACKAGES, batches_of, model_facts, prepare_plan, run_facts
from aqnfx.planning.precision_plan import PrecisionPlan
from aqnfx.planning.problem import Group, Problem, make_problem
from aqnfx.planning.rivals import Progress, compare_plans, judging_notes
from aqnfx.probes.data.examples import Data

FORMATS = tuple(DEFAULT_FORMATS["threshold"].split(","))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What a map says of a linear layer: its relative degradation ``value`` at the base level, with interval.

    ``source`` is ``site``, ``layer`` or ``operator``, ``of`` the name of that entry. ``estimated``: predicted, not measured.
    """

    value: float
    ci: tuple[float, float] | None
    source: str
    of: str
    estimated: bool

    def straddles(self, threshold: float) -> bool:
        """Say whether the interval holds ``threshold``, so that the map does not settle the side; true without an interval."""
        return self.ci is None or self.ci[0] <= threshold < self.ci[1]

    def to_record(self) -> dict[str, Any]:
        """Return the fields as a plan's ``modules`` hold them."""
        return {"sensitivity": self.value} | {k: v for k, v in dataclasses.asdict(self).items() if k != "value"}


def threshold_plan(
    model: nn.Module | Program | str | Path, smap: SensitivityMap | Mapping[str, Any], data: Data | None = None, *,
    formats: Sequence[str] = FORMATS, thresholds: tuple[float, float] = THRESHOLDS, tokenizer: Any = None,
    progress: Progress | None = None, status: Callable[[str], None] | None = None, **options: Any,
) -> PrecisionPlan:  # fmt: skip
    """Choose the format of every linear layer by comparing its sensitivity with two thresholds; with ``data`` measure the plan.

    ``smap`` is a map of ``model`` or its record; sensitivities are relative degradations (fractions) at its base level.
    ``formats``: three choices from precise to coarse. ``options`` are fields of
    :class:`~aqnfx.planning.options.PlanOptions` without goals. Data choose nothing: the plan is judged on the samples that
    judge an optimal plan, those after the first ``samples``, or on all where there are no more. Raises
    :class:`~aqnfx.errors.ArtifactError` for a map of another model, :class:`InputError` for a layer that it says nothing of.
    """
    began, tell = time.perf_counter(), status or (lambda _text: None)
    smap = smap if isinstance(smap, SensitivityMap) else SensitivityMap.from_record(smap)
    wanted = PlanOptions(rule="threshold", formats=",".join(formats), thresholds=thresholds, **options)
    ready = None if data is None else prepare_plan(model, data, wanted, tokenizer, tell)
    tell("tracing")
    program = _traced(model, smap, wanted) if ready is None else ready.program
    tagged = as_probed(program, smap)
    problem = make_problem(tagged, wanted)
    found = {part.module: sensitivity(part, tagged, smap) for part in problem.parts}
    picked, asked = choose_by_threshold(problem, found, wanted)
    made: dict[str, Any] = problem.sizes(picked) | {
        "rule": wanted.rule, "modules": _modules(problem, picked, asked, found, wanted),
        "budget": {"kind": "thresholds", "value": list(wanted.thresholds)},
        "coupling": {
            "mode": wanted.couple,
            "groups": [
                {"modules": [problem.parts[n].module for n in group.members], "reason": group.reason}
                for group in problem.groups if group.reason is not None
            ],
        },
    }  # fmt: skip
    facts, notes = dict[str, Any](versions(*PACKAGES)), _notes(smap, found, wanted)
    if ready is not None and data is not None:
        first = wanted.samples if wanted.samples < len(ready.encoded) else 0
        held = batches_of(ready, wanted, first, len(ready.encoded)) if wanted.eval_samples else []
        if held:
            tell("measuring")
            made |= compare_plans(ready.program, held, problem, picked, wanted, progress)
        facts |= run_facts(ready, data, wanted, first) | {"samples": 0, "skipped_samples": first}
        notes += [*ready.notes, *judging_notes(problem, held), *_overlap(smap, facts)]
    facts |= {"map": map_facts(smap), "seconds": time.perf_counter() - began}
    record = made | {"model": model_facts(model, tagged), "notes": notes, "provenance": facts}
    return PrecisionPlan(**jsonable(record) | {"assignments": problem.assignments(picked)})


def _traced(model: nn.Module | Program | str | Path, smap: SensitivityMap, options: PlanOptions) -> Program:
    if isinstance(model, Program):
        return model
    how: dict[str, Any] = {"dtype": getattr(torch, options.dtype), "allow_missing": options.allow_missing}
    return trace_for(model, recorded(smap.provenance), **how)


def sensitivity(part: Part, program: Program, smap: SensitivityMap) -> Sensitivity | None:
    """Return what the map says of a part: of its own sites if it has them, else of its layer, else of its operator.

    Own sites are those of the weight, else of the output, else of the input; of several (a layer that runs twice) the most
    sensitive. ``program`` is tagged. None where the map says nothing. Raises :class:`ArtifactError` for values of the wrong kind.
    """
    weights = part.sites_of(Role.WEIGHT)
    entries = {entry["id"]: entry for entry in smap.per_site}
    outputs = tuple(site.removesuffix(f":{Role.WEIGHT}") for site in weights)
    for sites in (weights, outputs, part.sites_of(Role.INPUT)):
        found = [known for site in sites if site in entries and (known := _of_site(entries[site], smap)) is not None]
        if found:
            return max(found, key=lambda known: known.value)
    label = program.layer_label(part.stack, part.layer)
    if label is not None and (value := smap.per_layer.get(label)) is not None:
        return _read(value, smap.at_base("layer", label), source="layer", of=label)
    kind = str(program.places[weights[0]].site.op)
    if (value := smap.per_operator.get(kind)) is not None:
        return _read(value, smap.at_base("operator", kind), source="operator", of=kind)
    return None


def choose_by_threshold(
    problem: Problem, found: Mapping[str, Sensitivity | None], options: PlanOptions
) -> tuple[tuple[int, ...], dict[str, int | None]]:
    """Return one option per group, and per module the number of the format that the rule asks for (None: nothing known).

    A group gets what its most sensitive member asks for. Where that format is not to be had (blocks that do not divide, a
    floor), the next more precise one, else the nearest. Raises :class:`InputError` for a module in question that the map
    says nothing of.
    """
    menu, picked = options.menu, []
    asked = {
        module: None if known is None else sum(known.value <= bound for bound in options.thresholds)
        for module, known in found.items()
    }  # fmt: skip
    for group in problem.groups:
        if len(group.choices) == 1:  # pinned, or nothing else fits
            picked.append(0)
            continue
        modules = [problem.parts[n].module for n in group.members]
        if unknown := [module for module in modules if asked[module] is None]:
            raise InputError(
                f"the sensitivity map says nothing of {unknown[0]}: no number for its site, its layer or its operator; diagnose "
                "with --probes operator,layer or site, or give its format by --keep"
            )
        picked.append(_available(group, menu.index, min(number for m in modules if (number := asked[m]) is not None)))
    return tuple(picked), asked


def _available(group: Group, place: Callable[[Any], int], wanted: int) -> int:
    places = [place(choice) for choice in group.choices]
    enough = [number for number in places if number <= wanted]
    return places.index(max(enough) if enough else min(places))


def _of_site(entry: Mapping[str, Any], smap: SensitivityMap) -> Sensitivity | None:
    for table in ("measured", "estimated"):
        levels = entry.get(table, {})
        level = levels.get(smap.base_key) if isinstance(levels, Mapping) else None
        if isinstance(level, Mapping) and level.get("degradation") is not None:
            return _read(level["degradation"], level, source="site", of=str(entry["id"]), estimated=table == "estimated")
    return None


def _read(value: Any, level: Mapping[str, Any], *, source: str, of: str, estimated: bool = False) -> Sensitivity:
    check_number(value, f"the degradation of {source} {of!r}")
    ci = check_interval(level.get("degradation_ci"), f"degradation_ci of {source} {of!r}")
    return Sensitivity(value=float(value), ci=ci, source=source, of=of, estimated=estimated or bool(level.get("estimated")))


def _modules(
    problem: Problem, picked: Sequence[int], asked: Mapping[str, int | None], found: Mapping[str, Sensitivity | None],
    options: PlanOptions,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    records = {}
    for part, choice in problem.choices(picked):
        known, number = found[part.module], asked[part.module]
        records[part.module] = {
            "parameters": part.elements, "chosen": choice.text,
            "options": {c.text: {"bits": part.bits(c)} for c in problem.options[part.module]},
            "asked": None if number is None else options.menu[number].text,
        } | ({} if known is None else known.to_record())  # fmt: skip
    return records


def _notes(smap: SensitivityMap, found: Mapping[str, Sensitivity | None], options: PlanOptions) -> list[str]:
    known = [item for item in found.values() if item is not None]
    notes = [f"sensitivities are those {smap.perturbation.of(smap.base_level)}; a map at another level gives another plan"]
    counts = {name: sum(item.source == name for item in known) for name in ("site", "layer", "operator")}
    said = ", ".join(f"{number} by {name}" for name, number in counts.items() if number)
    guessed = sum(item.estimated for item in known)
    notes.append(f"{len(known)} sensitivities: {said}" + (f"; {guessed} predicted and not measured" if guessed else ""))
    open_ = sum(any(item.straddles(bound) for bound in options.thresholds) for item in known)
    if open_:
        notes.append(f"{open_} of {len(known)} are not settled by the map: their interval holds a threshold, or is not known")
    if guessed and smap.second_order_fails:
        notes.append(f"predictions do not hold at level {smap.base_level:g}, so the predicted sensitivities are no guide")
    if smap.partial:
        notes.append(f"the map is of an interrupted run, on {smap.samples} samples")
    return notes


def _overlap(smap: SensitivityMap, facts: Mapping[str, Any]) -> list[str]:
    read = smap.provenance.get("data")
    if isinstance(read, Mapping) and read.get("path") == facts["data"] != "(values)":
        return [f"the map was made from data of the same name ({facts['data']}): the plan may be judged on samples that made it"]
    return []
