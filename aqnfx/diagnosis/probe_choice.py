"""Which probes to measure when all of them have been predicted: the top ones, a random sample, and critical windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from aqnfx.probes.measurements import Probe, ProbeKind
from aqnfx.probes.predict import Predictions

Counts = Mapping[ProbeKind, tuple[int, int]]
"""How many probes of a kind are measured: those with the highest predicted cost, and a random sample of the others."""
CHECKS: Counts = {"operator": (4, 0), "layer": (4, 2), "window": (2, 1), "site": (5, 5)}
SPOT_CHECKS: Counts = {"operator": (2, 0), "layer": (2, 1), "site": (2, 2)}
UNREACHED = 2
CRITICAL_SHARE = 2.0
"""A layer whose predicted cost is this many times the median layer's is a neighbour that makes a window worth measuring."""


def choose_probes(
    probes: Sequence[Probe], predictions: Predictions, level: float, counts: Counts, *, seed: int = 0
) -> tuple[Probe, ...]:
    """Return the probes to measure, in the order of ``probes``.

    Of every kind those with the highest predicted KL at ``level`` and a random sample of the others; every window that
    holds or touches a layer whose predicted cost is at least twice the median layer's, where ``counts`` names windows;
    all sites at once. Two probes of each kind without a path to the output are measured as well: that the cost is nothing
    is then seen, not assumed.
    """
    cost = {probe: float(np.nan_to_num(predictions.kl(probe.sites, level).sum(), nan=-1.0)) for probe in probes}
    rng = np.random.default_rng(seed)
    chosen: set[Probe] = {probe for probe in probes if probe.kind == "all"}
    for kind, (top, others) in counts.items():
        ranked = sorted((p for p in probes if p.kind == kind), key=lambda p: -cost[p])
        chosen |= {*ranked[:top], *(ranked[top + i] for i in rng.permutation(max(0, len(ranked) - top))[:others])}
        chosen |= set([p for p in ranked if cost[p] < 0][:UNREACHED])
    if "window" in counts:
        chosen |= _critical_windows(probes, cost)
    return tuple(probe for probe in probes if probe in chosen)


def _critical_windows(probes: Sequence[Probe], cost: dict[Probe, float]) -> set[Probe]:
    """Return the windows with a critical layer inside or next to them."""
    layers = [probe for probe in probes if probe.kind == "layer"]
    finite = [cost[p] for p in layers if cost[p] >= 0]
    if not finite:
        return set()
    limit = CRITICAL_SHARE * float(np.median(finite))
    critical = {p.layers[0] for p in layers if cost[p] >= limit > 0}
    names = [p.layers[0] for p in layers]
    touched = {n for i, n in enumerate(names) if critical & set(names[max(0, i - 1) : i + 2])}
    return {p for p in probes if p.kind == "window" and touched & set(p.layers)}
