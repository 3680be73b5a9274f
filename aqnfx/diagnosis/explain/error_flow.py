"""Where error enters the residual stream, and whether layers amplify or absorb each other's error: from a map alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.graph.program import Program
from aqnfx.graph.structure import Structure

AMPLIFIED, ABSORBED, ADDITIVE = "amplified", "absorbed", "not distinguishable from additive"


def error_flow(smap: SensitivityMap, program: Program, structure: Structure, costs: Mapping[str, float]) -> dict[str, Any]:
    """Return what a map says about error along the residual stream, KL in nats per token at the base level.

    - ``layers``: per layer of the model in order, ``kl`` of all its sites perturbed together and its ``share`` of the sum over
      layers; ``sites_kl``, the sum of the costs of its sites one by one, split in ``branches`` by the addition to the stream
      where their error enters it; ``joint_over_sum`` = kl / sites_kl, above 1 where errors inside of the layer reinforce each
      other, only where kl was measured. None where the map does not have the number.
    - ``windows``: per measured window of layers ``amplification`` (measured together / sum of its layers), its ``ci``, and the
      ``verdict``: ``amplified`` or ``absorbed`` where the interval lies above or below 1.
    """
    by_layer: dict[str, dict[str, float]] = {}
    for site, cost in costs.items():
        found = structure.site(site)
        if found.layer is not None:
            enters = found.merges_at or ("on the stream" if found.residual == "stream" else "outside")
            branches = by_layer.setdefault(found.layer, {})
            branches[enters] = branches.get(enters, 0.0) + cost
    measured = {label: value for label, value in smap.per_layer_kl.items() if value is not None}
    total = math.fsum(measured.values())
    layers = []
    for label in (program.layer_label(stack, index) for stack, index in program.layers):
        assert label is not None  # program.layers holds layers only
        branches = by_layer.get(label, {})
        kl, sites_kl = measured.get(label), math.fsum(branches.values()) if branches else None
        if kl is None and sites_kl is None:
            continue
        measured_here = kl is not None and "estimated" not in smap.at_base("layer", label)
        layers.append({
            "layer": label, "kl": kl, "share": kl / total if kl is not None and total > 0 else None, "sites_kl": sites_kl,
            "branches": [{"enters": name, "kl": value} for name, value in branches.items()],
            "joint_over_sum": kl / sites_kl if kl is not None and measured_here and sites_kl else None,
        })  # fmt: skip
    windows = [
        {
            "layers": window["layers"], "kl": window["measured"], "amplification": window["amplification"],
            "ci": window.get("amplification_ci"), "verdict": _verdict(window),
        }
        for window in smap.windows
        if window["amplification"] is not None
    ]  # fmt: skip
    return {"layers": layers, "windows": windows}


def _verdict(window: Mapping[str, Any]) -> str | None:
    """What the interval of an amplification says; None where the map has no interval."""
    ci = window.get("amplification_ci")
    if not isinstance(ci, list) or len(ci) != 2 or not all(isinstance(bound, (int, float)) for bound in ci):
        return None
    return AMPLIFIED if ci[0] > 1 else ABSORBED if ci[1] < 1 else ADDITIVE
