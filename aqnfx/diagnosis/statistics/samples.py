"""Per-sample scores, and what their sums say: ratios with intervals, p values, one array entry per probe and level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from aqnfx.errors import InputError
from aqnfx.numerics.stats import bootstrap_ratios, holm
from aqnfx.probes.measurements import Measurements
from aqnfx.probes.tasks import KL, METRICS, Metric, degradation_of

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervals:
    """How intervals are made: confidence, number of bootstrap resamples, and the seed of the resampling."""

    confidence: float = 0.95
    resamples: int = 2000
    seed: int = 0


class Ratio(NamedTuple):
    """A ratio of sums over samples with its interval, each an array of one shape; NaN where it is undefined."""

    value: Array
    low: Array
    high: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleScores:
    """Per-sample scores, averaged over the seeds: the numerators and denominators of every reported ratio.

    ``per_token`` has an entry (P, L, n) for every metric that is divided by tokens: what it is, or how far it moved from
    the clean run where that was measured. ``loss`` (P, L, n) over ``loss_base`` (n,) is the degradation: what is lost of
    ``metric`` over what the clean run has. ``tokens`` (n,). ``seed_kl`` and ``seed_degradation`` (P, L, K) are the same
    ratios seed by seed.
    """

    per_token: Mapping[Metric, Array]
    loss: Array
    tokens: Array
    loss_base: Array
    seed_kl: Array
    seed_degradation: Array
    metric: Metric

    @property
    def kl(self) -> Array:
        """KL in nats, summed over the positions of every sample (P, L, n)."""
        return self.per_token[KL]

    @classmethod
    def of(cls, m: Measurements) -> SampleScores:
        """Average over seeds; raises :class:`InputError` when there is nothing to average or a metric is missing."""
        check(m)
        tokens = m.tokens.astype(np.float64)
        clean = {name: values for name, values in m.clean.items() if name in m.scores}
        metric = degradation_of(m.task, clean)
        base = metric.of_clean(clean, tokens)
        lost = metric.lost(base, m.scores[metric.name])
        return cls(
            per_token={
                one: seed_mean(m.scores[name]) - (clean[name] if one.clean == "measured" else 0.0)
                for name, one in METRICS.items()
                if not one.answers and name in (clean if one.clean == "measured" else m.scores)
            },
            loss=seed_mean(lost),
            tokens=tokens,
            loss_base=base,
            seed_kl=share(m.scores[KL.name], tokens),
            seed_degradation=share(lost, base),
            metric=metric,
        )


def check(m: Measurements) -> None:
    """Raise :class:`InputError` unless the measurements hold samples, positions, probes, seeds and the base level."""
    if m.samples == 0:
        done = "the run was interrupted before the first sample was finished" if not m.complete else "the data is empty"
        raise InputError(f"interpret: 0 of {m.samples_requested} samples were measured: {done}; let it run longer")
    if int(m.tokens.sum()) <= 0:
        raise InputError(f"interpret: {m.samples} samples have no scored position; give longer texts")
    if not m.probes or not m.seeds or not m.levels:
        raise InputError(
            f"interpret: {len(m.probes)} probes x {len(m.levels)} levels x {len(m.seeds)} seeds leave nothing to report"
        )
    if missing := [name for name, one in METRICS.items() if one.clean != "measured" and name not in m.scores]:
        raise InputError(f"interpret: the measurements lack {', '.join(missing)}; found {', '.join(sorted(m.scores))}")
    if m.base_level not in m.levels:
        levels = ", ".join(f"{level:g}" for level in m.levels)
        raise InputError(f"interpret: base level {m.base_level:g} is not one of the measured levels {levels}")


def share(num: Array, den: Array) -> Array:
    """Return sum(num) / sum(den) over the samples that a row has: (..., n) and (n,) to (...), NaN for none.

    NaN marks a sample that a row does not have; with an infinite value the row's result is NaN.
    """
    num = np.where(np.isinf(num).any(axis=-1, keepdims=True), np.nan, num)
    have = np.isfinite(num)
    total = np.where(have, den, 0.0).sum(axis=-1)
    sums = np.where(have, num, 0.0).sum(axis=-1)
    return np.asarray(np.where(total > 0, sums / np.where(total > 0, total, 1.0), np.nan), dtype=np.float64)


def ratios(num: Array, den: Array, options: Intervals) -> Ratio:
    """Return sum(num) / sum(den) over the samples with its bootstrap interval, NaN where undefined.

    ``num`` (..., n), ``den`` (n,); results (...). Every row is over the samples that it has, NaN marking those that it
    does not have; a row without any or with an infinite value, and a denominator that sums to zero, give NaN.
    """
    num = np.where(np.isinf(num).any(axis=-1, keepdims=True), np.nan, num)
    shape = num.shape[:-1]
    found = Ratio(*(np.full(shape, np.nan).reshape(-1) for _ in range(3)))
    if not np.isfinite(den).all() or num.size == 0:
        return Ratio(*(part.reshape(shape) for part in found))
    flat = num.reshape(-1, num.shape[-1])
    patterns, row_pattern = np.unique(np.isfinite(flat), axis=0, return_inverse=True)
    for number, have in enumerate(patterns):
        rows = np.flatnonzero(row_pattern.reshape(-1) == number)
        if not have.any() or float(den[have].sum()) == 0.0:
            continue
        parts = bootstrap_ratios(
            flat[rows][:, have], den[have], resamples=options.resamples, confidence=options.confidence, seed=options.seed
        )
        for whole, part in zip(found, parts, strict=True):
            whole[rows] = part
    return Ratio(*(part.reshape(shape) for part in found))


def paired_p(differences: Array) -> Array:
    """Return the two-sided p of "the mean over samples is zero": a paired t test over the last axis.

    Shape (..., n) to (...). Where all samples agree exactly the t test has no scale, and the p of the sign test on the
    samples that differ from zero stands instead; one sample, or only zeros, gives 1. A row is over the samples that it has a
    number for; without any it gives NaN.
    """
    have = np.isfinite(differences)
    n = have.sum(axis=-1)
    known = np.where(have, differences, 0.0)
    mean = np.where(n > 0, known.sum(axis=-1) / np.maximum(n, 1), np.nan)
    squares = np.where(have, np.square(known - np.nan_to_num(mean)[..., None]), 0.0).sum(axis=-1)
    spread = np.sqrt(squares / np.maximum(n - 1, 1))
    moved = np.count_nonzero(known, axis=-1)
    sign_p = np.minimum(1.0, 2.0 * 0.5**moved)
    usable = spread > 1e-12 * np.abs(mean)
    t_value = np.abs(mean) * np.sqrt(n) / np.where(usable, spread, 1.0)
    p = np.where(usable, 2.0 * student_t.sf(t_value, np.maximum(n - 1, 1)), sign_p)
    return np.asarray(np.where(np.isfinite(mean), p, np.nan), dtype=np.float64)


def holm_columns(p: Array, groups: list[list[int]]) -> Array:
    """Adjust p (P, L) after Holm within every group of rows, level by level; NaN stays NaN and is not counted."""
    adjusted = np.full_like(p, np.nan)
    for rows in groups:
        for level in range(p.shape[1]):
            known = [row for row in rows if np.isfinite(p[row, level])]
            if known:
                adjusted[known, level] = holm(p[known, level])
    return adjusted


def seed_spread(values: Array) -> Array:
    """Return the standard deviation over the last axis (seeds), NaN where there is only one."""
    if values.shape[-1] < 2:
        return np.full(values.shape[:-1], np.nan)
    return np.asarray(values.std(axis=-1, ddof=1), dtype=np.float64)


def seed_mean(values: Array) -> Array:
    """Return the mean over the seeds that a sample has, NaN for none."""
    have = ~np.isnan(values)
    n = have.sum(axis=2)
    sums = np.where(have, values, 0.0).astype(np.float64).sum(axis=2)
    return np.asarray(np.where(n > 0, sums / np.maximum(n, 1), np.nan), dtype=np.float64)
