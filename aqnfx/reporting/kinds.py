"""Kinds of values in tables: how each is written, and on which side of its column it stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aqnfx.reporting.text import MISSING, factor, factor_range, nats, nats_range, percent, percent_range, quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How values of a kind are written. ``brief`` writes them where room is short, ``None`` as everywhere.

    ``right``: numbers stand right in terminals and on pages, ``ranges`` only in terminals. A text in place of a value is
    written as it is: it says why there is no number.
    """

    name: str
    write: Callable[[Any], str]
    brief: Callable[[Any], str] | None = None
    right: bool = False
    ranges: bool = False

    def text(self, value: Any, *, brief: bool = False) -> str:
        """Return a value as text; what is not known (``None``) as its writer has it, mostly ``n/a``."""
        if isinstance(value, str):
            return value
        return self.brief(value) if brief and self.brief is not None else self.write(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What one level did: degradation (a fraction), half the width of its interval, KL (nats per token).

    ``estimated``: predicted and not measured. ``shown``: told apart from no effect.
    """

    degradation: float | None
    half: float | None
    kl: float | None
    estimated: bool = False
    shown: bool = True


def fixed(digits: int) -> Kind:
    """Return the kind of numbers with so many decimals."""
    return Kind(name="fixed", write=lambda value: MISSING if value is None else f"{value:.{digits}f}", right=True)


def _plain(value: Any) -> str:
    return MISSING if value is None else str(value)


def _share(value: Sequence[float | None]) -> str:
    estimate, low, high = value
    return percent(estimate) if low is None else f"{percent(estimate)} ({percent(low)} to {percent(high)})"


def _effect(effect: Effect) -> str:
    if effect.degradation is None:
        return MISSING
    spread = "" if effect.half is None else f" ± {percent(effect.half).removesuffix(' %')}"
    mark = " (est.)" if effect.estimated else "" if effect.shown else "*"
    return f"{percent(effect.degradation).removesuffix(' %')}{spread} %{mark}, {nats(effect.kl)}"


def _loss(effect: Effect) -> str:
    if effect.degradation is None:
        return MISSING
    return percent(effect.degradation) + ("^" if effect.estimated else "" if effect.shown else "*")


def _loss_and_kl(effect: Effect) -> str:
    return MISSING if effect.degradation is None else f"{_loss(effect)} {nats(effect.kl):>8}"


TEXT = Kind(name="text", write=_plain)
COUNT = Kind(name="count", write=_plain, right=True)
PERCENT = Kind(name="percent", write=percent, right=True)
PERCENT_RANGE = Kind(name="percent range", write=percent_range, ranges=True)
KL = Kind(name="KL", write=nats, right=True)
KL_MEASURED = Kind(name="KL", write=lambda value: "not measured" if value is None else nats(value), brief=nats, right=True)
KL_RANGE = Kind(name="KL range", write=nats_range, ranges=True)
FACTOR = Kind(name="factor", write=factor, right=True)
FACTOR_RANGE = Kind(name="factor range", write=factor_range, ranges=True)
NUMBER = Kind(name="number", write=nats, right=True)
QUANTITY = Kind(name="quantity", write=lambda value: MISSING if value is None else quantity(value), right=True)
DECIBEL = fixed(1)
SHARE = Kind(name="share", write=_share, ranges=True)
BAR = Kind(name="bar", write=percent)
CLASS = Kind(name="class", write=_plain)
EFFECT = Kind(name="effect", write=_effect, brief=_loss_and_kl, right=True)
EFFECT_LOSS = Kind(name="effect", write=_effect, brief=_loss, right=True)
