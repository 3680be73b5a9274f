"""Critical thresholds: the level that the predicted curve says costs 10 %, and a measurement at that very level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from aqnfx.diagnosis.sensitivity_map import level_key
from aqnfx.diagnosis.statistics.estimates import estimate
from aqnfx.diagnosis.statistics.fit import Fit
from aqnfx.diagnosis.statistics.records import THRESHOLD_COST, level_records
from aqnfx.diagnosis.statistics.samples import Intervals, SampleScores, share
from aqnfx.errors import Interrupted
from aqnfx.probes.measurements import Measurements, Probe

LARGEST_LEVEL = 1.0
"""Beyond it a predicted threshold is not worth a run: relative noise as large as the values themselves."""
CONFIRMED = 3
"""Thresholds of this many operators and layers, those with the lowest ones, are measured."""
CLOSE = 0.1
"""A measured degradation within this share of 10 % needs no second measurement."""
Runner = Callable[[Probe, float], Measurements]


def predicted_threshold(m: Measurements, probe: Probe) -> float | None:
    """Return the level at which the predicted KL reaches what costs 10 %.

    What costs 10 % is read off the probe's own measured curve where that reaches it, else off the curve through all
    measured probes. ``None`` where the curve never reaches 10 %, the probe has no path to the output, or the level
    would be beyond 1.
    """
    if m.predictions is None:
        return None
    scores = SampleScores.of(m)
    total = float(scores.tokens.sum())
    kl, degradation = share(scores.kl, scores.tokens), share(scores.loss, scores.loss_base)
    fit = Fit.through(kl, degradation)
    if probe in m.probes:
        row = m.probes.index(probe)
        own = Fit.through(kl[row], degradation[row])
        fit = own if float(own(own.largest)) >= THRESHOLD_COST else fit
    unit = float(m.predictions.kl(probe.sites, 1.0)[m.places].sum()) / total
    if not np.isfinite(unit) or unit <= 0.0 or float(fit(fit.largest)) < THRESHOLD_COST:
        return None
    grid = np.linspace(0.0, np.sqrt(fit.largest), 4001)
    first = int(np.argmax(fit(grid**2) >= THRESHOLD_COST))
    level = float(grid[first]) / unit**0.5
    return level if 0.0 < level <= LARGEST_LEVEL else None


def confirm(m: Measurements, run: Runner) -> tuple[tuple[Measurements, ...], bool]:
    """Measure the operators and layers with the lowest predicted thresholds at those thresholds.

    Where 10 % was missed by more than a tenth of it, once more at the level that the first measurement points to:
    degradation is taken to grow in proportion to the level, by a factor of two at most. ``run(probe, level)`` measures one
    probe at one level. Returns what was measured last for each, and whether that is all: an interruption ends it.
    """
    found: list[Measurements] = []
    for kind in ("operator", "layer"):
        limits = {p: predicted_threshold(m, p) for p in m.planned if p.kind == kind}
        known = sorted((level, i, p) for i, (p, level) in enumerate(limits.items()) if level is not None)
        for level, _, probe in known[:CONFIRMED]:
            level = _rounded(level)
            try:
                measured = run(probe, level)
                cost = _cost(measured) if measured.complete else THRESHOLD_COST
                if abs(cost - THRESHOLD_COST) > CLOSE * THRESHOLD_COST:
                    again = run(probe, _rounded(level * min(2.0, max(0.5, THRESHOLD_COST / max(cost, 1e-9)))))
                    measured = min((measured, again), key=lambda one: abs(_cost(one) - THRESHOLD_COST))
            except (Interrupted, KeyboardInterrupt):
                return tuple(found), False
            if not measured.complete:
                return tuple(found), False
            found.append(measured)
    return tuple(found), True


def _rounded(level: float) -> float:
    """Return a level that an ulp in the predictions does not change, so that a resumed run knows it again."""
    return float(f"{level:.4g}")


def _cost(single: Measurements) -> float:
    scores = SampleScores.of(single)
    return float(share(scores.loss[0, 0], scores.loss_base))


def confirmation_records(m: Measurements, options: Intervals) -> dict[str, dict[str, Any]]:
    """Return per kind and key the predicted threshold and what was measured there.

    ``holds`` says that the interval of the measured degradation contains 10 %.
    """
    records: dict[str, dict[str, Any]] = {"operators": {}, "layers": {}}
    for single in m.confirmed:
        probe, level = single.probes[0], single.levels[0]
        est = estimate(single, SampleScores.of(single), options)
        record = level_records(single, est, 0, options)[level_key(level)]
        low, high = record["degradation_ci"]
        records[f"{probe.kind}s"][probe.key] = {
            "level": level,
            "predicted_level": predicted_threshold(m, probe),
            "degradation": record["degradation"],
            "degradation_ci": [low, high],
            "kl": record["kl"],
            "holds": bool(low <= THRESHOLD_COST <= high),
        }
    return records
