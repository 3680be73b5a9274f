"""The exact choice under a budget: a multiple-choice knapsack, solved by HiGHS (Huangfu and Hall 2018)."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from aqnfx.errors import InputError

Array = NDArray[np.float64]

# HiGHS stops 1e-6 short of the optimum whatever is asked, so the objective is scaled far above that.
_SCALE = 1e6
_LARGEST = 1 << 52  # whole numbers that doubles hold
_GRAINS = 10**9  # steps of a budget whose weights have no common denominator


@dataclass(frozen=True, kw_only=True, eq=False)
class Limit:
    """One budget: what every option of every group weighs, and how much there is, in the same unit.

    ``unit`` is what messages divide both by. Weights and budget are taken as the decimal numbers that they print as, so that a
    budget that can be used up exactly can be used up exactly.
    """

    name: str
    weights: tuple[Array, ...]
    budget: float
    unit: float = 1.0

    def used(self, chosen: Sequence[int]) -> float:
        """Return what a choice weighs, in the unit of messages."""
        return float(sum(w[option] for w, option in zip(self.weights, chosen, strict=True))) / self.unit

    def keeps(self, chosen: Sequence[int]) -> bool:
        """Return whether a choice is within the budget."""
        whole, room = self.whole
        return sum(int(w[option]) for w, option in zip(whole, chosen, strict=True)) <= room

    @functools.cached_property
    def whole(self) -> tuple[tuple[NDArray[np.int64], ...], int]:
        """Weights and budget as whole numbers: exact where they have a common denominator, else weights rounded up."""
        exact = [[Fraction(repr(float(x))) for x in w] for w in self.weights]
        budget = Fraction(repr(float(self.budget)))
        step = math.lcm(*(x.denominator for w in exact for x in w))
        if step * max(max(w) for w in exact) >= _LARGEST:
            grain = max(budget, Fraction(1, 10**18)) / _GRAINS
            exact, budget, step = [[Fraction(math.ceil(x / grain)) for x in w] for w in exact], Fraction(_GRAINS), 1
        return tuple(np.array([int(x * step) for x in w], dtype=np.int64) for w in exact), math.floor(budget * step)


def solve(values: Sequence[Array], limits: Sequence[Limit]) -> tuple[int, ...]:
    """Return one option per group with the least sum of ``values`` that keeps within all ``limits``.

    ``values``: per group fp64 (options,), finite and not negative. Raises :class:`InputError` where nothing is feasible, naming
    the limit and the least that is.
    """
    tables = [limit.whole for limit in limits]
    for limit, (whole, room) in zip(limits, tables, strict=True):
        if sum(int(w.min()) for w in whole) > room:
            least = sum(float(w.min()) for w in limit.weights) / limit.unit
            what = "or add larger formats" if limit.name == "max_kl" else "add smaller formats, or keep fewer modules as they are"
            raise InputError(
                f"{limit.name} {limit.budget / limit.unit:.10g} cannot be kept: the least feasible is {least:.10g}; raise it, "
                f"{what}"
            )
    sizes = [len(v) for v in values]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    flat = np.concatenate([np.asarray(v, dtype=np.float64) - np.min(v) for v in values])
    top = float(flat.max()) or 1.0
    rows = np.repeat(np.arange(len(sizes)), sizes)
    once = csr_array((np.ones(len(flat)), (rows, np.arange(len(flat)))), shape=(len(sizes), len(flat)))
    slack = [0] * len(limits)
    while True:
        constraints = [LinearConstraint(once, 1.0, 1.0)]
        for (whole, room), less in zip(tables, slack, strict=True):
            over = [w - w.min() for w in whole]
            left = room - sum(int(w.min()) for w in whole) - less
            shared = math.gcd(*(int(x) for w in over for x in w)) or 1
            # Half a step beyond what is left: no choice lies there, and the solver's tolerance cuts off none that fits.
            constraints.append(LinearConstraint(np.concatenate(over)[None, :] // shared, -np.inf, left // shared + 0.5))
        with _silent():
            found = milp(
                flat / top * _SCALE, constraints=constraints, integrality=np.ones(len(flat)), bounds=Bounds(0.0, 1.0),
                options={"mip_rel_gap": 0.0},
            )  # fmt: skip
        if found.x is None:
            named = ", ".join(f"{limit.name} {limit.budget / limit.unit:.10g}" for limit in limits)
            raise InputError(f"no choice keeps all of {named} together; raise one")
        chosen = tuple(int(np.argmax(found.x[a:b])) for a, b in itertools.pairwise(starts))
        excess = [
            sum(int(w[o]) for w, o in zip(whole, chosen, strict=True)) - room
            for whole, room in tables
        ]  # fmt: skip
        if all(more <= 0 for more in excess):
            return chosen
        # Variables are whole to 1e-6 only, which is much where an option is a million steps.
        slack = [less + max(more, 0) for less, more in zip(slack, excess, strict=True)]


def least_weight(
    weights: Sequence[Array], values: Sequence[Array], budget: float, others: Sequence[Limit] = ()
) -> tuple[int, ...]:
    """Return one option per group with the least sum of ``weights`` whose ``values`` sum to at most ``budget``.

    It keeps within ``others`` too. Among those of equal weight, one of least value. Raises :class:`InputError` as :func:`solve`
    does.
    """
    limit = Limit(name="max_kl", weights=tuple(values), budget=budget)
    chosen = solve(weights, [limit, *others])
    spent = sum(float(w[option]) for w, option in zip(weights, chosen, strict=True))
    return solve(values, [Limit(name="size", weights=tuple(weights), budget=spent), *others])


def prices(values: Sequence[Array], limits: Sequence[Limit]) -> tuple[float, ...]:
    """Return what one more unit of each limit's weight would save: its multiplier in the linear relaxation, not negative.

    Raises :class:`InputError` where no mixture of options keeps within all limits.
    """
    if not limits:
        return ()
    sizes = [len(v) for v in values]
    flat = np.concatenate([np.asarray(v, dtype=np.float64) - np.min(v) for v in values])
    top = float(flat.max()) or 1.0
    groups = np.repeat(np.arange(len(sizes)), sizes)
    once = csr_array((np.ones(len(flat)), (groups, np.arange(len(flat)))), shape=(len(sizes), len(flat)))
    over = [np.concatenate([w - w.min() for w in limit.weights]) for limit in limits]
    scale = [float(w.max()) or 1.0 for w in over]
    left = [limit.budget - sum(float(w.min()) for w in limit.weights) for limit in limits]
    with _silent():
        found = linprog(
            flat / top * _SCALE, A_ub=np.stack([w / by for w, by in zip(over, scale, strict=True)]),
            b_ub=[room / by for room, by in zip(left, scale, strict=True)], A_eq=once, b_eq=np.ones(len(sizes)),
            bounds=(0.0, 1.0), method="highs",
        )  # fmt: skip
    if found.x is None:
        raise InputError(f"no choice keeps all of {', '.join(limit.name for limit in limits)} together; raise one")
    return tuple(
        max(-float(m), 0.0) / _SCALE * top / by for m, by in zip(found.ineqlin.marginals, scale, strict=True)
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what HiGHS prints by itself, now and then, off the process's standard output."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
