"""Who is more sensitive than whom: rankings at the base level that say where the order is not certain."""

from __future__ import annotations

from typing import Any

import numpy as np

from aqnfx.diagnosis.statistics.estimates import Estimates
from aqnfx.diagnosis.statistics.samples import Array, Intervals, Ratio, SampleScores, holm_columns, paired_p, ratios
from aqnfx.probes.measurements import Measurements

CRITICAL_SCORE_FLOOR = 1.5
"""A critical entry's score interval must lie above this: at its low end it is at least moderate, never robust."""


def is_critical(record: dict[str, Any]) -> bool:
    """Say whether a level record is critical beyond the noise of the measurement.

    Three conditions: the score's class is critical (score > 3), the low end of the score's interval lies above 1.5,
    and the degradation is distinguishable from zero after Holm.
    """
    low = record["score_ci"][0]
    return bool(
        record["class"] == "critical" and low is not None and low > CRITICAL_SCORE_FLOOR and record["distinguishable"]
    )


def rank(
    m: Measurements, scores: SampleScores, est: Estimates, rows: list[int], records: list[dict[str, Any]],
    options: Intervals,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rank probes by degradation at the base level, KL breaking ties, most sensitive first.

    ``rows`` are the probes' rows, ``records`` their level records at the base level, in the same order. An entry is
    ``tied_with_next`` (``tied_with_first``) when the interval of the paired difference of degradations contains zero,
    or the paired t test does not reject equality after Holm over all such comparisons of this ranking: among thirty
    equal layers one plain interval would miss zero by chance. The KL difference is given beside it, because it
    separates neighbours that agree in every argmax.
    """
    if not rows:
        return []
    column = m.levels.index(m.base_level)
    order = sorted(
        range(len(rows)),
        key=lambda i: (_down(est.degradation.value[rows[i], column]), _down(est.kl.value[rows[i], column])),
    )
    ranked = [rows[i] for i in order]
    loss, kl = scores.loss[ranked, column], scores.kl[ranked, column]
    next_loss, tied_next = _compare(loss[:-1] - loss[1:], scores.loss_base, options)
    next_kl, tied_kl = _compare(kl[:-1] - kl[1:], scores.tokens, options)
    _, tied_first = _compare(loss[:1] - loss[1:], scores.loss_base, options)
    # A test between a measurement and a number that was read off a curve would be a test of the curve.
    guess = [bool(records[i].get("estimated", False)) for i in order]
    tied_next = [tie or guess[k] or guess[k + 1] for k, tie in enumerate(tied_next)]
    tied_kl = [tie or guess[k] or guess[k + 1] for k, tie in enumerate(tied_kl)]
    tied_first = [tie or guess[0] or guess[k + 1] for k, tie in enumerate(tied_first)]
    entries = []
    for place, i in enumerate(order):
        record = records[i]
        entry = {
            "rank": place + 1,
            "key": m.probes[rows[i]].key,
            **{name: record[name] for name in ("degradation", "degradation_ci", "kl", "score", "score_ci", "class")},
            "kl_ci": record["ci"],
            "distinguishable": record["distinguishable"],
            "critical": is_critical(record),
            "estimated": bool(record.get("estimated", False)),
            "tied_with_first": place > 0 and tied_first[place - 1],
            "tied_with_next": place + 1 < len(order) and tied_next[place],
        }
        if place + 1 < len(order):
            entry["difference_to_next"] = {
                "degradation": _interval(next_loss, place),
                "kl": _interval(next_kl, place),
                "kl_tied": tied_kl[place],
            }
        entries.append(entry)
    return entries


def _down(value: Array | float) -> float:
    """Sort key for descending order with undefined values last."""
    number = float(value)
    return -number if np.isfinite(number) else np.inf


def _compare(differences: Array, den: Array, options: Intervals) -> tuple[Ratio, list[bool]]:
    """Return the interval of each paired difference (m, n) and whether it is a tie; undefined ones are ties."""
    found = ratios(differences, den, options)
    p = holm_columns(paired_p(differences)[:, None], [list(range(len(differences)))])[:, 0]
    apart = ((found.low > 0.0) | (found.high < 0.0)) & (p < 1.0 - options.confidence)
    return found, [not bool(value) for value in apart]


def _interval(ratio: Ratio, place: int) -> dict[str, Any]:
    return {"value": float(ratio.value[place]), "ci": [float(ratio.low[place]), float(ratio.high[place])]}
