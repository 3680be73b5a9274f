"""Windows of layers: what they cost together, and whether that is more than their layers cost one by one."""

from __future__ import annotations

from typing import Any

import numpy as np

from aqnfx.diagnosis.sensitivity_map import layer_label, level_key
from aqnfx.diagnosis.statistics.estimates import Estimates
from aqnfx.diagnosis.statistics.records import level_records
from aqnfx.diagnosis.statistics.samples import Array, Intervals, SampleScores, holm_columns, paired_p, ratios
from aqnfx.numerics.metrics import classify_window
from aqnfx.probes.measurements import Measurements

PREDICTED_FROM = "sum of single layers"
ONE_PASS = "one-pass prediction"


def window_records(m: Measurements, scores: SampleScores, est: Estimates, options: Intervals) -> list[dict[str, Any]]:
    """Describe every window probe at the base level, with all levels under ``levels``.

    ``measured`` is the KL of the window (nats per token) and ``predicted`` the sum of the KLs of its layers, each
    measured alone: independent small perturbations add up to second order. ``amplification`` = measured / predicted,
    its interval from resampling window and layers jointly; ``superadditive`` says that it lies above 1. An
    ``avalanche`` is a window whose degradation is of that class (> 15 %) and distinguishable from zero; amplification
    is reported beside it and is no condition. Where a layer was not measured, or costs nothing, the prediction and
    the amplification are ``None``.

    With one-pass predictions these stand in for the sum, and an ``avalanche`` is a window whose measured KL exceeds its
    prediction by more than the interval of their ratio and, after Holm over all measured windows, by more than chance.
    A window that was only predicted has no ``measured`` KL and no amplification.
    """
    layer_rows = {probe.key: row for row, probe in enumerate(m.probes) if probe.kind == "layer"}
    rows = [row for row, probe in enumerate(m.probes) if probe.kind == "window"]
    records = [_window(m, scores, est, row, layer_rows, options) for row in rows]
    if m.predictions is not None:
        _find_avalanches(m, scores, est, rows, records, options)
    return records


def _find_avalanches(
    m: Measurements, scores: SampleScores, est: Estimates, rows: list[int], records: list[dict[str, Any]],
    options: Intervals,
) -> None:  # fmt: skip
    """Set ``avalanche`` of every window by its measured KL against its predicted one, sample by sample."""
    assert m.predictions is not None
    column = m.levels.index(m.base_level)
    p = np.full((len(m.probes), 1), np.nan)
    measured = [row for row in rows if row not in est.estimated]
    for row in measured:
        excess = scores.kl[row, column] - m.predictions.kl(m.probes[row].sites, m.base_level)[m.places]
        p[row, 0] = paired_p(excess[None])[0]
    adjusted = holm_columns(p, [measured])[:, 0]
    for row, record in zip(rows, records, strict=True):
        record["excess_p_holm"] = float(adjusted[row])
        record["avalanche"] = bool(record["superadditive"] and adjusted[row] < 1.0 - options.confidence)


def _window(
    m: Measurements, scores: SampleScores, est: Estimates, row: int, layer_rows: dict[str, int], options: Intervals
) -> dict[str, Any]:
    probe = m.probes[row]
    column = m.levels.index(m.base_level)
    levels = level_records(m, est, row, options)
    base = levels[level_key(m.base_level)]
    degradation = float(est.degradation.value[row, column])
    label = classify_window(degradation)
    record: dict[str, Any] = {
        "key": probe.key,
        "layers": [layer_label(layer) for layer in probe.layers],
        "sites": len(probe.sites),
        "measured": base["kl"],
        "ci": base["ci"],
        "degradation": base["degradation"],
        "degradation_ci": base["degradation_ci"],
        "class": label,
        "p_holm": base["p_holm"],
        "distinguishable": base["distinguishable"],
        "avalanche": label == "avalanche" and base["distinguishable"],
        "predicted": None,
        "predicted_from": PREDICTED_FROM,
        "amplification": None,
        "amplification_ci": [None, None],
        "superadditive": False,
        "levels": levels,
    }
    if m.predictions is not None:
        single = m.predictions.kl(probe.sites, m.base_level)[m.places]
        record |= {"predicted": float(single.sum() / m.tokens.sum()), "predicted_from": ONE_PASS}
        if row in est.estimated:
            return record | {"estimated": True, "measured": None}
        return record | _amplification(scores.kl[row, column], single, scores.tokens, options)
    if probe.layers and all(layer in layer_rows for layer in probe.layers):
        singles = scores.kl[[layer_rows[layer] for layer in probe.layers], column].sum(axis=0)
        record |= _amplification(scores.kl[row, column], singles, scores.tokens, options)
    return record


def _amplification(window: Array, singles: Array, tokens: Array, options: Intervals) -> dict[str, Any]:
    """Compare a window's KL with the sum of its layers', per sample (n,) and paired."""
    have = np.isfinite(singles) & np.isfinite(window)
    if not have.any():
        return {}
    window, tokens = window[have], tokens[have]
    singles = np.maximum(singles[have], 0.0)  # rounding leaves a KL of nothing slightly negative
    predicted = float(singles.sum() / tokens.sum())
    if predicted <= 0.0:
        return {"predicted": predicted}
    found = ratios(window[None], singles, options)
    low, high = float(found.low[0]), float(found.high[0])
    return {
        "predicted": predicted,
        "amplification": float(found.value[0]),
        "amplification_ci": [low, high],
        "superadditive": low > 1.0,
    }
