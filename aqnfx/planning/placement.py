"""Where the planned parts stand in the model, by the static analyser: what they compute, and why they may be sensitive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aqnfx.diagnosis.explain.map_of_model import as_probed
from aqnfx.diagnosis.explain.reasons import NONE_FOUND, Evidence, reasons
from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.graph.program import Program
from aqnfx.graph.structure import structure
from aqnfx.planning.problem import Problem

PLACES = {"read": "reads the stream", "write": "writes to the stream", "inside": "inside a branch"}
"""What a place in the residual stream is called in a report; others by their own name."""


def placements(program: Program, problem: Problem, smap: SensitivityMap | None = None) -> dict[str, dict[str, Any]]:
    """Return, per planned module, its place in the structure of ``program``, and the structural reasons that there are.

    ``layer``, ``region``, ``residual``, ``merges_at``, ``single_path``, ``bound`` and ``depth`` are those of
    :class:`~aqnfx.graph.structure.SiteStructure`; ``flops_share`` is the module's share of the model's FLOPs, both at the sizes
    that the model was traced with. ``reasons`` are texts: of the graph alone, and with ``smap`` those that its statistics
    support. Raises :class:`~aqnfx.errors.ArtifactError` for a map of another model.
    """
    found = structure(program)
    seen = program if smap is None else as_probed(program, smap)  # a diagnosis may have looked into an attention
    evidence = Evidence.of(smap, seen, found if seen is program else structure(seen))
    made = {}
    for part in problem.parts:
        sites = [site for _, site in part.sites]
        outputs = list(dict.fromkeys(found.site(site).id for site in sites))
        records = [found.site(site) for site in outputs]
        first = records[0]
        made[part.module] = {
            "layer": first.layer, "region": first.region, "residual": first.residual, "merges_at": first.merges_at,
            "single_path": any(record.single_path for record in records), "bound": first.bound, "depth": first.depth,
            "flops_share": sum(record.flops for record in records) / found.flops if found.flops else 0.0,
            "reasons": _reasons([site for site in (*outputs, *sites) if site in seen.places], evidence),
        }  # fmt: skip
    return made


def _reasons(sites: Sequence[str], evidence: Evidence) -> list[str]:
    """Return what is known of an operation and its operands, each text once."""
    said = [reason for site in sites for reason in reasons(site, evidence)]
    return list(dict.fromkeys(reason["text"] for reason in said if reason != NONE_FOUND))


def where(place: dict[str, Any]) -> str:
    """Return a place in words: "layer 3, mlp, writes to the stream"."""
    parts = [f"layer {place['layer']}" if place["layer"] is not None else "no layer", place["region"]]
    if place["residual"] in PLACES:
        parts.append(PLACES[place["residual"]])
    if place["single_path"]:
        parts.append("every path crosses it")
    return ", ".join(parts)
