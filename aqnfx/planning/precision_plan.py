"""PrecisionPlan: the precision of every part of a model, what it costs, and where that is known from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from aqnfx.artifacts import Schema, check_schema, validate
from aqnfx.errors import InputError
from aqnfx.graph.assignments import Assignment, parse_assignments
from aqnfx.graph.frontend import model_digest
from aqnfx.graph.program import Program

_SIZE = Field(ge=0, lt=1e18)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionPlan:
    """One plan as plain JSON values; every field is the key of the same name in the record.

    ``assignments``: module -> formats, with the names of ``named_modules()``. ``avg_bits``: bits per planned weight without
    scales, ``effective_bits`` with them, ``bytes``: what the planned weights take, scales included. ``model``: ``name``,
    ``digest`` (of names, shapes and values), ``model_type``. ``budget``: ``kind``, ``value`` and ``used``. ``rule``: how
    formats were chosen. ``coupling``: ``mode``, ``groups`` of modules that share their formats, and ``kl`` that sharing costs
    (None where it was not asked). ``modules``: module -> ``parameters``, ``chosen`` and, per option of the menu, ``bits``
    and the ``kl`` and ``se`` of that module alone, predicted or, where ``measured``, measured; ``structure``, where it stands
    (:func:`~aqnfx.planning.placement.placements`). ``predicted``: ``kl`` in nats per token of the whole plan, its standard
    errors ``se`` for other samples and ``se_here`` for those that chose, what was measured on these (``measured_here``);
    ``additive_kl``, the sum over modules, ``second_order_kl`` with interactions, ``excess`` (1/nats), what whole plans cost
    beyond it, and the spot checks. ``measured``: scores of the plan on samples that chose nothing (empty where none were
    kept); ``compared``: the same of uniform plans. ``frontier``: plans over budgets. ``provenance``: versions, data, seeds.
    """

    model: dict[str, Any]
    assignments: dict[str, Assignment]
    avg_bits: Annotated[float, _SIZE]
    effective_bits: Annotated[float, _SIZE]
    bytes: Annotated[int, _SIZE]
    budget: dict[str, Any] = field(default_factory=dict)
    rule: str = "optimal"
    coupling: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    predicted: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    compared: list[dict[str, Any]] = field(default_factory=list)
    frontier: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_record(self) -> dict[str, Any]:
        """Return the plan as plain JSON values, schema ``aqnfx.plan/1``."""
        record = {"schema": Schema.PLAN} | {item.name: getattr(self, item.name) for item in fields(self)}
        return record | {"assignments": {module: found.to_record() for module, found in self.assignments.items()}}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str = "the plan") -> PrecisionPlan:
        """Return the plan of a record; raises :class:`ArtifactError` in one line for one that is none, or was changed."""
        check_schema(record, Schema.PLAN, where)
        validate(_checker(), dict(record), where)
        given = {item.name: record[item.name] for item in fields(cls) if item.name in record}
        return cls(**given | {"assignments": parse_assignments(given["assignments"], where)})


@cache
def _checker() -> type[BaseModel]:
    """Return the model that a record is checked with: the fields of a plan, as their annotations describe them."""
    hints = get_type_hints(PrecisionPlan, include_extras=True)
    wanted: dict[str, Any] = {
        item.name: (hints[item.name], ... if item.default is item.default_factory is MISSING else None)
        for item in fields(PrecisionPlan)
        if item.name != "assignments"
    }
    base = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, protected_namespaces=())
    return create_model("PlanRecord", __config__=base, assignments=(dict[str, Any], ...), **wanted)


def check_model(plan: PrecisionPlan, program: Program, path: str | Path) -> None:
    """Raise :class:`InputError` where the plan was made for other weights than those of ``program``."""
    made_for = plan.model.get("digest")
    if made_for is not None and made_for != model_digest(program):
        name = plan.model.get("name", "another model")
        raise InputError(f"{path} was made for {name}, whose weights are not those of the model given; make a plan for this one")
