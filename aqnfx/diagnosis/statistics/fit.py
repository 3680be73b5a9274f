"""Rows for what was predicted and not measured: KL from the predictions, degradation by a fit through what was measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.stats import spearmanr

from aqnfx.diagnosis.sensitivity_map import level_key
from aqnfx.diagnosis.statistics.samples import Array, SampleScores, seed_mean, share
from aqnfx.probes.measurements import Measurements, Probe
from aqnfx.probes.tasks import KL

FAR = 0.25
"""A prediction further than this from its measurement counts as one that second order does not explain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A monotone curve from KL (nats per token) to degradation: isotonic regression through measured points and (0, 0)."""

    kl: Array
    degradation: Array

    @classmethod
    def through(cls, kl: Array, degradation: Array) -> Fit:
        """Fit through points of any shape; those that are not finite are left out."""
        good = np.isfinite(kl) & np.isfinite(degradation)
        order = np.argsort(kl[good], kind="stable")
        x, y = kl[good][order], degradation[good][order]
        if not len(x):
            return cls(kl=np.zeros(1), degradation=np.zeros(1))
        x, first = np.unique(np.maximum(x, 0.0), return_inverse=True)
        weights = np.bincount(first).astype(np.float64)
        means = np.bincount(first, weights=y) / weights
        curve = np.maximum(isotonic_regression(means, weights=weights).x, 0.0)
        return cls(kl=np.concatenate([[0.0], x]), degradation=np.concatenate([[0.0], curve]))

    @property
    def largest(self) -> float:
        """The largest measured KL; beyond it the curve stays where it is."""
        return float(self.kl[-1])

    def __call__(self, kl: Any) -> Array:
        """Return the degradation at ``kl``, interpolated between the measured points on a scale of √KL."""
        # Small perturbations change logits in proportion to √KL, and argmaxes with them.
        found = np.interp(np.sqrt(np.maximum(kl, 0.0)), np.sqrt(self.kl), self.degradation)
        return np.asarray(np.where(np.isfinite(kl), found, np.nan), dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitError:
    """How far a probe's degradation lies from what the others' curve says, in units of √(degradation + 1/N).

    The unit is the standard deviation of a share of N counted events, but for a factor: errors grow with it.
    """

    quantile: float
    count: float

    @classmethod
    def of(cls, kl: Array, degradation: Array, count: float, confidence: float) -> FitError:
        """Leave out each probe in turn and take the ``confidence`` quantile of the errors at it: arrays (P, L).

        The quantile is the conservative one of Vovk et al. 2005 (conformal prediction): the largest error where
        there are too few for the confidence.
        """
        errors: list[float] = []
        for row in range(len(kl)):
            rest = np.arange(len(kl)) != row
            expected = Fit.through(kl[rest], degradation[rest])(kl[row])
            found = np.abs(degradation[row] - expected) / np.sqrt(np.maximum(expected, 0.0) + 1.0 / count)
            errors += [float(error) for error in found if np.isfinite(error)]
        place = min(len(errors), int(np.ceil(confidence * (len(errors) + 1))))
        return cls(quantile=sorted(errors)[place - 1] if errors else float("inf"), count=count)

    def __call__(self, degradation: Array) -> Array:
        """Return half the width of the interval of an estimated ``degradation``."""
        return np.asarray(self.quantile * np.sqrt(np.maximum(degradation, 0.0) + 1.0 / self.count))


def with_estimates(m: Measurements, confidence: float = 0.95) -> tuple[Measurements, dict[int, Array]]:
    """Return ``m`` with a row for every planned probe, and which rows are estimates: row -> (L,), the error of the fit.

    An estimated row has the predicted KL per sample and a loss proportional to it. The error of the fit is half the width
    of an interval that holds ``confidence`` of the measured probes when each is estimated from the others. Without
    predictions ``m`` is returned as it is.
    """
    predictions = m.predictions
    measured = set(m.probes)
    missing = [p for p in m.planned if p not in measured]
    if predictions is None or not missing:
        return m, {}
    scores = SampleScores.of(m)
    tokens, base = scores.tokens, scores.loss_base
    points = share(scores.kl, tokens), share(scores.loss, base)
    fit, error = Fit.through(*points), FitError.of(*points, float(base.sum()), confidence)
    n, shape = m.samples, (len(missing), len(m.levels), len(m.seeds), m.samples)
    extra = {name: np.full(shape, np.nan) for name in m.scores}
    degradation = np.zeros(shape[:2])
    for row, probe in enumerate(missing):
        for column, level in enumerate(m.levels):
            kl = predictions.kl(probe.sites, level)[:n]
            total = float(kl.sum())
            degradation[row, column] = fit(total / tokens.sum()) if total > 0 else 0.0
            extra[KL.name][row, column] = kl
            lost = (degradation[row, column] * base.sum() / total if total > 0 else 0.0) * kl
            extra[scores.metric.name][row, column] = scores.metric.after(base, lost)
    joined = {name: np.concatenate([values, extra[name]]) for name, values in m.scores.items()}
    place = {probe: row for row, probe in enumerate((*m.probes, *missing))}
    wanted = (*m.planned, *(p for p in m.probes if p not in set(m.planned)))
    order = [place[probe] for probe in wanted]
    first = len(m.probes)
    rows = {row: error(degradation[at - first]) for row, at in enumerate(order) if at >= first}
    return dataclasses.replace(m, probes=wanted, scores={k: v[order] for k, v in joined.items()}), rows


def agreement(m: Measurements) -> dict[str, Any]:
    """Return how predictions compare with what was measured, level by level.

    Spearman's rank correlation and the median of predicted / measured over all measured probes with a measurable cost, the
    share within 25 %, and the worst probe. ``second_order_fails`` says that the median over sites, operators or layers is
    off by more than 25 % and by more than twice its probes' median standard error over samples; ``unsettled`` that one is
    off by more than 25 %, but not by more than that.
    """
    if m.predictions is None or not m.probes:
        return {}
    tokens, found = m.tokens.astype(np.float64), {}
    for column, level in enumerate(m.levels):
        scores = seed_mean(m.scores[KL.name])[:, column]
        single = np.array([m.predictions.kl(p.sites, level)[m.places] for p in m.probes])
        single[~np.isfinite(scores)] = np.nan  # of the samples that were measured
        measured, predicted = share(scores, tokens), share(single, tokens)
        good = np.isfinite(predicted) & (measured > 0) & (predicted > 0)
        if good.sum() < 2:
            continue
        ratio = predicted[good] / measured[good]
        kept = [p for p, ok in zip(m.probes, good, strict=True) if ok]
        worst = int(np.argmax(np.abs(np.log(ratio))))
        median = float(np.median(ratio))
        # Sites, operators and layers each: many sites that fit must not hide layers that do not. Windows and all sites
        # together may exceed their prediction: that is their amplification.
        medians = {k: float(np.median([r for p, r in zip(kept, ratio, strict=True) if p.kind == k])) for k in
                   dict.fromkeys(p.kind for p in kept)}  # fmt: skip
        errors = _ratio_errors(single[good], scores[good])
        noise = {k: float(np.median([e for p, e in zip(kept, errors, strict=True) if p.kind == k])) for k in medians}
        off = {k: abs(ratio - 1.0) for k, ratio in medians.items() if k in ("site", "operator", "layer")}
        fails = [k for k, far in off.items() if far > max(FAR, 2.0 * noise[k])]
        found[level_key(level)] = {
            "probes": int(good.sum()),
            "spearman": float(spearmanr(predicted[good], measured[good]).statistic) if good.sum() > 2 else None,
            "median_ratio": median,
            "within_25_percent": float(np.mean(np.abs(ratio - 1.0) <= FAR)),
            "worst": _worst(kept[worst], float(ratio[worst]), float(measured[good][worst])),
            "median_ratio_by_kind": medians,
            "standard_error_by_kind": noise,
            "second_order_fails": bool(fails),
            "unsettled": not fails and any(far > FAR for far in off.values()),
        }
    return found


def _ratio_errors(predicted: Array, measured: Array) -> Array:
    """Return the standard error over samples (P,) of Σ predicted / Σ measured, both (P, n) and paired; infinite for one."""
    have = np.isfinite(predicted) & np.isfinite(measured)
    n = have.sum(axis=-1)
    predicted, measured = np.where(have, predicted, 0.0), np.where(have, measured, 0.0)
    total = measured.sum(axis=-1, keepdims=True)
    residuals = predicted - predicted.sum(axis=-1, keepdims=True) / total * measured
    errors = np.sqrt(n / np.maximum(n - 1, 1) * np.square(residuals).sum(axis=-1)) / total[:, 0]
    return np.asarray(np.where(n > 1, errors, np.inf))


def _worst(probe: Probe, ratio: float, measured: float) -> dict[str, Any]:
    return {"kind": probe.kind, "key": probe.key, "ratio": ratio, "measured_kl": measured}

