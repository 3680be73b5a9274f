"""Declared perturbations: named functions from a value to a fixed (not random) change of it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from aqnfx.errors import InputError, nearest
from aqnfx.numerics.formats import KNOWN, parse_format, quantize

BIAS = "bias"
"""The change |y|: noise of kind ``bias`` at level 1."""

Delta = Callable[..., Tensor]


def _magnitude(y: Tensor, dim: int = -1, channel_dim: int = -1) -> Tensor:
    return _wide(y).abs()


def _wide(y: Tensor) -> Tensor:
    return y if y.dtype == torch.float64 else y.to(torch.float32)


@functools.cache
def perturbation(name: str) -> Delta:
    """Return the function of a declared perturbation: ``bias``, or what a number format changes.

    It is called with the value, and ``dim`` and ``channel_dim`` as :func:`aqnfx.numerics.formats.quantize` has them, and
    returns fp32, of an fp64 value fp64. Raises :class:`InputError` for an unknown name.
    """
    if name == BIAS:
        return _magnitude
    if name.split(":")[0] not in KNOWN:
        known = (BIAS, *KNOWN)
        raise InputError(f"unknown perturbation {name!r}; known: {', '.join(known)}{nearest(name, known)}")
    fmt = parse_format(name)

    def delta(y: Tensor, dim: int = -1, channel_dim: int = -1) -> Tensor:
        wide = _wide(y)
        return quantize(wide, fmt, dim=dim, channel_dim=channel_dim) - wide

    return delta
