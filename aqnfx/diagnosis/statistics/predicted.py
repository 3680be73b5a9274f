"""Predictions as records: KL with intervals for probes and sites, channels, and what a reader has to know of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import norm

from aqnfx.diagnosis.sensitivity_map import level_key
from aqnfx.diagnosis.statistics.fit import agreement
from aqnfx.diagnosis.statistics.samples import Intervals, ratios
from aqnfx.probes.capture import Captures
from aqnfx.probes.measurements import Measurements, Probe

TOP_CHANNELS = 10


def predicted_record(m: Measurements, probe: Probe, level: float, options: Intervals) -> dict[str, Any]:
    """Return the predicted KL of a probe in nats per token with its bootstrap interval over samples."""
    assert m.predictions is not None
    kl = m.predictions.kl(probe.sites, level)[m.places]
    found = ratios(kl[None], m.tokens.astype(np.float64), options)
    return {"kl": float(found.value[0]), "ci": [float(found.low[0]), float(found.high[0])]}


def site_predictions(m: Measurements, sites: Sequence[str], options: Intervals) -> dict[str, dict[str, Any]]:
    """Return site -> level -> predicted KL with interval, or what stands in the way of one; empty without predictions."""
    predictions = m.predictions
    if predictions is None:
        return {site: {} for site in sites}
    unit = np.stack([predictions.kl([site], 1.0)[m.places] for site in sites])
    found = ratios(unit, m.tokens.astype(np.float64), options)
    records: dict[str, dict[str, Any]] = {}
    for row, site in enumerate(sites):
        records[site] = {
            level_key(level): {
                "kl": level**2 * float(found.value[row]),
                "ci": [level**2 * float(found.low[row]), level**2 * float(found.high[row])],
            }
            for level in m.levels
        }
        if site in predictions.unreached:
            nothing = {"kl": None, "ci": [None, None], "why": "no differentiable path to the output"}
            records[site] = {level_key(level): nothing for level in m.levels}
    return records


def channel_records(m: Measurements, options: Intervals, threshold: float = 10.0) -> dict[str, Any]:
    """Return per site the sensitive channels, the outlier channels, and how far they are the same.

    ``top``: [channel, KL, low, high] by predicted KL at the base level in nats per token, with normal intervals from the
    standard error over samples. ``outliers``: channels whose mean magnitude is at least ``threshold`` times the median
    channel's; ``max_ratio`` the largest such ratio. ``overlap``: the share of the outliers (at most as many as ``top``)
    that are among the ``top`` as well, None without outliers.
    """
    if m.predictions is None:
        return {}
    z = float(norm.isf((1.0 - options.confidence) / 2.0))
    records = {}
    for site in m.predictions.channels:
        kl, error = m.predictions.channel_kl(site, m.base_level)
        top = [int(c) for c in np.argsort(-kl, kind="stable")[:TOP_CHANNELS]]
        total = float(kl.sum())
        records[site] = {
            "channels": len(kl),
            "top": [[c, float(kl[c]), max(0.0, float(kl[c] - z * error[c])), float(kl[c] + z * error[c])] for c in top],
            "top_share": float(kl[top].sum()) / total if total > 0 else None,
        }
        if m.captures is not None and site in m.captures.records:
            records[site] |= _outliers(m.captures, site, top, threshold)
    return records


def _outliers(captures: Captures, site: str, top: list[int], threshold: float) -> dict[str, Any]:
    outliers = captures.outliers(site, threshold)
    first = [entry["channel"] for entry in outliers[: len(top)]]
    magnitude = captures.channel_magnitude(site)
    median = float(np.median(magnitude))
    return {
        "outliers": outliers[:TOP_CHANNELS],
        "outlier_count": len(outliers),
        "max_ratio": float(magnitude.max()) / median if median > 0 else None,
        "overlap": len(set(first) & set(top)) / len(first) if first else None,
    }


def activation_statistics(m: Measurements, site: str) -> dict[str, Any]:
    """Return mean magnitude, sparsity, dynamic range and signal-to-noise ratio of a site, empty where not captured."""
    if m.captures is None or site not in m.captures.records:
        return {}
    return {**m.captures.statistics(site), "perturbation": m.captures.perturbation}


def _medians(found: dict[str, Any]) -> str:
    return ", ".join(f"{ratio:.2f} over {kind}s" for kind, ratio in found["median_ratio_by_kind"].items() if kind != "all")


def prediction_notes(m: Measurements) -> list[str]:
    """Say where the predictions do not hold, or cannot be made."""
    if m.predictions is None:
        return []
    notes = list(m.predictions.notes)
    if gone := m.predictions.unreached:
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        notes.append(f"{gone[0]}{more} have no differentiable path to the output: nothing is predicted there.")
    for level, found in agreement(m).items():
        if found["second_order_fails"]:
            notes.append(
                f"At level {level} the median of predicted / measured KL is {_medians(found)}: second order does not hold "
                "there, because the perturbation is too large, changes what the model chooses, or (in half precision) is as "
                "small as the rounding elsewhere; read the measured values."
            )
        elif found["unsettled"]:
            notes.append(
                f"At level {level} the median of predicted / measured KL is {_medians(found)}, which these samples cannot "
                "tell from 1: raise --samples or --draws before relying on predictions."
            )
    estimates = set(m.planned) - set(m.probes)
    if estimates:
        kinds = {p.kind: f"{p.kind}s" for p in m.planned if p.kind != "all"}
        notes.append(
            f"{len(estimates)} of {len(m.planned)} probes ({', '.join(kinds.values())}) were predicted and not measured; their "
            "degradation is read off a monotone curve through the measured ones and marked as an estimate."
        )
    return notes
