"""Estimates: every probe at every level with its interval, p value and spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aqnfx.diagnosis.statistics.samples import (
    Array,
    Intervals,
    Ratio,
    SampleScores,
    holm_columns,
    paired_p,
    ratios,
    seed_spread,
)
from aqnfx.probes.measurements import Measurements
from aqnfx.probes.tasks import KL, Metric


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """All estimates of a run; every array has shape (P, L).

    The rows of ``estimated`` were predicted and not measured; their degradation is read off a fit, whose error is part of
    the interval.
    """

    per_token: Mapping[Metric, Ratio]
    degradation: Ratio
    p: Array
    p_holm: Array
    kl_spread: Array
    degradation_spread: Array
    samples: NDArray[np.int64]
    estimated: frozenset[int] = frozenset()

    @property
    def kl(self) -> Ratio:
        """KL in nats per token."""
        return self.per_token[KL]


def estimate(
    m: Measurements, scores: SampleScores, options: Intervals, estimated: Mapping[int, Array] | None = None
) -> Estimates:
    """Compute every ratio with its interval, and p values corrected after Holm over the probes of one kind.

    ``estimated``: the rows that were not measured, and the error of their degradation's fit per level.
    """
    estimated = estimated or {}
    kinds = [probe.kind for probe in m.probes]
    groups = [[row for row, kind in enumerate(kinds) if kind == wanted] for wanted in dict.fromkeys(kinds)]
    p = paired_p(scores.loss)
    p[sorted(estimated)] = np.nan  # a prediction is no evidence that a metric has moved
    return Estimates(
        per_token={metric: ratios(values, scores.tokens, options) for metric, values in scores.per_token.items()},
        degradation=_widened(ratios(scores.loss, scores.loss_base, options), estimated),
        p=p,
        p_holm=holm_columns(p, groups),
        kl_spread=seed_spread(scores.seed_kl),
        degradation_spread=seed_spread(scores.seed_degradation),
        samples=np.isfinite(scores.kl).sum(axis=-1),
        estimated=frozenset(estimated),
    )


def _widened(found: Ratio, errors: Mapping[int, Array]) -> Ratio:
    """Return ``found`` with wider intervals in some rows: independent errors add in squares. A share stays within 0 and 1."""
    low, high = found.low.copy(), found.high.copy()
    for row, error in errors.items():
        value = found.value[row]
        low[row] = np.maximum(value - np.hypot(value - low[row], error), np.minimum(value, 0.0))
        high[row] = np.minimum(value + np.hypot(high[row] - value, error), np.maximum(value, 1.0))
    return Ratio(found.value, low, high)
