"""A sensitivity map held against a model: is it of this one, and are its values of the kind that they should be?"""

from __future__ import annotations

import math
from typing import Any

from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.errors import ArtifactError, nearest
from aqnfx.graph.frontend import model_digest
from aqnfx.graph.program import Program
from aqnfx.passes.decompose_attention import DecomposeAttention
from aqnfx.passes.pipeline import Pipeline
from aqnfx.passes.tag_layers import TagLayers
from aqnfx.passes.tag_ops import TagOps

TAGS = Pipeline([TagLayers(), TagOps()])
EXPANDED = Pipeline([TagLayers(), DecomposeAttention(where="ops:softmax"), TagOps()])


def as_probed(program: Program, smap: SensitivityMap) -> Program:
    """Return the tagged Program that holds the sites of the map: a diagnosis expands an attention that it looks into.

    Raises :class:`ArtifactError` where the map is of another model: a site, a layer, the number of parameters or the weights.
    """
    tagged = TAGS(program)
    if not all(entry["id"] in tagged.places for entry in smap.per_site):
        tagged = EXPANDED(program)
    for entry in smap.per_site:
        if entry["id"] not in tagged.places:
            close = nearest(entry["id"], tagged.places)
            raise ArtifactError(f"the sensitivity map is of another model: this one has no site {entry['id']!r}{close}")
    labels = {tagged.layer_label(stack, layer) for stack, layer in tagged.layers}
    for label in (*smap.per_layer, *(str(layer) for window in smap.windows for layer in window["layers"])):
        if label not in labels:
            raise ArtifactError(f"the sensitivity map is of another model: this one has no layer {label!r}")
    _check_same_weights(tagged, smap)
    return tagged


def _check_same_weights(program: Program, smap: SensitivityMap) -> None:
    held, mapped = program.source.get("parameters"), smap.model.get("parameters")
    if held is not None and mapped is not None and held != mapped:
        raise ArtifactError(f"the sensitivity map is of another model: of {mapped} parameters, and this one has {held}")
    # The digest is over the bytes of the weights, so it says something only where both were loaded in one dtype.
    digest = smap.model.get("digest")
    if digest and smap.model.get("dtype") == program.source.get("dtype") and digest != model_digest(program):
        raise ArtifactError("the sensitivity map is of another model: the same sites, and other weights; diagnose this one")


def check_number(value: Any, where: str, *, optional: bool = False) -> None:
    """Raise :class:`ArtifactError` unless ``value`` of a map is a finite number, or None where it is ``optional``."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ArtifactError(f"sensitivity map: {where} must be a number, found {repr(value)[:80]}")


def check_interval(value: Any, where: str) -> tuple[float, float] | None:
    """Return ``[low, high]`` of a map as a pair, None where there is none or an end is unknown.

    Raises :class:`ArtifactError` for any other value.
    """
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise ArtifactError(f"sensitivity map: {where} must be [low, high], found {repr(value)[:80]}")
    for bound in value:
        check_number(bound, where, optional=True)
    return None if None in value else (float(value[0]), float(value[1]))


def map_facts(smap: SensitivityMap) -> dict[str, Any]:
    """Return what an artifact that was made from a map records of it."""
    return {
        "kind": str(smap.noise["kind"]), "base_level": smap.base_level, "metric": smap.task["metric"], "samples": smap.samples,
        "method": smap.method, "partial": smap.partial, "data": smap.provenance.get("data"),
    }  # fmt: skip
