"""Divergences: relative errors by site, layer or module that were seen elsewhere, from a file ``aqnfx.divergences/1``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, StrictStr

from aqnfx.artifacts import Schema, check_schema, validate
from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.errors import InputError, nearest
from aqnfx.graph.program import Program

SIGNIFICANT = (1e-1, 1e-2)
"""Relative errors above which a migration plan gives priority 1, and at least priority 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a name stands for: the label of the ``layer`` that it is or lies in, else the ``module`` that it is or is of."""

    layer: str | None = None
    module: str = ""


def parse_divergences(record: Any, where: str) -> dict[str, float]:
    """Return name -> relative error (a fraction) of the JSON ``{"schema": "aqnfx.divergences/1", "sites": {name: number}}``.

    Raises :class:`ArtifactError`, one line, for anything else.
    """
    check_schema(record, Schema.DIVERGENCES, where)
    checked = validate(_Divergences, dict(record), where)
    return dict(checked.sites)


class _Divergences(BaseModel):
    """The record: site or module or layer -> relative error."""

    sites: Annotated[
        dict[StrictStr, Annotated[float, Field(strict=True, ge=0, lt=1e18)]], Field(min_length=1)
    ]


def check_thresholds(thresholds: tuple[float, float]) -> None:
    """Raise :class:`InputError` unless ``thresholds`` are two finite falling numbers of at least 0."""
    high, low = thresholds
    if not (math.isfinite(high) and high > low >= 0):
        raise InputError(f"divergence thresholds are two falling numbers of at least 0, found {high:g}, {low:g}")


def locate(name: str, smap: SensitivityMap, program: Program | None = None) -> Target:
    """Return what ``name`` stands for: a site id, else a layer label, else a module or what holds modules.

    Names are those of the map's sites and layers and, with a tagged ``program``, of all of its. Raises :class:`InputError` for
    an unknown one.
    """
    sites, labels = _known(smap, program)
    if name in sites:
        module, layer = sites[name]
        return Target(layer=layer, module=module)
    if name in labels:
        return Target(layer=name)
    inside = {layer for module, layer in sites.values() if module == name or module.startswith(f"{name}.")}
    if not inside:
        known = [*sites, *labels, *dict.fromkeys(module for module, _ in sites.values())]
        whose = "the model" if program is not None else "the map"
        raise InputError(f"divergences: {whose} has no site, layer or module {name[:120]!r}{nearest(name, known)}")
    # What reaches over several layers is no layer's.
    return Target(layer=inside.pop() if len(inside) == 1 else None, module=name)


def _known(smap: SensitivityMap, program: Program | None) -> tuple[dict[str, tuple[str, str | None]], set[str]]:
    """Return site id -> (module, layer label or None), and the labels of all layers."""
    labels = {*smap.per_layer, *(str(layer) for window in smap.windows for layer in window["layers"])}
    if program is not None:
        found = {name: place.site for name, place in program.places.items()}
        labels |= {str(program.layer_label(stack, layer)) for stack, layer in program.layers}
        return {name: (site.module, program.layer_label(site.stack, site.layer)) for name, site in found.items()}, labels
    several = any(":" in label for label in labels) or len({str(e["stack"]) for e in smap.per_site if e.get("stack")}) > 1
    sites: dict[str, tuple[str, str | None]] = {}
    for entry in smap.per_site:
        layer = entry["layer"]
        label = None if layer is None else f"{entry.get('stack')}:{layer}" if several else str(layer)
        sites[entry["id"]] = (entry["module"], label)
    return sites, labels | {label for _, label in sites.values() if label is not None}
