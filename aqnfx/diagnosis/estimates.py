"""From per-sample scores to estimates with intervals: one array entry per probe and level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from aqnfx.errors import InputError
from aqnfx.numerics.stats import bootstrap_ratios, holm
from aqnfx.probes.measurements import Measurements

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
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

    ``kl``, ``nll_delta``, ``agreement``, ``loss`` have shape (P, L, n); ``tokens``, ``loss_base`` (n,). ``loss`` over
    ``loss_base`` is the degradation: lost exact matches over clean ones where ``degradation_metric`` is
    ``"exact_match"``, positions with another argmax over all positions where it is ``"1 - top1"``. ``seed_kl`` and
    ``seed_degradation`` (P, L, K) are the same ratios seed by seed.
    """

    kl: Array
    nll_delta: Array | None
    agreement: Array
    loss: Array
    tokens: Array
    loss_base: Array
    seed_kl: Array
    seed_degradation: Array
    degradation_metric: str

    @classmethod
    def of(cls, m: Measurements) -> SampleScores:
        """Average over seeds; raises :class:`InputError` when there is nothing to average or a metric is missing."""
        check(m)
        tokens = m.tokens.astype(np.float64)
        agreement = _seed_mean(m.scores["top1"])
        exact = uses_exact_match(m)
        base = m.clean["exact_match"].astype(np.float64) if exact else tokens
        lost = base - (m.scores["exact_match"] if exact else m.scores["top1"])
        nll = m.scores.get("nll")
        return cls(
            kl=_seed_mean(m.scores["kl"]),
            nll_delta=None if nll is None or "nll" not in m.clean else _seed_mean(nll) - m.clean["nll"],
            agreement=agreement,
            loss=_seed_mean(lost),
            tokens=tokens,
            loss_base=base,
            seed_kl=m.scores["kl"].sum(axis=-1) / tokens.sum(),
            seed_degradation=lost.sum(axis=-1) / base.sum(),
            degradation_metric="exact_match" if exact else "1 - top1",
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
    if missing := [metric for metric in ("kl", "top1") if metric not in m.scores]:
        raise InputError(f"interpret: the measurements lack {', '.join(missing)}; found {', '.join(sorted(m.scores))}")
    if m.base_level not in m.levels:
        levels = ", ".join(f"{level:g}" for level in m.levels)
        raise InputError(f"interpret: base level {m.base_level:g} is not one of the measured levels {levels}")


def uses_exact_match(m: Measurements) -> bool:
    """Say whether degradation is the relative loss of exact matches; needs a clean model that gets one right."""
    measured = "exact_match" in m.scores and "exact_match" in m.clean
    return m.task == "exact_match" and measured and float(m.clean["exact_match"].sum()) > 0


def ratios(num: Array, den: Array, options: Options) -> Ratio:
    """Return sum(num) / sum(den) over the samples with its bootstrap interval, NaN where undefined.

    ``num`` (..., n), ``den`` (n,); results (...). Rows with values that are not finite give NaN, as does a
    denominator that sums to zero.
    """
    shape = num.shape[:-1]
    bad = np.asarray(~np.isfinite(num).all(axis=-1))
    if not np.isfinite(den).all() or float(den.sum()) == 0.0 or num.size == 0:
        nothing = np.full(shape, np.nan)
        return Ratio(nothing, nothing.copy(), nothing.copy())
    clean = np.where(bad[..., None], 0.0, num)
    found = bootstrap_ratios(clean, den, resamples=options.resamples, confidence=options.confidence, seed=options.seed)
    return Ratio(*(np.where(bad, np.nan, np.asarray(part, dtype=np.float64).reshape(shape)) for part in found))


def paired_p(differences: Array) -> Array:
    """Return the two-sided p of "the mean over samples is zero": a paired t test over the last axis.

    Shape (..., n) to (...). Where all samples agree exactly the t test has no scale, and the p of the sign test on the
    samples that differ from zero stands instead; one sample, or only zeros, gives 1. NaN gives NaN.
    """
    n = differences.shape[-1]
    mean = differences.mean(axis=-1)
    spread = differences.std(axis=-1, ddof=1) if n > 1 else np.zeros_like(mean)
    moved = np.count_nonzero(differences, axis=-1)
    sign_p = np.minimum(1.0, 2.0 * 0.5**moved)
    usable = spread > 1e-12 * np.abs(mean)
    t_value = np.abs(mean) * np.sqrt(n) / np.where(usable, spread, 1.0)
    p = np.where(usable, 2.0 * student_t.sf(t_value, max(n - 1, 1)), sign_p)
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


def _seed_mean(values: Array) -> Array:
    return np.asarray(values.astype(np.float64).mean(axis=2), dtype=np.float64)
