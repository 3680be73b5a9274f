"""Error bars: bootstrap intervals over samples, exact tests for accuracies, and correction for many claims.

The resampling unit is always the *sample* (one row of the data), never the token: tokens of one text are not
independent. Configurations that were measured on the same samples are resampled with the same indices, so that
differences between them are paired.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from aqnfx.errors import InputError
from aqnfx.numerics.bootstrap import bca_bounds, replicate_ratios

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate from ``n`` samples with its two-sided interval; bounds are nan where they are undefined."""

    estimate: float
    low: float
    high: float
    n: int
    confidence: float
    method: str

    def contains(self, x: float) -> bool:
        """Return whether ``x`` lies in the closed interval (False where the bounds are nan)."""
        return self.low <= x <= self.high

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside: the estimate is distinguishable from zero (False where the bounds are nan)."""
        return self.low > 0.0 or self.high < 0.0

    def to_record(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dictionary, non-finite numbers as None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def bootstrap_ratios(
    num: ArrayLike, den: ArrayLike, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[Floats, Floats, Floats]:
    """Return ``(estimate, low, high)`` of Σnum/Σden for many configurations, bootstrapped over samples.

    ``num`` (..., n) float: per-sample sums of each configuration; ``den`` (n,) float >= 0: per-sample weights, e.g.
    scored tokens, which makes the ratio a token-weighted mean. Each result has the leading shape of ``num``, float64.
    All configurations share one set of resamples (common random numbers). Intervals are bias-corrected and accelerated
    (BCa): Efron, *Better bootstrap confidence intervals*, JASA 1987, with the jackknife estimate of the acceleration;
    Davison & Hinkley 1997, section 5.3. With n == 1, or Σden == 0, the bounds are nan. Resamples whose Σden is 0 are
    left out. An interval cannot be wider than the data: samples that all agree give one of zero width.

    To ignore a sample, give it weight 0 and value 0. Raises InputError for no samples, shapes that do not match, values
    that are not finite, negative weights, or options out of range.
    """
    values, weights = _checked(num, den)
    _check_options(resamples, confidence)
    shape = values.shape[:-1]
    flat = values.reshape(-1, weights.size)
    total = float(weights.sum())
    estimate = flat.sum(axis=-1) / total if total > 0 else np.full(flat.shape[0], math.nan)
    low, high = np.full_like(estimate, math.nan), np.full_like(estimate, math.nan)
    if weights.size > 1 and total > 0:
        replicates = replicate_ratios(flat, weights, resamples, seed)
        if len(replicates):
            low, high = bca_bounds(flat, weights, estimate, replicates, confidence)
    return estimate.reshape(shape), low.reshape(shape), high.reshape(shape)


def bootstrap_ratio(
    num: ArrayLike, den: ArrayLike, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Return the interval of one ratio of sums Σnum/Σden, both (n,): see :func:`bootstrap_ratios`."""
    values = _vector(num, "num")
    estimate, low, high = bootstrap_ratios(values, den, resamples=resamples, confidence=confidence, seed=seed)
    return Interval(
        estimate=float(estimate), low=float(low), high=float(high), n=values.size, confidence=confidence,
        method="bootstrap-bca",
    )  # fmt: skip


