"""From measurements to findings: the one step between a measuring run and a sensitivity map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from aqnfx.artifacts import jsonable
from aqnfx.diagnosis.sensitivity_map import SensitivityMap, layer_label, level_key
from aqnfx.diagnosis.statistics.estimates import Estimates, estimate
from aqnfx.diagnosis.statistics.fit import agreement, with_estimates
from aqnfx.diagnosis.statistics.predicted import (
    activation_statistics,
    channel_records,
    prediction_notes,
    site_predictions,
)
from aqnfx.diagnosis.statistics.ranking import is_critical, rank
from aqnfx.diagnosis.statistics.records import THRESHOLD_COST, level_records, threshold
from aqnfx.diagnosis.statistics.samples import Intervals, SampleScores, ratios
from aqnfx.diagnosis.statistics.sqnr import sqnr_record
from aqnfx.diagnosis.statistics.thresholds import confirmation_records
from aqnfx.diagnosis.statistics.windows import window_records
from aqnfx.errors import InputError
from aqnfx.numerics.perturbations import perturbation
from aqnfx.numerics.stats import wilson
from aqnfx.probes.measurements import Measurements, ProbeKind
from aqnfx.probes.tasks import EXACT_MATCH, NLL, TASKS
from aqnfx.probes.traces import SOURCES


def interpret(
    measurements: Measurements, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0,
    outlier_threshold: float = 10.0,
) -> SensitivityMap:
    """Turn the scores of a measuring run into a sensitivity map.

    Scores are averaged over the noise seeds sample by sample; intervals come from a BCa bootstrap over samples.
    The noise of two samples is independent, so these intervals carry the noise as well as the choice of samples.
    Degradation is (clean - noisy) / clean exact matches for the task ``exact_match``, otherwise 1 - top-1 agreement;
    ``distinguishable`` means that a paired t test over samples rejects "no degradation" after Holm over all probes of
    the same kind at the same level. ``seed`` is that of the resampling. Raises :class:`InputError` for measurements
    without samples, positions, probes or the base level, and for a confidence outside (0, 1). ``outlier_threshold``: see
    :func:`~aqnfx.diagnosis.statistics.predicted.channel_records`.
    """
    if not 0.0 < confidence < 1.0 or resamples < 100:
        raise InputError(
            f"interpret: confidence {confidence:g} must lie in (0, 1) and resamples {resamples} be 100 or more"
        )
    m, estimated = with_estimates(measurements, confidence)
    options = Intervals(confidence=confidence, resamples=resamples, seed=seed)
    scores = SampleScores.of(m)
    est = estimate(m, scores, options, estimated)
    operators, layers = _table(m, est, "operator", options), _table(m, est, "layer", options)
    windows = window_records(m, scores, est, options)
    base = level_key(m.base_level)
    rankings = {}
    for name, kind, table in (("operators", "operator", operators), ("layers", "layer", layers)):
        rows = [row for row, probe in enumerate(m.probes) if probe.kind == kind]
        records = [table[m.probes[row].key]["levels"][base] for row in rows]
        rankings[name] = rank(m, scores, est, rows, records, options)
    sites = _sites(m, est, options)
    record: dict[str, Any] = {
        "model": _model(m),
        "task": _task(m, scores),
        "noise": {
            "kind": m.noise_kind, "levels": sorted(m.levels), "base_level": m.base_level, "seeds": list(m.seeds),
            "unit_error": perturbation(m.noise_kind).unit_error,
        },
        "partial": not m.complete,
        "baseline": _baseline(m, options),
        "statistics": {
            "confidence": confidence, "resamples": resamples, "interval": "BCa bootstrap over samples",
            "test": "paired t over samples", "correction": "Holm over probes of one kind at one level",
        },
        "per_site": sites,
        "per_operator": _flat(operators, base, "degradation"), "per_operator_kl": _flat(operators, base, "kl"),
        "per_layer": _flat(layers, base, "degradation"), "per_layer_kl": _flat(layers, base, "kl"),
        "per_operator_detail": operators, "per_layer_detail": layers,
        "all_sites": next(iter(_table(m, est, "all", options).values()), {}),
        "windows": windows,
        "ranking": rankings,
        "critical_ops": [e["key"] for e in rankings["operators"] if e["critical"]],
        "critical_layers": [layer_label(key) for key, entry in layers.items() if is_critical(entry["levels"][base])],
        "avalanche_points": [window["layers"] for window in windows if window["avalanche"]],
        "critical_threshold": {
            "cost": THRESHOLD_COST, "max_level": max(m.levels),
            "operators": {key: entry["threshold"] for key, entry in operators.items()},
            "layers": {key: entry["threshold"] for key, entry in layers.items()},
            "confirmed": confirmation_records(m, options),
        },
        "method": "measure" if m.predictions is None else "predict and measure",
        "agreement": agreement(measurements),
        "weights": _weights(m),
        "sqnr": sqnr_record(m, sites),
        "channels": channel_records(m, options, outlier_threshold),
        "notes": _notes(m, scores, est) + prediction_notes(measurements),
        "provenance": dict(m.provenance),
    }  # fmt: skip
    return SensitivityMap(**jsonable(record))


def _table(m: Measurements, est: Estimates, kind: ProbeKind, options: Intervals) -> dict[str, dict[str, Any]]:
    """Return one entry per probe of a kind, in the order of the run: sites, layers, threshold, records per level."""
    return {
        probe.key: {
            "sites": len(probe.sites),
            "layers": [layer_label(layer) for layer in probe.layers],
            "estimated": row in est.estimated,
            "threshold": threshold(m, est, row),
            "levels": level_records(m, est, row, options),
        }
        for row, probe in enumerate(m.probes)
        if probe.kind == kind
    }


def _flat(table: dict[str, dict[str, Any]], base: str, name: str) -> dict[str, float | None]:
    return {key: entry["levels"][base][name] for key, entry in table.items()}


def _sites(m: Measurements, est: Estimates, options: Intervals) -> list[dict[str, Any]]:
    """Return a record per site, those that were not probed one by one with ``measured`` empty."""
    rows = {probe.key: row for row, probe in enumerate(m.probes) if probe.kind == "site"}
    kept = ("id", "module", "op", "role", "layer", "stack", "region")
    sites = m.sites if m.predictions is None else m.predictions.sites
    predicted = site_predictions(m, [site.id for site in sites], options)
    records = []
    for site in sites:
        full = site.to_record()
        row = rows.get(site.id)
        measured = {} if row is None or row in est.estimated else level_records(m, est, row, options)
        records.append({name: full[name] for name in kept} | {"predicted": predicted[site.id], "measured": measured})
        if row in est.estimated:
            records[-1]["estimated"] = level_records(m, est, row, options)
        if activations := activation_statistics(m, site.id):
            records[-1]["activations"] = activations
    return records


def _model(m: Measurements) -> dict[str, Any]:
    model = m.provenance.get("model") or {}
    return dict(model) if isinstance(model, Mapping) else {"name": str(model)}


def _task(m: Measurements, scores: SampleScores) -> dict[str, Any]:
    return {
        "metric": m.task, "samples": m.samples, "samples_requested": m.samples_requested,
        "tokens": int(m.tokens.sum()), "degradation": scores.metric.degradation,
    }  # fmt: skip


def _baseline(m: Measurements, options: Intervals) -> dict[str, Any]:
    """Describe the clean model: nats per token with interval, perplexity, and accuracy where the data has answers."""
    baseline: dict[str, Any] = {NLL.baseline: None, EXACT_MATCH.baseline: None}
    if NLL.name in m.clean:
        nll = ratios(m.clean[NLL.name][None].astype(np.float64), m.tokens.astype(np.float64), options)
        value = float(nll.value[0])
        baseline |= {
            NLL.baseline: value, f"{NLL.baseline}_ci": [float(nll.low[0]), float(nll.high[0])],
            "perplexity": float(np.exp(value)) if value < 700.0 else None,
        }  # fmt: skip
    if EXACT_MATCH.name in m.clean:
        found = wilson(round(float(m.clean[EXACT_MATCH.name].sum())), m.samples, options.confidence)
        baseline |= {
            EXACT_MATCH.baseline: float(m.clean[EXACT_MATCH.name].mean()),
            f"{EXACT_MATCH.baseline}_ci": [float(found.low), float(found.high)],
        }
    return baseline


def _weights(m: Measurements) -> dict[str, Any]:
    """Return the classical metric of every weight, largest first; empty where none was asked for."""
    if m.weight_metric is None:
        return {}
    ranked = sorted(m.weights, key=lambda trace: -trace.value if np.isfinite(trace.value) else np.inf)
    return {
        "metric": m.weight_metric, "source": SOURCES[m.weight_metric],
        "values": {trace.name: trace.to_record() for trace in ranked},
    }  # fmt: skip


def _notes(m: Measurements, scores: SampleScores, est: Estimates) -> list[str]:
    """Say in words what a reader of the numbers has to know, first what the run itself noted."""
    notes = [str(note) for note in m.provenance.get("notes", ())]
    if not m.complete:
        notes.append(
            f"Partial run: {m.samples} of {m.samples_requested} samples were finished; every number rests on those."
        )
    if "settled_probes" in m.provenance:
        least, most = int(est.samples.min()), int(est.samples.max())
        settled, runs, wanted = (m.provenance[k] for k in ("settled_probes", "all_runs", "wanted_runs"))
        late = "; the time was over before the rest was" if m.provenance["out_of_time"] else ""
        notes.append(
            f"Samples went where they were needed: {least} to {most} per probe, {settled} of {len(m.probes)} probes settled"
            f"{late} ({runs} runs; all of them on every sample would have been {wanted})."
        )
    if m.errors:
        notes.append(f"{len(m.errors)} runs failed and are missing; the first: {m.errors[0]}.")
    if TASKS[m.task].answers and not scores.metric.answers:
        notes.append("The clean model solves no sample: degradation is 1 - top-1 agreement instead of lost accuracy.")
    if m.samples < 20:
        notes.append(f"Only {m.samples} samples: bootstrap intervals are too narrow below about 20.")
    if not np.isfinite(est.kl.value).all():
        broken = sorted({m.probes[row].key for row in np.argwhere(~np.isfinite(est.kl.value))[:, 0]})
        notes.append(f"Scores that are not finite left {', '.join(broken)} without numbers at one level or more.")
    return notes
