"""What can perturb a value: kinds of noise and number formats, each one row of one table.

A run measures one perturbation. Whatever it has to know of it beyond the name stands in :class:`Perturbation`, so that another
kind costs an operator, a pass, a row here and one in :mod:`aqnfx.passes.perturbing`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aqnfx.errors import InputError, nearest
from aqnfx.numerics.formats import KNOWN, parse_format, quantize, relative_error
from aqnfx.numerics.noise import NoiseKind

NOISE, FORMAT = "noise", "format"
"""The kinds of perturbations."""

Delta = Callable[..., Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """How reports speak of a perturbation: patterns with ``{name}``, ``{level}``, ``{model}`` and ``{error}``.

    ``at`` and ``of`` say at which level, ``at_one`` and ``of_one`` the same at level 1. ``done`` is what values were perturbed
    with at several levels, ``done_at_one`` at level 1 alone; ``unit`` what a sensitivity score is relative to; ``levels`` what
    the columns of a table by level are; ``where`` how advice names the level that it was read at; ``cost`` what half of the
    level squared is multiplied with in a prediction.
    """

    title: str
    at: str
    at_one: str
    of: str
    of_one: str
    done: str
    done_at_one: str
    unit: str
    levels: str
    where: str
    cost: str


_OF_NOISE = Words(
    title="Noise sensitivity of {model}", at="at level {level}", at_one="at level {level}", of="of {name} at level {level}",
    of_one="of {name} at level {level}", done="{name} noise at level {level}", done_at_one="{name} noise at level {level}",
    unit="level", levels="by noise level", where="at noise level {level}", cost="the sum of (gradient x value) squared",
)  # fmt: skip
_COSTS = {
    NoiseKind.ABSOLUTE_GAUSSIAN: "the sum of gradient squared",
    NoiseKind.RMS_GAUSSIAN: "the sum of (gradient x rms) squared",
    NoiseKind.BIAS: "the square of the sum of gradient x |value|",
}
_OF_FORMAT = Words(
    title="Sensitivity of {model} to {name}", at="at {level} times the error of {name}", at_one="in {name}",
    of="of the format {name} at {level} times its error", of_one="of the format {name}",
    done="the error of {name} times {level} (relative to normal values {error})",
    done_at_one="the error of {name} (relative to normal values {error})",
    unit="the relative error of {name} on normal values", levels="by factor on the error of {name}", where="in {name}",
    cost="the square of the sum of gradient x error of {name}",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Perturbation:
    """One thing that perturbs values, as a run, a map and a report know it.

    ``name`` is canonical, ``kind`` one of :data:`NOISE` and :data:`FORMAT`. ``random``: it differs from draw to draw; anything
    else is a declared change of the value (:func:`declared_change`). ``graded``: its level is a strength that one may choose,
    so that it makes sense to search for the level that costs too much. ``idempotent``: what it has changed it does not change
    again. ``on_operands``: by default it is put where low-precision hardware stores values, not at the outputs of operations.
    ``generates``: a live model that generates can have it. ``levels`` and ``seeds`` are what a run takes where nobody says.
    """

    name: str
    kind: str
    random: bool
    graded: bool
    idempotent: bool
    on_operands: bool
    generates: bool
    levels: tuple[float, ...]
    seeds: int
    words: Words

    @property
    def unit_error(self) -> float:
        """The relative size of what a level of 1 is: 1 for noise, for a number format its error on normal values."""
        return relative_error(self.name) if self.kind == FORMAT else 1.0

    @property
    def format(self) -> str | None:
        """The number format whose error it is, None for anything else."""
        return self.name if self.kind == FORMAT else None

    @property
    def repeats(self) -> bool:
        """Whether a run with another seed may say something else."""
        return self.kind == NOISE

    def at(self, level: float) -> str:
        """Return at which level, in words: "at level 0.05", "in mxfp4"."""
        return self._say(self.words.at_one if level == 1.0 else self.words.at, level)

    def of(self, level: float) -> str:
        """Return of what, in words: "of relative_gaussian at level 0.05", "of the format mxfp4"."""
        return self._say(self.words.of_one if level == 1.0 else self.words.of, level)

    def where(self, level: float) -> str:
        """Return how advice names the level: "at noise level 0.05", "in mxfp4"."""
        return self._say(self.words.where, level)

    def done(self, levels: tuple[float, ...], error: float) -> str:
        """Return what values were perturbed with, in words; ``error`` is the unit error that a map holds."""
        pattern = self.words.done_at_one if levels == (1.0,) else self.words.done
        return pattern.format(name=self.name, level=", ".join(f"{level:g}" for level in levels), error=f"{error:.3g}")

    def say(self, what: str) -> str:
        """Return one of the :class:`Words` that speak of no level."""
        pattern: str = getattr(self.words, what)
        return pattern.format(name=self.name)

    def _say(self, pattern: str, level: float) -> str:
        return pattern.format(name=self.name, level=f"{level:g}")


@functools.cache
def perturbation(name: str) -> Perturbation:
    """Return the perturbation of a name: a kind of noise or a number format; raises :class:`InputError` for another name."""
    if name in list(NoiseKind):
        words = dataclasses.replace(_OF_NOISE, cost=_COSTS.get(NoiseKind(name), _OF_NOISE.cost))
        return Perturbation(
            name=str(NoiseKind(name)), kind=NOISE, random=name != NoiseKind.BIAS, graded=True, idempotent=False,
            on_operands=False, generates=True, levels=(0.01, 0.05, 0.1), seeds=3, words=words,
        )  # fmt: skip
    if name.split(":")[0] not in KNOWN:
        known = (*map(str, NoiseKind), *KNOWN)
        raise InputError(f"unknown perturbation {name!r}; known: {', '.join(known)}{nearest(name, known)}")
    return Perturbation(
        name=parse_format(name).name, kind=FORMAT, random=False, graded=False, idempotent=True, on_operands=True,
        generates=False, levels=(1.0,), seeds=1, words=_OF_FORMAT,
    )  # fmt: skip


def _magnitude(y: Tensor, dim: int = -1, channel_dim: int = -1) -> Tensor:
    return _wide(y).abs()


def _wide(y: Tensor) -> Tensor:
    return y if y.dtype == torch.float64 else y.to(torch.float32)


@functools.cache
def declared_change(name: str) -> Delta:
    """Return the function of a perturbation that is not random: what noise of kind ``bias`` or a number format changes.

    It is called with the value, and ``dim`` and ``channel_dim`` as :func:`aqnfx.numerics.formats.quantize` has them, and
    returns fp32, of an fp64 value fp64. Raises :class:`InputError` for an unknown name and for random noise.
    """
    if name == NoiseKind.BIAS:
        return _magnitude
    if name.split(":")[0] not in KNOWN:
        known = (str(NoiseKind.BIAS), *KNOWN)
        raise InputError(f"unknown perturbation {name!r}; known: {', '.join(known)}{nearest(name, known)}")
    fmt = parse_format(name)

    def delta(y: Tensor, dim: int = -1, channel_dim: int = -1) -> Tensor:
        wide = _wide(y)
        return quantize(wide, fmt, dim=dim, channel_dim=channel_dim) - wide

    return delta
