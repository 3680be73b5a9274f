"""Assignments: which number format each module's operands are stored in, as a plan file says it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, StrictStr

from aqnfx.artifacts import Schema, read_json, validate
from aqnfx.errors import AqnfxError, InputError, nearest
from aqnfx.graph.operands import Place, origin
from aqnfx.graph.program import Program
from aqnfx.graph.sites import Role
from aqnfx.numerics.formats import parse_format

STORED = (Role.WEIGHT, Role.INPUT, Role.KEY, Role.VALUE)
"""The operands that a plan assigns formats to."""


def _canonical(text: str) -> str:
    try:
        return parse_format(text).name
    except InputError as error:
        raise ValueError(str(error)) from error


_Format = Annotated[StrictStr, AfterValidator(_canonical)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Formats of one module's operands by their canonical names; None: stored as the model has it."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # of a file; code gives canonical names
    weight: _Format | None = None
    input: _Format | None = None
    key: _Format | None = None
    value: _Format | None = None

    def formats(self) -> dict[Role, str]:
        """Return the formats that are set, by role."""
        return {role: name for role in STORED if (name := getattr(self, str(role))) is not None}

    def to_record(self) -> dict[str, str | None]:
        """Return ``weight`` and ``input``, and ``key`` and ``value`` where one of them is set: a plan's JSON."""
        caches = {"key": self.key, "value": self.value} if self.key or self.value else {}
        return {"weight": self.weight, "input": self.input, **caches}


def read_assignments(path: str | Path) -> dict[str, Assignment]:
    """Return module -> assignment of a plan file.

    Raises :class:`InputError` for one that cannot be read, :class:`ArtifactError` for any other file, each in one line.
    """
    try:
        record = read_json(path, schema=Schema.PLAN)
    except AqnfxError as error:
        raise type(error)(f"{error}; make a plan by aqnfx plan MODEL --data FILE --out plan.json") from error
    return parse_assignments(record.get("assignments"), str(path))


def parse_assignments(found: Any, where: str) -> dict[str, Assignment]:
    """Return module -> assignment from a plan's JSON value; raises :class:`ArtifactError` naming what does not fit."""
    kind = Annotated[dict[StrictStr, Assignment], Field(min_length=1)]
    checked: dict[str, Assignment] = validate(kind, found, f"{where}: assignments")
    return checked


def operands_by_module(program: Program) -> dict[str, tuple[Place, ...]]:
    """Return the operands that a plan can assign formats to, by the name that it calls their module, in execution order.

    That is the module's name as in the checkpoint; where a module multiplies by several weights (the experts of a router),
    the name of the weight. Keys and values stand under the module that computes the attention.
    """
    weights: dict[str, set[str]] = defaultdict(set)
    parameters: dict[Any, str] = {}
    for place in program.places.values():
        if place.site.role is Role.WEIGHT and (source := origin(place.value)).op == "get_attr":
            parameters[place.node] = str(source.target)
            weights[place.site.module].add(str(source.target))
    found: dict[str, list[Place]] = defaultdict(list)
    for place in program.places.values():
        role, module = place.site.role, place.site.module
        if role in (Role.KEY, Role.VALUE):
            found[module].append(place)
        elif role in (Role.WEIGHT, Role.INPUT) and place.node in parameters:
            several = len(weights[module]) > 1
            found[parameters[place.node] if several else module].append(place)
    return {module: tuple(places) for module, places in found.items()}


def assigned_sites(program: Program, assignments: Mapping[str, Assignment]) -> dict[str, tuple[str, ...]]:
    """Return format -> ids of the operands that are stored in it, in execution order, every one of the assignments matched.

    Raises :class:`InputError` for a module that the program does not have, or an operand that its module does not read.
    """
    known = operands_by_module(program)
    missing = [module for module in assignments if module not in known]
    if missing:
        raise InputError(
            f"the plan names {len(missing)} of {len(assignments)} modules that this model does not have, first "
            f"{missing[0]!r}{nearest(missing[0], known)}; was it made for another model?"
        )
    found: dict[str, list[str]] = defaultdict(list)
    for module, assignment in assignments.items():
        for role, name in assignment.formats().items():
            places = [place.site.id for place in known[module] if place.site.role is role]
            if not places:
                raise InputError(f"the plan stores the {role} of {module} in {name}, and that module reads no {role}")
            found[name].extend(places)
    # Not in the order of the file: readers of one value share a node, which stands before the first of them.
    order = {site: index for index, site in enumerate(program.places)}
    return {name: tuple(sorted(sites, key=order.__getitem__)) for name, sites in found.items()}
