"""The record of one probe at one level: every metric with its interval, class and significance."""

from __future__ import annotations

from typing import Any

import numpy as np

from aqnfx.diagnosis.sensitivity_map import level_key
from aqnfx.diagnosis.statistics.estimates import Estimates
from aqnfx.diagnosis.statistics.predicted import predicted_record
from aqnfx.diagnosis.statistics.samples import Intervals, seed_mean
from aqnfx.numerics.metrics import classify_sensitivity, critical_threshold, noise_tolerance_index, sensitivity_score
from aqnfx.numerics.perturbations import perturbation
from aqnfx.numerics.stats import mcnemar, wilson
from aqnfx.probes.measurements import Measurements
from aqnfx.probes.tasks import METRICS

THRESHOLD_COST = 0.10
"""Degradation whose least noise level is reported as the critical threshold."""


def level_records(m: Measurements, est: Estimates, row: int, options: Intervals) -> dict[str, dict[str, Any]]:
    """Return the records of probe ``row`` for every level, keyed by the level's text."""
    return {level_key(level): _record(m, est, row, column, options) for column, level in enumerate(m.levels)}


def threshold(m: Measurements, est: Estimates, row: int) -> float | None:
    """Return the least level at which probe ``row`` costs 10 %, read off the curve through 0 and the measured levels.

    ``None`` where no level reaches it, or a level has no number.
    """
    order = np.argsort(m.levels)
    levels = [0.0, *(float(m.levels[i]) for i in order)]
    curve = [0.0, *(float(est.degradation.value[row, i]) for i in order)]
    if not np.isfinite(curve).all():
        return None
    return critical_threshold((levels, curve), cost=THRESHOLD_COST).level


def _record(m: Measurements, est: Estimates, row: int, column: int, options: Intervals) -> dict[str, Any]:
    at = (row, column)
    level = m.levels[column]
    degradation = float(est.degradation.value[at])
    low, high = float(est.degradation.low[at]), float(est.degradation.high[at])
    size = level * perturbation(m.noise_kind).unit_error
    score = sensitivity_score(degradation, size)
    p_holm = float(est.p_holm[at])
    record: dict[str, Any] = {
        **_per_token(est, at, "zero"),
        "degradation": degradation,
        "degradation_ci": [low, high],
        "score": score,
        "score_ci": [low / size, high / size],
        "class": classify_sensitivity(score),
        "tolerance_index": noise_tolerance_index(degradation),
        **_per_token(est, at, "tokens"),
        "p": float(est.p[at]),
        "p_holm": p_holm,
        "distinguishable": bool(p_holm < 1.0 - options.confidence),
        "seed_std": {"kl": float(est.kl_spread[at]), "degradation": float(est.degradation_spread[at])},
        "n": int(est.samples[at]),
        "seeds": len(m.seeds),
        **_per_token(est, at, "measured"),
    }
    if m.predictions is not None:
        record["predicted"] = predicted_record(m, m.probes[row], level, options)
    if row in est.estimated:
        return record | {"estimated": True, "seeds": 0, "seed_std": {"kl": None, "degradation": None}}
    for name, metric in METRICS.items():
        if metric.answers and name in m.scores and name in m.clean:
            record[metric.reported] = _accuracy(m, name, row, column, options)
    return record


def _per_token(est: Estimates, at: tuple[int, int], clean: str) -> dict[str, Any]:
    """Return the metrics per token, with intervals, whose clean value is of the kind ``clean``."""
    record: dict[str, Any] = {}
    for metric, found in est.per_token.items():
        if metric.clean == clean:
            record[metric.reported] = float(found.value[at])
            record[metric.interval] = [float(found.low[at]), float(found.high[at])]
    return record


def _accuracy(m: Measurements, name: str, row: int, column: int, options: Intervals) -> dict[str, Any]:
    """Describe the accuracy over all seeds and samples, and the McNemar test of the per-sample majority over seeds.

    The Wilson interval counts samples, not sample x seed pairs: seeds of one sample are not independent (solved
    samples, averaged over seeds, are rounded). A tie between seeds counts as the clean outcome.
    """
    rate = seed_mean(m.scores[name])[row, column]
    have = np.isfinite(rate)
    if not have.any():
        return {"value": None, "ci": [None, None], "mcnemar_p": None}
    rate, clean = rate[have], m.clean[name][have] > 0.5
    interval = wilson(round(float(rate.sum())), int(have.sum()), options.confidence)
    noisy = np.where(rate == 0.5, clean, rate > 0.5)
    return {
        "value": float(rate.mean()),
        "ci": [float(interval.low), float(interval.high)],
        "mcnemar_p": float(mcnemar(clean, noisy)),
    }
