"""The KL of a whole plan: parts alone, and what their errors do to each other, from the columns of the same sketch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from aqnfx.planning.costs import APART, Costs, draw_error

Array = NDArray[np.float64]
Fits = Callable[[tuple[int, ...]], bool]

_USUAL = 0.05  # interactions of a whole plan, as a share of its parts, where nothing says otherwise
_USUAL_JOINT = 0.1  # where inputs or caches are stored too: for errors; what is believed at it would be mostly noise
_CLEAR = 4.0  # standard errors from which an interaction stands out; at 2 plans were predicted worse, see docs/architecture.md
_CANDIDATES = 200  # exchanges that are looked at in a round; those of larger gain come first
_CHANCE = 2.3e-4  # of a gain on held-out draws that is none: 3.5 standard errors; of 200 exchanges, one in twenty rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanKL:
    """KL of a plan in nats per token, and what it is made of.

    ``additive``: the sum of its parts alone; ``second_order``: with what their errors do to each other; ``kl``: with the excess
    over second order, which is c times ``pairs`` (nats²). ``se``: standard error of ``kl`` for other samples of the same kind;
    ``se_here`` for the samples that were scored, which holds the draws and what second order leaves out; ``second_order_se``
    that of ``second_order`` there. All are normal approximations: KL that a few samples make has longer tails.
    """

    kl: float
    se: float
    se_here: float
    additive: float
    second_order: float
    second_order_se: float
    pairs: float


def plan_kl(costs: Costs, rows: Sequence[int]) -> PlanKL:
    """Return the KL of the options ``rows`` together, one per part.

    The parts alone are what the costs say. What their errors do to each other is ½(Σ s)² − ½Σ s² of the sketch, whose noise is
    that of the whole; it is believed by w = τ² / (τ² + its variance), with τ a twentieth of the parts' sum, or the interaction
    itself where it stands out from draws and samples: layers that undo each other do more to each other. To the sum S of both
    comes c·(S² − Σ of the parts' squares), see :data:`~aqnfx.planning.costs.EXCESS`.
    """
    chosen = costs.columns[list(rows)]
    draws, n = chosen.shape[1:]
    whole = chosen.sum(axis=0)
    additive = float(costs.kl[list(rows)].sum())
    per_draw = 0.5 * (np.square(whole) - np.square(chosen).sum(axis=0)) / costs.tokens  # (K, n)
    cross = float(per_draw.mean(axis=0).sum())
    noise = draw_error(whole, costs.tokens)
    # Few draws hardly know their own variance: half of it is what the noise of the whole would make.
    found = float(per_draw.var(axis=0, ddof=1).sum() / draws) if draws > 1 else float(noise) ** 2
    variance = (found + float(noise) ** 2) / 2.0
    # One sample in which everything meets would look like an interaction of the whole; such a one differs from the others.
    spread = max(variance, float(per_draw.mean(axis=0).var(ddof=1)) * n) if n > 1 else math.inf
    prior = max((_USUAL * additive) ** 2, cross**2 - _CLEAR**2 * spread)
    believed = _weight(prior, variance)
    second = max(additive + believed * cross, 0.0)
    alone = float(np.square(costs.kl[list(rows)]).sum())
    # A part has nothing to meet its own error with, so its square is left out.
    pairs = max(second**2 - alone, 0.0)
    more = costs.excess.of(second, pairs)
    bent = 1.0 + 2.0 * more / second if second > 0.0 else 1.0  # by how much errors of S grow
    left = max(prior, (_USUAL_JOINT * additive) ** 2) if costs.joint else prior
    unsure = _weight(left, variance) * variance if len(rows) > 1 else 0.0
    error = float(np.sqrt(np.square(costs.se[list(rows)]).sum() + unsure))
    unknown = min(costs.excess.se * pairs, second) if pairs > 0.0 else 0.0
    # Plans scatter around the excess as they scattered where it was fitted; a part alone has none.
    scatter = APART * second * (pairs / second**2) if second > 0.0 else 0.0
    here = math.hypot(error * bent, unknown, scatter)
    per_sample = 0.5 * np.square(whole).mean(axis=0)
    apart = per_sample - per_sample.sum() / costs.tokens * costs.per_sample
    # Samples differ in what they cost, and by the draws; these are counted once.
    among = np.square(apart).sum() * n / (n - 1) / costs.tokens**2 - float(noise) ** 2 if n > 1 else math.inf
    return PlanKL(
        kl=second + more, se=math.hypot(here, bent * math.sqrt(max(float(among), 0.0))), se_here=here, additive=additive,
        second_order=second, second_order_se=error, pairs=pairs,
    )  # fmt: skip


def _weight(prior: float, variance: float) -> float:
    """Return how far a number with ``variance`` is believed that has the variance ``prior`` itself, around 0."""
    return prior / (prior + variance) if variance > 0.0 else 1.0


def kl_difference_error(costs: Costs, first: Sequence[int], second: Sequence[int]) -> float:
    """Return the standard error of the difference between the KL of two plans, whose draws are the same."""
    squares = [np.square(costs.columns[list(rows)].sum(axis=0)) for rows in (first, second)]
    apart = 0.5 * (squares[0] - squares[1]) / costs.tokens
    draws = apart.shape[0]
    if draws < 2:
        return float("nan")
    plans = [plan_kl(costs, rows) for rows in (first, second)]
    other = list(set(first) ^ set(second))  # what both have costs both alike
    # What the draws do is in the difference of the sketches already.
    left_out = np.maximum(np.square(costs.se[other]) - np.square(costs.noise[other]), 0.0)
    return math.sqrt(
        float(apart.var(axis=0, ddof=1).sum() / draws) + float(left_out.sum())
        + (costs.excess.se * (plans[0].pairs - plans[1].pairs)) ** 2
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined:
    """A plan after local search: option per group, the exchanges that were tried and taken, and what they gain."""

    chosen: tuple[int, ...]
    tried: int
    taken: int
    gain: float


def refine(costs: Costs, options: Sequence[Sequence[Sequence[int]]], chosen: Sequence[int], fits: Fits) -> Refined:
    """Return the plan after every exchange of one or two groups' options that the sketch is sure of.

    ``options``: per group and option the rows of ``costs``; ``fits(chosen)`` says whether a choice keeps the budget. What an
    option that was measured costs by itself is taken as measured: of it the sketch says only what it does to others. An
    exchange is chosen on the even draws and taken where the odd draws, which had no say, agree that it lowers the plan's KL by
    more than 3.5 standard errors. With one draw there is nothing to hold out, and nothing is changed.
    """
    current = list(chosen)
    draws = costs.columns.shape[1]
    groups = [[_Option.of(costs, rows) for rows in group] for group in options]
    tried = taken = 0
    total_gain = 0.0
    if draws < 2:
        return Refined(chosen=tuple(current), tried=0, taken=0, gain=0.0)
    while True:
        search = _Search(groups, current, costs.tokens)
        best = search.best(fits)
        tried += search.tried
        if best is None:
            return Refined(chosen=tuple(current), tried=tried, taken=taken, gain=total_gain)
        moves, gain = best
        for group, option in moves:
            current[group] = option
        taken, total_gain = taken + 1, total_gain + gain


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Option:
    """The sketch of an option (K, n), and of its measured parts the KL and what the sketch takes it for (K, n)."""

    sums: Array
    measured: float
    taken_for: Array

    @classmethod
    def of(cls, costs: Costs, rows: Sequence[int]) -> _Option:
        known = [row for row in rows if costs.measured[row]]
        return cls(
            sums=costs.columns[list(rows)].sum(axis=0), measured=float(costs.kl[known].sum()),
            taken_for=0.5 * np.square(costs.columns[known]).sum(axis=0) / costs.tokens,
        )  # fmt: skip


class _Search:
    """One round of local search around a plan."""

    def __init__(self, groups: Sequence[Sequence[_Option]], current: Sequence[int], tokens: int) -> None:
        self.groups, self.current, self.tokens, self.tried = groups, list(current), tokens, 0
        self.whole = np.asarray(sum(group[option].sums for group, option in zip(groups, current, strict=True)))

    def best(self, fits: Fits) -> tuple[list[tuple[int, int]], float] | None:
        """Return the exchange of largest gain on the even draws that the odd draws confirm, and its gain there."""
        singles = [(g, o) for g, group in enumerate(self.groups) for o in range(len(group)) if o != self.current[g]]
        if not singles:
            return None
        half = slice(0, None, 2)
        even = np.stack([self._change([move], half).reshape(-1) for move in singles])
        base = self.whole[half].reshape(-1)
        scale = 0.5 / (self.tokens * self.whole[half].shape[0])
        linear, gram = 2.0 * even @ base, even @ even.T
        one = scale * (linear + gram.diagonal()) + np.array([self._known([move], half)[0].sum() for move in singles])
        two = one[:, None] + one[None, :] + 2.0 * scale * gram
        candidates: list[tuple[float, tuple[int, ...]]] = [(float(one[i]), (int(i),)) for i in np.flatnonzero(one < 0.0)]
        first, second = np.nonzero(np.triu(two < 0.0, 1))
        candidates += [(float(two[i, j]), (int(i), int(j))) for i, j in zip(first, second, strict=True)]
        for _, picked in sorted(candidates):
            moves = [singles[i] for i in picked]
            if len({g for g, _ in moves}) < len(moves):
                continue
            trial = list(self.current)
            for group, option in moves:
                trial[group] = option
            if not fits(tuple(trial)):
                continue
            self.tried += 1
            gain = self._confirmed(moves)
            if gain is not None:
                return moves, gain
            if self.tried >= _CANDIDATES:
                return None
        return None

    def _pairs(self, moves: Sequence[tuple[int, int]]) -> list[tuple[_Option, _Option]]:
        return [(self.groups[g][o], self.groups[g][self.current[g]]) for g, o in moves]

    def _change(self, moves: Sequence[tuple[int, int]], draws: slice) -> Array:
        """Return what the moves change in the plan's sketch (draws, n)."""
        return np.asarray(sum(new.sums[draws] - old.sums[draws] for new, old in self._pairs(moves)))

    def _known(self, moves: Sequence[tuple[int, int]], draws: slice) -> tuple[Array, Array]:
        """Return by how much what was measured is more than what the sketch takes it for: in the mean (n,), per draw (…, n)."""
        pairs = self._pairs(moves)
        n = self.whole.shape[1]
        measured = sum(new.measured - old.measured for new, old in pairs)
        per_draw = measured / n - np.asarray(sum(new.taken_for[draws] - old.taken_for[draws] for new, old in pairs))
        return per_draw.mean(axis=0), per_draw

    def _confirmed(self, moves: Sequence[tuple[int, int]]) -> float | None:
        odd = slice(1, None, 2)
        base, change = self.whole[odd], self._change(moves, odd)
        lower = -0.5 * (2.0 * base * change + change * change) / self.tokens - self._known(moves, odd)[1]  # (K/2, n)
        per_draw = lower.sum(axis=1)
        gain = float(per_draw.mean())
        # Draws of a sample share its values; draws are independent.
        draws, n = lower.shape
        error = float(lower.std(ddof=1) * np.sqrt(n / draws))
        clear = float(student_t.isf(_CHANCE, max((n - 1) * draws / 2.0, 1.0)))  # few samples know little of their spread
        return gain if gain > clear * error else None