def paired_difference(
    a_num: ArrayLike,
    b_num: ArrayLike,
    den: ArrayLike,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the interval of Σa_num/Σden − Σb_num/Σden: two configurations on the same samples, all (n,).

    The ratios share their denominator and their resamples, so this is the bootstrap of Σ(a−b)/Σden. Raises InputError
    as :func:`bootstrap_ratios` does.
    """
    a, b = _vector(a_num, "a_num"), _vector(b_num, "b_num")
    _same_length(a, b, "a_num", "b_num")
    return bootstrap_ratio(a - b, den, resamples=resamples, confidence=confidence, seed=seed)


def paired_accuracy_drop(
    clean: ArrayLike, noisy: ArrayLike, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Return the interval of the relative degradation (Σclean − Σnoisy)/Σclean, resampling pairs.

    ``clean`` and ``noisy`` (n,) float >= 0: the score of each sample, 0/1 or a count, ``noisy`` fractional where it is
    averaged over seeds. The estimate is nan where Σclean is 0. Raises InputError as :func:`bootstrap_ratios` does.
    """
    c, d = _vector(clean, "clean"), _vector(noisy, "noisy")
    _same_length(c, d, "clean", "noisy")
    return bootstrap_ratio(c - d, c, resamples=resamples, confidence=confidence, seed=seed)


def bootstrap_pvalue(num: ArrayLike, den: ArrayLike, *, resamples: int = 2000, seed: int = 0) -> float:
    """Return the two-sided bootstrap p-value of "the ratio Σnum/Σden is zero", ``num`` and ``den`` (n,).

    The resampled ratios are shifted to the null; p = (1 + #{|θ* − θ| >= |θ|}) / (1 + resamples), so it is never 0
    (Davison & Hinkley 1997, sections 4.2 and 4.4). It is at least 2^(1−n), the least that flipping the signs of n
    samples can show: few samples that happen to agree are no strong evidence, and one sample is none. Raises InputError
    as :func:`bootstrap_ratios` does.
    """
    values, weights = _checked(_vector(num, "num"), den)
    _check_options(resamples, 0.95)
    total = float(weights.sum())
    if weights.size == 1 or total == 0:
        return 1.0
    theta = float(values.sum()) / total
    replicates = replicate_ratios(values[None, :], weights, resamples, seed)[:, 0]
    found = (1 + int(np.count_nonzero(np.abs(replicates - theta) >= abs(theta)))) / (1 + len(replicates))
    return max(found, 2.0 ** (1 - int(np.count_nonzero(weights))))


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Return the Wilson score interval of a proportion, ``successes`` of ``n`` (Wilson, JASA 1927; from scipy).

    Raises InputError for n < 1, successes outside 0..n, or a confidence outside (0, 1).
    """
    _check_options(1, confidence)
    if n < 1 or not 0 <= successes <= n:
        raise InputError(f"wilson: needs 0 <= successes <= n and n >= 1, found {successes} of {n}")
    bounds = binomtest(int(successes), int(n)).proportion_ci(confidence_level=confidence, method="wilson")
    return Interval(
        estimate=successes / n, low=float(bounds.low), high=float(bounds.high), n=int(n), confidence=confidence,
        method="wilson",
    )  # fmt: skip


def mcnemar(clean: ArrayLike, noisy: ArrayLike) -> float:
    """Return the exact two-sided p-value of "both runs are equally accurate", from 0/1 outcomes of the same samples.

    ``clean`` and ``noisy`` (n,): 0 or 1. Only samples on which the runs disagree count; their split is binomial(½)
    under the null (McNemar, Psychometrika 1947, exact form). Raises InputError for other values or lengths.
    """
    c, d = _vector(clean, "clean"), _vector(noisy, "noisy")
    _same_length(c, d, "clean", "noisy")
    if not (np.isin(c, (0.0, 1.0)).all() and np.isin(d, (0.0, 1.0)).all()):
        raise InputError("mcnemar: outcomes must be 0 or 1; for scores averaged over seeds use paired_accuracy_drop")
    lost, won = int(np.count_nonzero(c > d)), int(np.count_nonzero(c < d))
    return float(binomtest(lost, lost + won, 0.5).pvalue) if lost + won else 1.0


def holm(pvalues: ArrayLike) -> Floats:
    """Return p-values adjusted for testing all of them, shape (m,), in the order given.

    Controls the probability of any false claim under every dependence: adjusted_(i) = max over j <= i of
    (m − j + 1) p_(j), at most 1 (Holm, Scandinavian Journal of Statistics 1979). Raises InputError outside [0, 1].
    """
    p = np.asarray(pvalues, dtype=np.float64)
    if p.ndim != 1 or not bool(((p >= 0) & (p <= 1)).all()):
        raise InputError("holm: p-values must be one sequence of numbers from 0 to 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)), 1.0)
    return adjusted


def _vector(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise InputError(f"{name}: one number per sample was expected, found an array of shape {array.shape}")
    return array


def _same_length(a: Floats, b: Floats, a_name: str, b_name: str) -> None:
    if a.size != b.size:
        raise InputError(f"{a_name} has {a.size} samples and {b_name} {b.size}: both must score the same samples")


def _checked(num: ArrayLike, den: ArrayLike) -> tuple[Floats, Floats]:
    values, weights = np.asarray(num, dtype=np.float64), _vector(den, "den")
    if values.ndim < 1 or values.shape[-1] != weights.size:
        raise InputError(f"num has shape {values.shape}, and its last dimension must be the {weights.size} of den")
    if weights.size == 0:
        raise InputError("bootstrap: no samples; at least one is needed, two for an interval")
    if not (np.isfinite(values).all() and np.isfinite(weights).all()):
        raise InputError("bootstrap: values must be finite; to ignore a sample give it value 0 and weight 0")
    if (weights < 0).any():
        raise InputError("bootstrap: weights (den) must not be negative")
    return values, weights


def _check_options(resamples: int, confidence: float) -> None:
    if resamples < 1:
        raise InputError(f"resamples must be at least 1, found {resamples}; 2000 is usual")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, found {confidence}; 0.95 is usual")
