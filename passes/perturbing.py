"""Which pass inserts a perturbation: one row for every kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from aqnfx.numerics.perturbations import FORMAT, NOISE, Perturbation
from aqnfx.passes.base import Pass
from aqnfx.passes.insert_fake_quant import InsertFakeQuant
from aqnfx.passes.insert_noise import InsertNoise


def _noise(what: Perturbation, where: str, kernel: bool) -> Pass:
    return InsertNoise(where=where, kind=what.name, compiled=kernel)


def _format(what: Perturbation, where: str, kernel: bool) -> Pass:
    return InsertFakeQuant(where=where, format=what.name, controls=True)


_INSERTS: Mapping[str, Callable[[Perturbation, str, bool], Pass]] = {NOISE: _noise, FORMAT: _format}
HAS_KERNEL: Mapping[str, bool] = {NOISE: True, FORMAT: False}
"""Whether the operator of a kind has a kernel of its own that can be compiled by itself."""


def insert(what: Perturbation, where: str, *, kernel: bool = False) -> Pass:
    """Return the pass that puts ``what`` on the sites that ``where`` selects, with a level for each that ``noise`` sets.

    ``kernel`` compiles the operator's own kernel, where it has one.
    """
    return _INSERTS[what.kind](what, where, kernel)
