"""The problem that a plan solves: parts, their choices, groups that choose together, and budgets."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from aqnfx.errors import InputError, nearest
from aqnfx.graph.assignments import Assignment, operands_by_module
from aqnfx.graph.coupling import coupling_groups
from aqnfx.graph.program import Program
from aqnfx.graph.sites import Role
from aqnfx.planning.knapsack import Limit
from aqnfx.planning.menu import Choice, Part, cache_part, check_groups, weight_part
from aqnfx.planning.options import PlanOptions, choice_bits
from aqnfx.probes.settings import byte_count

Array = NDArray[np.float64]
PRODUCTS = "linear|grouped_mm"
"""The operations whose weights are planned: linear layers and stacked experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Parts that get one choice: ``members`` are their numbers, ``choices`` what all of them can have."""

    members: tuple[int, ...]
    choices: tuple[Choice, ...]
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Parts in execution order, module -> its choices, and the groups that choose together."""

    parts: tuple[Part, ...]
    options: Mapping[str, tuple[Choice, ...]]
    groups: tuple[Group, ...]

    def assignments(self, chosen: Sequence[int]) -> dict[str, Assignment]:
        """Return module -> formats of one option per group."""
        return {part.module: choice.assignment(part) for part, choice in self.choices(chosen)}

    def choices(self, chosen: Sequence[int]) -> list[tuple[Part, Choice]]:
        """Return every part with its choice, in execution order."""
        picked = {
            number: group.choices[option]
            for group, option in zip(self.groups, chosen, strict=True) for number in group.members
        }
        return [(part, picked[number]) for number, part in enumerate(self.parts)]

    def rows(self, index: Mapping[tuple[str, str], int]) -> list[list[list[int]]]:
        """Return, per group and option, the rows of the costs of its members."""
        return [
            [[index[self.parts[number].module, choice.text] for number in group.members] for choice in group.choices]
            for group in self.groups
        ]

    def bits(self, *, scales: bool, cache: bool = False) -> tuple[Array, ...]:
        """Return, per group, the bits of each option, experts by their share: of weights, or of keys and values."""
        return tuple(
            np.array([
                sum(
                    self.parts[n].bits(choice, scales=scales) * self.parts[n].share
                    for n in group.members if self.parts[n].cache == cache
                )
                for choice in group.choices
            ], dtype=np.float64)
            for group in self.groups
        )  # fmt: skip

    def sizes(self, chosen: Sequence[int]) -> dict[str, float | int]:
        """Return ``avg_bits`` per weight, ``effective_bits`` with scales, and ``bytes`` of the planned weights with scales."""
        per = [
            sum(float(w[o]) for w, o in zip(self.bits(scales=scales), chosen, strict=True)) / self.elements
            for scales in (False, True)
        ]
        weights = sum(part.bits(choice) for part, choice in self.choices(chosen) if not part.cache)
        return {"avg_bits": per[0], "effective_bits": per[1], "bytes": -(-weights // 8)}

    @property
    def elements(self) -> float:
        """Number of planned weights, experts by their share."""
        return sum(part.elements * part.share for part in self.parts)


def make_problem(program: Program, options: PlanOptions) -> Problem:
    """Return the problem that ``options`` pose on a tagged program.

    Raises :class:`InputError` for names that match nothing, formats that fit nowhere, and choices that contradict each other.
    """
    chosen = {site.id for site in program.select(_where(options))}
    caches = _where(options, ops="", roles="key|value")
    held = {site.id for site in program.select(caches)} if options.kv_formats is not None else set()
    parts = []
    for module, places in operands_by_module(program).items():
        weights = [place for place in places if place.site.role is Role.WEIGHT and place.site.id in chosen]
        if weights:
            nodes = {place.node for place in weights}
            parts.append(weight_part(program, module, [p for p in places if p.node in nodes], active=options.active_experts))
        elif (stored := [p for p in places if p.site.id in held]) and (part := cache_part(module, stored)) is not None:
            parts.append(part)
    if not any(not part.cache for part in parts):
        raise InputError(f"nothing to plan: {_where(options)!r} selects no linear layer with a weight")
    table = _choices(parts, options)
    return Problem(parts=tuple(parts), options=table, groups=tuple(_groups(program, parts, table, options)))


def limits(problem: Problem, options: PlanOptions) -> list[Limit]:
    """Return the budgets of a plan; none for ``max_kl``, which bounds the cost."""
    found = []
    weights = problem.bits(scales=options.count_scales)
    if options.avg_bits is not None:
        found.append(_average("avg_bits", weights, options.avg_bits, problem.elements))
    if options.bytes is not None:
        room = 8.0 * byte_count("bytes", options.bytes)
        found.append(Limit(name="bytes", weights=weights, budget=room, unit=8.0))
    if options.seconds is not None:
        found.append(Limit(name="seconds", weights=_latency(problem, options), budget=options.seconds))
    if options.kv_bits is not None:
        caches = problem.bits(scales=options.count_scales, cache=True)
        width = sum(math.prod(part.shape) for part in problem.parts if part.cache)
        if not width:
            raise InputError("kv_formats and kv_bits are given, and none of the planned layers has keys and values to store")
        found.append(_average("kv_bits", caches, options.kv_bits, float(width)))
    return found


def _average(name: str, weights: tuple[Array, ...], bits: float, count: float) -> Limit:
    """Return the budget of ``bits`` per value for ``count`` values, taken as the decimal number that it is written as."""
    return Limit(name=name, weights=weights, budget=float(Fraction(repr(float(bits))) * Fraction(repr(count))), unit=count)


def _where(options: PlanOptions, *, ops: str = PRODUCTS, roles: str = "weight|input") -> str:
    fields = {"layers": options.layers, "modules": "|".join(options.modules), "ops": ops, "roles": roles}
    return ",".join(f"{name}:{value}" for name, value in fields.items() if value)


def _choices(parts: Sequence[Part], options: PlanOptions) -> dict[str, tuple[Choice, ...]]:
    """Return module -> choices: the menu, less what does not fit or is below a floor; one choice where it is pinned."""
    kept, modules = options.kept(), [part.module for part in parts]
    for pattern in kept:
        if not fnmatch.filter(modules, pattern):
            raise InputError(f"keep {pattern!r} matches none of the {len(modules)} planned modules{nearest(pattern, modules)}")
    found: dict[str, tuple[Choice, ...]] = {}
    for part in parts:
        # A glob that means layers must not reach the keys and values between them: those are pinned by their exact name.
        pins = {
            pattern: choice for pattern, choice in kept.items()
            if part.module == pattern or (not part.cache and fnmatch.fnmatchcase(part.module, pattern))
        }
        if len(set(pins.values())) > 1:
            raise InputError(f"{part.module} is kept twice and differently, by {' and by '.join(pins)}")
        menu = options.kv_menu if part.cache else options.menu
        floor = 0.0 if part.cache else _floor(part, options)
        if pins:
            pattern, pin = next(iter(pins.items()))
            if choice_bits(pin) < floor:
                raise InputError(f"{part.module} is kept in {pin.text} by {pattern!r}, below its layer's floor of {floor:g} bits")
            found[part.module] = check_groups([part], list(pins.values())[:1], options.partial)[part.module]
            continue
        fits = check_groups([part], menu, options.partial)[part.module]
        found[part.module] = tuple(choice for choice in fits if choice_bits(choice) >= floor)
        if not found[part.module]:
            raise InputError(f"{part.module}: no format of the menu that fits has the {floor:g} bits of its layer's floor")
    layers = {_layer(part) for part in parts} | {str(part.layer) for part in parts}
    if unknown := [layer for layer in options.floor if layer not in layers]:
        raise InputError(f"floor of layer {unknown[0]}: no planned module is in it")
    return found


def _layer(part: Part) -> str:
    return f"{part.stack}:{part.layer}"


def _floor(part: Part, options: PlanOptions) -> float:
    return max((bits for layer, bits in options.floor.items() if layer in (_layer(part), str(part.layer))), default=0.0)


def _groups(
    program: Program, parts: Sequence[Part], table: Mapping[str, tuple[Choice, ...]], options: PlanOptions
) -> Iterator[Group]:
    """Yield the groups: one per part, or, fused, one per coupling group with the choices that all members have."""
    owner = {site: number for number, part in enumerate(parts) for site in part.sites_of(Role.WEIGHT)}
    coupled: dict[int, tuple[tuple[int, ...], str]] = {}
    for group in coupling_groups(program) if options.couple == "fused" else ():
        members = tuple(dict.fromkeys(owner[site] for site in group.sites if site in owner))
        if len(members) > 1:
            coupled |= dict.fromkeys(members, (members, group.reason))
    for number, part in enumerate(parts):
        members, reason = coupled.get(number, ((number,), None))
        if number != members[0]:
            continue
        shared = tuple(c for c in table[part.module] if all(c in table[parts[n].module] for n in members))
        if not shared:
            named = ", ".join(parts[n].module for n in members)
            raise InputError(f"{named} are fused and have no choice in common; keep them alike, or plan with couple none")
        yield Group(members=members, choices=shared, reason=reason)


def _latency(problem: Problem, options: PlanOptions) -> tuple[Array, ...]:
    table = options.latency_table
    known = [part.module for part in problem.parts]
    if unknown := [module for module in table if module != "*" and module not in known]:
        raise InputError(f"the latency table names {unknown[0]!r}, which is not planned{nearest(unknown[0], known)}")

    def seconds(part: Part, choice: Choice) -> float:
        row = {**table.get("*", {}), **table.get(part.module, {})}
        if choice.text not in row:
            raise InputError(f"the latency table has no {choice.text} for {part.module}, nor for '*'")
        return row[choice.text]

    return tuple(
        np.array([
            sum(seconds(problem.parts[n], c) for n in group.members if not problem.parts[n].cache) for c in group.choices
        ])
        for group in problem.groups
    )
