"""Adaptive sampling: which probes still need samples for what is going to be said of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from aqnfx.numerics.metrics import CRITICAL_SCORE, MODERATE_SCORE
from aqnfx.probes.tasks import METRICS, degradation_of
from aqnfx.probes.work import Item, Scores, Sweep, clean_item

Array = NDArray[np.float64]


HOPELESS = 2.0
"""A claim is given up when even all samples leave an interval of this many times the distance that it is about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppingRule:
    """When a probe has enough samples: its class is settled, and its place among its neighbours is.

    Each claim is looked at a few times (:meth:`looks`) with an interval of level 1 - (1 - ``confidence``) / looks, so
    that over all looks it is wrong with probability 1 - ``confidence`` at most (Bonferroni over the looks). A class
    is settled when the interval of the score lies within one class; two neighbours in the ranking of a kind are
    settled when the interval of their paired difference excludes 0, or lies within ``tie`` in units of the score:
    then they are equal for every purpose here. Nothing is settled before ``least`` samples. From the share
    ``patience`` of the samples on, a claim that all of them would not settle either is given up: it is reported as it
    is, not distinguishable, and costs nothing more.
    """

    confidence: float = 0.95
    tie: float = 0.15
    least: int = 20
    patience: float = 0.5

    def looks(self, total: int) -> tuple[int, ...]:
        """Return the numbers of finished batches, out of ``total``, at which claims are looked at: about a third more each.

        Every look makes every interval wider, and a batch more tells little that the last look did not know.
        """
        found = [max(1, round(total * share)) for share in (0.2, 0.27, 0.36, 0.48, 0.64, 0.85)]
        return tuple(dict.fromkeys(batches for batches in found if batches < total))

    def unsettled(
        self, sweep: Sweep, done: Mapping[Item, Scores], batches: int, *, total: int
    ) -> frozenset[int]:
        """Return the numbers of the probes that need more, from what the first ``batches`` of ``total`` batches gave.

        All of them where this is no time to look.
        """
        everything = frozenset(range(len(sweep.probes)))
        if batches not in self.looks(total) or any(clean_item(b) not in done for b in range(batches)):
            return everything
        base, losses = _losses(sweep, done, batches)
        if len(base) < self.least:
            return everything
        alpha = (1.0 - self.confidence) / len(self.looks(total))
        left, shrink = set[int](), math.sqrt(batches / total)
        for kind in dict.fromkeys(p.kind for p in sweep.probes):
            rows = [row for row, p in enumerate(sweep.probes) if p.kind == kind]
            left |= {row for row in rows if not self._class_settled(losses[row], base, sweep.base_level, alpha, shrink)}
            value = {row: _ratio(losses[row], base)[0] for row in rows}
            order = sorted(rows, key=lambda row: -value[row])
            for first, second in itertools.pairwise(order):
                if not self._order_settled(losses[first] - losses[second], base, sweep.base_level, alpha, shrink):
                    left |= {first, second}
        return frozenset(left)

    def _class_settled(self, loss: Array, base: Array, level: float, alpha: float, shrink: float) -> bool:
        low, high = (bound / level for bound in _interval(loss, base, alpha))
        edges = (MODERATE_SCORE, CRITICAL_SCORE)
        if np.searchsorted(edges, low) == np.searchsorted(edges, high):
            return True
        nearest = min(abs((low + high) / 2.0 - edge) for edge in edges)
        return self._hopeless(nearest, (high - low) / 2.0 * shrink, shrink)

    def _order_settled(self, difference: Array, base: Array, level: float, alpha: float, shrink: float) -> bool:
        low, high = (bound / level for bound in _interval(difference, base, alpha))
        if low > 0.0 or high < 0.0 or max(-low, high) <= self.tie:
            return True
        final = (high - low) / 2.0 * shrink
        return final > self.tie and self._hopeless(abs(low + high) / 2.0, final, shrink)

    def _hopeless(self, distance: float, final: float, shrink: float) -> bool:
        """Return whether an interval of the half width that all samples will give is wide beyond what is to be told.

        Not before enough samples are there to say so (``shrink`` is the root of their share).
        """
        return shrink**2 >= self.patience and final > HOPELESS * distance


def _losses(sweep: Sweep, done: Mapping[Item, Scores], batches: int) -> tuple[Array, Array]:
    """Return the weights (n,) and the losses (P, n) at the base level, seeds averaged; NaN where a probe has no sample.

    As in the map: what is lost of the metric that degradation is read from.
    """
    clean = [done[clean_item(b)] for b in range(batches)]
    joined = {name: np.concatenate([c[name] for c in clean]) for name in METRICS if all(name in c for c in clean)}
    metric = degradation_of(sweep.task, joined)
    base = metric.of_clean(joined, np.concatenate([c["tokens"] for c in clean]))
    level = sweep.levels.index(sweep.base_level)
    losses = np.full((len(sweep.probes), len(base)), np.nan)
    first = 0
    for b, found in enumerate(clean):
        size = len(found["tokens"])
        for row in range(len(sweep.probes)):
            runs = [done[item] for k in range(len(sweep.seeds)) if (item := (b, row, level, k)) in done]
            if runs:
                scores = np.mean([run[metric.name] for run in runs], axis=0)
                losses[row, first : first + size] = metric.lost(base[first : first + size], scores)
        first += size
    return base, losses


def _ratio(loss: Array, base: Array) -> tuple[float, float, int]:
    """Return Σ loss / Σ base, its standard error by linearisation, and the number of samples."""
    have = np.isfinite(loss)
    n, total = int(have.sum()), float(base[have].sum())
    if n < 2 or total <= 0:
        return 0.0, float("inf"), n
    ratio = float(loss[have].sum()) / total
    residuals = loss[have] - ratio * base[have]
    return ratio, float(np.sqrt(n / (n - 1) * np.square(residuals).sum()) / total), n


def _interval(loss: Array, base: Array, alpha: float) -> tuple[float, float]:
    ratio, error, n = _ratio(loss, base)
    if error == 0.0:
        # Samples that all agree say that the effect is rarer than one in n: the rule of three, at this level.
        error_bound = -np.log(alpha / 2.0) / n
        return ratio - error_bound, ratio + error_bound
    half = float(student_t.isf(alpha / 2.0, max(n - 1, 1))) * error
    return ratio - half, ratio + half
