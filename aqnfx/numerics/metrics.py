"""Named metrics of sensitivity and their default thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from aqnfx.errors import InputError

Sensitivity = Literal["critical", "moderate", "robust", "undefined"]
WindowClass = Literal["avalanche", "high", "moderate", "robust", "undefined"]
Reached = Literal["between", "at low", "never"]
Curve = Callable[[float], float] | tuple[Sequence[float], Sequence[float]]


def relative_degradation(clean: float, noisy: float) -> float:
    """Return (clean − noisy)/clean, the share of an accuracy-like score that is lost (negative for a gain).

    nan where ``clean`` is 0. Raises InputError where either is not finite.
    """
    if not (math.isfinite(clean) and math.isfinite(noisy)):
        raise InputError(f"relative degradation: scores must be finite, found clean={clean}, noisy={noisy}")
    return (clean - noisy) / clean if clean != 0 else math.nan


def noise_tolerance_index(degradation: float) -> float:
    """Return 1/degradation: high is tolerant, infinite where nothing was lost, nan where the degradation is nan."""
    if math.isnan(degradation):
        return math.nan
    return 1.0 / degradation if degradation > 0 else math.inf


def sensitivity_score(degradation: float, level: float) -> float:
    """Return degradation/level: how many times its own relative size the noise costs.

    Raises InputError where ``level`` is not a positive finite number.
    """
    if not (math.isfinite(level) and level > 0):
        raise InputError(f"sensitivity score: the noise level must be positive and finite, found {level}")
    return degradation / level


CRITICAL_SCORE, MODERATE_SCORE = 3.0, 1.5
"""Where the classes of sensitivity scores begin."""


def classify_sensitivity(
    score: float, *, critical: float = CRITICAL_SCORE, moderate: float = MODERATE_SCORE
) -> Sensitivity:
    """Return "critical" for score > 3, "moderate" for 1.5 to 3, "robust" below, "undefined" for nan."""
    _descending(critical=critical, moderate=moderate)
    if math.isnan(score):
        return "undefined"
    return "critical" if score > critical else "moderate" if score >= moderate else "robust"


def classify_window(
    degradation: float, *, avalanche: float = 0.15, high: float = 0.10, moderate: float = 0.05
) -> WindowClass:
    """Return "avalanche" for degradation > 0.15, "high" from 0.10, "moderate" from 0.05, "robust" below.

    "undefined" for nan; thresholds are fractions, not percent.
    """
    _descending(avalanche=avalanche, high=high, moderate=moderate)
    if math.isnan(degradation):
        return "undefined"
    if degradation > avalanche:
        return "avalanche"
    return "high" if degradation >= high else "moderate" if degradation >= moderate else "robust"


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticalThreshold:
    """The least noise level that costs ``cost``, as far as it was looked for.

    ``level``: None where never reached up to ``high``; where ``reached`` is "at low" it is ``low``, an upper bound of
    the true level. ``bracket``: the largest level found below ``cost`` and the least found at or above it (None unless
    ``reached`` is "between"). ``evaluations``: (level, degradation) in rising level. ``monotone``: no evaluated
    degradation fell with rising level; where False, other crossings may exist. ``converged``: the bracket is as narrow
    as asked.
    """

    level: float | None
    cost: float
    low: float
    high: float
    reached: Reached
    bracket: tuple[float, float] | None
    evaluations: tuple[tuple[float, float], ...]
    monotone: bool
    converged: bool

    def describe(self) -> str:
        """Return the result as one sentence."""
        if self.level is None:
            text = f"not reached up to {self.high:g}"
        elif self.reached == "at low":
            text = f"<= {self.low:g} (already reached at the lowest level)"
        elif self.bracket is not None and not self.converged:
            text = f"{self.level:.4g} (between {self.bracket[0]:.4g} and {self.bracket[1]:.4g})"
        else:
            text = f"{self.level:.4g}"
        return text if self.monotone else text + "; the curve is not monotone, other crossings may exist"


def critical_threshold(
    curve: Curve,
    *,
    cost: float = 0.10,
    low: float | None = None,
    high: float | None = None,
    tolerance: float = 0.05,
    max_evaluations: int = 12,
) -> CriticalThreshold:
    """Return the least noise level whose degradation reaches ``cost``.

    ``curve`` as a function is called at levels in [``low``, ``high``] (defaults 0.001 and 1.0) and bisected, on a
    logarithmic scale where low > 0, until the bracket is at most ``tolerance`` of its upper end wide or
    ``max_evaluations`` calls were made; the level returned is the upper end, one that was measured to cost that much.
    Where ``high`` does not reach the cost the middle is tried too, so that one wide hump is not missed. ``curve`` as
    (levels, degradations), levels rising, is made monotone (running maximum) and interpolated linearly; ``low`` and
    ``high`` then choose points. Raises InputError for options out of range, levels that do not rise, or a
    degradation that is not finite.
    """
    if not (math.isfinite(cost) and cost > 0):
        raise InputError(f"critical threshold: cost must be positive, a fraction such as 0.10, found {cost}")
    if not callable(curve):
        return _from_points(curve, cost, low, high)
    bottom, top = 0.001 if low is None else low, 1.0 if high is None else high
    if not 0 <= bottom < top < math.inf:
        raise InputError(f"critical threshold: needs 0 <= low < high, found low={bottom}, high={top}")
    if not tolerance > 0 or max_evaluations < 2:
        raise InputError(
            f"critical threshold: needs tolerance > 0 and max_evaluations >= 2, found {tolerance} and {max_evaluations}"
        )
    return _bisect(curve, cost, bottom, top, tolerance, max_evaluations)


def _bisect(
    curve: Callable[[float], float], cost: float, low: float, high: float, tolerance: float, budget: int
) -> CriticalThreshold:
    points: dict[float, float] = {}

    def reaches(level: float) -> bool:
        points[level] = _finite(curve(level), level)
        return points[level] >= cost

    def middle(a: float, b: float) -> float:
        return math.sqrt(a * b) if a > 0 else (a + b) / 2

    if reaches(low):
        return _result(None, points, cost, low, high, "at low")
    below, above = low, high
    if not reaches(high):
        above = middle(low, high)
        if budget < 3 or not reaches(above):
            return _result(None, points, cost, low, high, "never")
    while len(points) < budget and above - below > tolerance * above:
        level = middle(below, above)
        if not below < level < above:
            break
        if reaches(level):
            above = level
        else:
            below = level
    return _result((below, above), points, cost, low, high, "between", above - below <= tolerance * above)


def _from_points(
    curve: tuple[Sequence[float], Sequence[float]], cost: float, low: float | None, high: float | None
) -> CriticalThreshold:
    levels, degradations = curve
    if len(levels) != len(degradations):
        raise InputError(f"critical threshold: {len(levels)} levels but {len(degradations)} degradations")
    if any(not a < b for a, b in pairwise(levels)):
        raise InputError(f"critical threshold: levels must rise, found {list(levels)}")
    points = {
        float(level): _finite(value, level)
        for level, value in zip(levels, degradations, strict=True)
        if (low is None or level >= low) and (high is None or level <= high)
    }
    if not points:
        raise InputError(f"critical threshold: no levels to read from; found {list(levels)}, low={low}, high={high}")
    first, last = min(points), max(points)
    previous: tuple[float, float] | None = None
    for level, value in points.items():
        if value >= cost and previous is None:
            return _result(None, points, cost, first, last, "at low")
        if value >= cost and previous is not None:
            # Up to here no value reached the cost, so the running maximum is that of the earlier points.
            start, reached = previous
            crossing = start + (level - start) * (cost - reached) / (value - reached)
            return _result((start, level), points, cost, first, last, "between", True, crossing)
        previous = (level, value if previous is None else max(value, previous[1]))
    return _result(None, points, cost, first, last, "never")


def _result(
    bracket: tuple[float, float] | None,
    points: dict[float, float],
    cost: float,
    low: float,
    high: float,
    reached: Reached,
    converged: bool = True,
    level: float | None = None,
) -> CriticalThreshold:
    evaluations = tuple(sorted(points.items()))
    values = [value for _, value in evaluations]
    if level is None:
        level = bracket[1] if bracket is not None else low if reached == "at low" else None
    return CriticalThreshold(
        level=level, cost=cost, low=low, high=high, reached=reached, bracket=bracket, evaluations=evaluations,
        monotone=all(a <= b for a, b in pairwise(values)), converged=converged,
    )  # fmt: skip


def _finite(value: float, level: float) -> float:
    if not math.isfinite(value):
        raise InputError(
            f"critical threshold: the degradation at level {level:g} is {value}; a clean score of 0 has no degradation"
        )
    return float(value)


def _descending(**thresholds: float) -> None:
    values = list(thresholds.values())
    if any(not a >= b for a, b in pairwise(values)):
        raise InputError(f"thresholds must not rise from first to last, found {thresholds}")
