"""The bootstrap of ratios of sums: resampled ratios by one matrix product, and BCa bounds from them.

For use through :mod:`aqnfx.numerics.stats`, which checks the arguments.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

Floats = NDArray[np.float64]

_BLOCK = 1 << 22  # elements of one block of resampling counts: 32 MiB


def replicate_ratios(values: Floats, weights: Floats, resamples: int, seed: int) -> Floats:
    """Return resampled ratios (R, C) of ``values`` (C, n) over ``weights`` (n,): a product with counts (R, n)."""
    n = weights.size
    rng = np.random.default_rng(seed)
    columns = np.concatenate([values, weights[None, :]]).T
    blocks: list[Floats] = []
    step = max(1, _BLOCK // n)
    for start in range(0, resamples, step):
        draws = rng.integers(n, size=(min(step, resamples - start), n))
        draws += np.arange(len(draws))[:, None] * n
        counts = np.bincount(draws.ravel(), minlength=len(draws) * n).reshape(len(draws), n).astype(np.float64)
        sums = counts @ columns
        sums = sums[sums[:, -1] > 0]
        blocks.append(sums[:, :-1] / sums[:, -1:])
    return np.concatenate(blocks)


def bca_bounds(
    values: Floats, weights: Floats, estimate: Floats, replicates: Floats, confidence: float
) -> tuple[Floats, Floats]:
    """Return BCa bounds (C,), (C,) from the replicates (R, C)."""
    resamples = len(replicates)
    # Ties count half: with discrete scores many replicates equal the estimate. Equal up to rounding counts as equal.
    slack = 1e-12 * np.abs(estimate)
    below = np.mean(replicates < estimate - slack, axis=0)
    equal = np.mean(np.abs(replicates - estimate) <= slack, axis=0)
    z0 = ndtri(np.clip(below + equal / 2, 1 / (resamples + 1), resamples / (resamples + 1)))
    rest = weights.sum() - weights
    usable = rest > 0
    jackknife = (values.sum(axis=-1, keepdims=True) - values)[:, usable] / rest[usable]
    deviation = jackknife.mean(axis=-1, keepdims=True) - jackknife if usable.any() else np.zeros_like(estimate)[:, None]
    largest = np.abs(deviation).max(axis=-1, keepdims=True)
    deviation = deviation / np.where(largest > 0, largest, 1.0)  # the acceleration has no scale; powers would underflow
    spread = (deviation**2).sum(axis=-1)
    acceleration = (deviation**3).sum(axis=-1) / np.where(spread > 0, 6 * spread**1.5, 1.0)
    ordered = np.sort(replicates, axis=0)
    bounds: list[Floats] = []
    for z in (ndtri((1 - confidence) / 2), ndtri((1 + confidence) / 2)):
        shifted = z0 + z
        room = 1 - acceleration * shifted
        # Where the acceleration leaves no room, the correction is undefined: the plain bias-corrected quantile stands.
        level = ndtr(z0 + shifted / np.where(room > 1e-3, room, 1.0))
        bounds.append(_quantiles(ordered, level))
    return np.minimum(*bounds), np.maximum(*bounds)


def _quantiles(ordered: Floats, level: Floats) -> Floats:
    """Return the quantile ``level[c]`` of each sorted column c, linearly interpolated."""
    place = np.clip(level, 0.0, 1.0) * (len(ordered) - 1)
    lower = np.floor(place).astype(np.int64)
    columns = np.arange(ordered.shape[1])
    a, b = ordered[lower, columns], ordered[np.minimum(lower + 1, len(ordered) - 1), columns]
    result: Floats = a + (b - a) * (place - lower)
    return result
