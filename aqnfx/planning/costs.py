"""Costs: the KL of every choice of a menu for every part, with standard errors, from one set of scored passes.

Two estimators of ½·E(g·δ)² are at hand. The squared sum of a sample, (Σ g·δ)², has the right mean and the noise of a square
of a normal value per sample and draw. The sum of squares, Σ (g·δ)², leaves out how errors of different elements act together:
hardly any noise, and a factor that is off by ten to thirty percent at each part, with a median near 1 (errors of rounding are
nearly independent). Their logarithms are combined, each weighed by its variance, which is measured (Fay and Herriot 1979,
JASA 74:269): the first's by the draws, the second's by how far both lie apart over all parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aqnfx.errors import ProbeError
from aqnfx.planning.menu import Choice, Part
from aqnfx.probes.predict import Predictions

Array = NDArray[np.float64]

TRUNCATION = 0.6
"""Standard deviation of log(measured / predicted KL) over √KL: what the third order adds, in nats^-1/2.

Between those of two small language models in a trial with 64 draws (single linear layers, five integer formats, 0.4 and 0.7);
spot checks of a run move it, see :func:`truncation_from`.
"""
EXCESS = 0.9
"""How much more than second order a plan costs, per nat: c of M = S + c·(S² − Σ of the squares of its parts' KL).

Single layers are near second order where whole plans are not: their errors meet in what follows. With S the second order of a
plan and M its measured KL, M/S − 1 grew in proportion to S from 0.05 to 1 nat, c near 0.9 on two small language models with
weights in 2 to 8 bits. Plans of inputs too had 1 to 3; a model that is sure of nearly every token had thousands, at a KL that is
as much smaller. Measured plans move it, see :func:`excess_from`.
"""
APART = 0.05
"""Standard deviation of log(measured / predicted) over the plans of one run, in the same trial."""
_MEDIAN = 0.4549  # of a chi-square variable of one degree of freedom
_TELLING = 0.01  # nats: from here on a spot check counts in full
_PRIOR_CHECKS = 5.0  # spot checks that the constant above is worth


@dataclass(frozen=True, slots=True, kw_only=True)
class Excess:
    """What a plan costs beyond second order: c of :data:`EXCESS` in 1/nats, its standard error, and how much it is at most.

    ``most`` is a share of second order, the largest that was seen: c is fitted where plans were measured and holds no further.
    """

    c: float = EXCESS
    se: float = EXCESS
    most: float = EXCESS

    def of(self, second_order: float, pairs: float) -> float:
        """Return the excess in nats of a plan with ``pairs``, S² − Σ of its parts' squares."""
        return min(self.c * pairs, self.most * second_order)


NO_EXCESS = Excess(c=0.0, se=0.0, most=0.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Costs:
    """What every choice costs: ``columns`` holds, per option, Σ g·δ per draw and sample, fp64 (options, K, n).

    An option is a pair (module, choice text); ``index`` gives its row. ``per_sample`` (n,): scored tokens; where weights of
    experts are planned, a batch takes the place of a sample. ``kl`` (options,) is the KL in nats per token of that option
    alone on these samples: predicted, or measured where ``measured`` (options,) says so. ``noise`` (options,) is the standard
    error of the prediction that the draws make; ``unbiased`` and ``elementwise`` (options,) the two estimates that it is made
    of, ``spread`` the standard deviation of the log of the second around the truth, ``truncation`` that of what second order
    leaves out, per √KL. ``excess`` is what plans cost beyond second order. ``joint``: some option stores more than a weight.
    """

    index: Mapping[tuple[str, str], int]
    columns: Array
    per_sample: Array
    kl: Array
    noise: Array
    unbiased: Array
    elementwise: Array
    spread: float
    measured: NDArray[np.bool_]
    truncation: float = TRUNCATION
    excess: Excess = Excess()
    joint: bool = False

    @property
    def se(self) -> Array:
        """Standard error of ``kl`` for these samples: of draws and truncation; 0 for what was measured."""
        return np.where(self.measured, 0.0, np.hypot(self.noise, self.truncation * self.kl**1.5))

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return int(self.per_sample.sum())


def costs(found: Predictions, parts: Sequence[Part], options: Mapping[str, Sequence[Choice]]) -> Costs:
    """Return what every option costs, from predictions whose declared perturbations hold all formats.

    ``options``: module -> its choices. Raises :class:`ProbeError` where no gradient reached a part, so that nothing is known
    of it, or where the predictions were made without ``elements``.
    """
    if found.sketch is None or found.elements is None:
        raise ProbeError("costs need predictions with declared formats and elements; run insert-score with elements=true")
    rows = {site.id: row for row, site in enumerate(found.sites)}
    names = {name: number for number, name in enumerate(found.perturbations)}
    stored = {part.module: {site for c in options[part.module] for site, _ in part.formats(c)} for part in parts}
    lost = [module for module, sites in stored.items() if sites and not any(found.reached[rows[site]] for site in sites)]
    if lost:
        raise ProbeError(
            f"no gradient reached {lost[0]} ({len(lost)} of {len(parts)} modules), so its cost is unknown; leave it out"
        )
    index: dict[tuple[str, str], int] = {}
    sketch, per_sample = found.sketch, found.tokens
    if any(site in found.shared for sites in stored.values() for site in sites):
        # The error of experts is summed over a batch, at its first sample: so the batch is what is squared, for all alike.
        starts = np.array(found.offsets)
        sketch, per_sample = np.add.reduceat(sketch, starts, axis=-1), np.add.reduceat(per_sample, starts)
    tokens, shape = int(per_sample.sum()), sketch.shape[2:]
    columns, squares, joint = [], [], False
    for part in parts:
        for choice in options[part.module]:
            index[part.module, choice.text] = len(index)
            pairs = [(rows[site], names[name]) for site, name in part.formats(choice)]
            joint |= part.cache or len(pairs) > 1
            columns.append(sum((sketch[row, name] for row, name in pairs), np.zeros(shape)))
            squares.append(sum(float(found.elements[row, name].sum()) for row, name in pairs))
    table = np.stack(columns)
    elementwise = 0.5 * np.array(squares) / tokens
    kl, noise, spread = combine(table, elementwise, tokens)
    return Costs(
        index=index, columns=table, per_sample=per_sample.astype(np.float64), kl=kl, noise=noise,
        unbiased=mean_square(table, tokens), elementwise=elementwise, spread=spread, measured=np.zeros(len(kl), dtype=bool),
        joint=joint,
    )  # fmt: skip


def mean_square(columns: Array, tokens: int) -> Array:
    """Return ½·Σ over samples of the mean over draws of (Σ g·δ)², per token: (…, K, n) to (…)."""
    return np.asarray(0.5 * np.square(columns).mean(axis=-2).sum(axis=-1) / tokens)


def draw_error(columns: Array, tokens: int) -> Array:
    """Return the standard error of :func:`mean_square` for its samples: what other draws would change.

    Every sample's variance is taken over its draws, or, where there is one, as that of the square of a normal value.
    """
    squares = 0.5 * np.square(columns) / tokens
    draws = columns.shape[-2]
    # The variance of few squares is itself noise; that of a squared normal value, 2·mean², is known. Both, by their weight.
    known = 2.0 * np.square(squares.mean(axis=-2)) / (1.0 + 2.0 / draws)
    found = squares.var(axis=-2, ddof=1) if draws > 1 else known
    return np.asarray(np.sqrt(((known + found) / 2.0).sum(axis=-1) / draws))


def combine(columns: Array, elementwise: Array, tokens: int) -> tuple[Array, Array, float]:
    """Return KL, its standard error, and the spread of the elementwise estimate: empirical Bayes on logarithms.

    With u the unbiased estimate, v its variance relative to u², and e the elementwise one, log u − log e over all options has
    the variance τ² + v; τ² is what makes that so. The result is u^w·e^(1−w) with w = τ² / (τ² + v), and the relative
    variance w·v. Options without an error cost 0.
    """
    u, noise = mean_square(columns, tokens), draw_error(columns, tokens)
    there = (u > 0.0) & (elementwise > 0.0)
    kl, se = np.zeros_like(u), np.zeros_like(u)
    if not there.any():
        return kl, se, 0.0
    relative = np.square(noise[there] / u[there])
    # log u is low by v/2 in the mean, as the logarithm is bent.
    apart = np.log(u[there]) + relative / 2.0 - np.log(elementwise[there])
    spread2 = _excess_variance(np.square(apart), relative)
    # Beyond two standard deviations the spread of the others says nothing of an option: its own distance takes its place.
    prior = np.maximum(spread2, np.square(apart) - 4.0 * (spread2 + relative))
    weight = prior / (prior + relative)
    kl[there] = elementwise[there] * np.exp(weight * apart)
    se[there] = kl[there] * np.sqrt(weight * relative)
    return kl, se, math.sqrt(spread2)


def _excess_variance(squares: Array, variances: Array) -> float:
    """Return τ² for which the median of squares / (τ² + variances) is that of a chi-square variable of one degree, 0.4549.

    The median and not the mean (Paule and Mandel 1982): a few options that are far off, as where a dead zone shifts
    everything one way, must not speak for all.
    """
    low, high = 0.0, float(squares.max()) / _MEDIAN
    for _ in range(60):
        middle = (low + high) / 2.0
        above = float(np.median(squares / (middle + variances + 1e-12))) > _MEDIAN
        low, high = (middle, high) if above else (low, middle)
    return max(high, 1e-4)


def truncation_from(predicted: Array, se: Array, measured: Array, *, prior: float = TRUNCATION) -> float:
    """Return the standard deviation of log(measured / predicted) per √KL, from spot checks and a prior worth five of them.

    ``se`` is that of the predictions alone. Checks without a positive KL say nothing.
    """
    use = (predicted > 0.0) & (measured > 0.0)
    if not use.any():
        return prior
    log = np.log(measured[use] / predicted[use])
    excess = (np.square(log) - np.square(se[use] / predicted[use])) / predicted[use]
    # Small KL has no third order to speak of, and dividing by it makes noise.
    weights = np.minimum(np.square(predicted[use] / _TELLING), 1.0)
    total = prior**2 * _PRIOR_CHECKS + float(np.sum(weights * np.maximum(excess, 0.0)))
    return math.sqrt(total / (_PRIOR_CHECKS + float(weights.sum())))


def excess_from(
    second_order: Array, se: Array, pairs: Array, measured: Array, *, least: float = 0.0, prior: float = EXCESS
) -> Excess:
    """Return the excess of measured plans: from their S, its errors, S² − Σ of squares, and their KL.

    Least squares with a prior of ``prior`` ± the same. Where the plans are sure that it is another number the prior gives way, as
    it must for a model whose KL sits in a few tokens. Plans with S below ``least`` say nothing: what their interactions hide,
    scaled up to a plan of many times their KL, would be all of it.
    """
    use = (second_order > 0.0) & (measured > 0.0) & (pairs > 0.0) & (second_order >= least)
    s, m, x = second_order[use], measured[use], pairs[use]
    if not use.any():
        return Excess(c=prior, se=prior, most=prior)
    variance = np.square(m) * (np.square(se[use] / s) + APART**2)
    precision = float(np.sum(np.square(x) / variance))
    fitted = float(np.sum(x * (m - s) / variance)) / precision
    width = max(prior**2, (fitted - prior) ** 2 - 4.0 / precision)
    total = precision + 1.0 / width
    c = max((precision * fitted + prior / width) / total, 0.0)
    return Excess(c=c, se=math.sqrt(1.0 / total), most=max(prior, float(np.max(m / s)) - 1.0))
