"""Declared perturbations: named functions from a value to a fixed (not random) change of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aqnfx.errors import InputError, nearest


def _rounded(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def delta(y: Tensor) -> Tensor:
        wide = y if y.dtype == torch.float64 else y.to(torch.float32)
        return wide.to(dtype).to(wide.dtype) - wide

    return delta


def _magnitude(y: Tensor) -> Tensor:
    return y.abs() if y.dtype == torch.float64 else y.to(torch.float32).abs()


PERTURBATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "bias": _magnitude,
    "bf16": _rounded(torch.bfloat16),
    "fp16": _rounded(torch.float16),
    "fp8_e4m3": _rounded(torch.float8_e4m3fn),
    "fp8_e5m2": _rounded(torch.float8_e5m2),
}
"""``bias`` is the change |y| (noise of kind ``bias`` at level 1); the others round to a type, without a scale."""


def perturbation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the function of a declared perturbation; raises :class:`InputError` for an unknown name."""
    if name not in PERTURBATIONS:
        raise InputError(f"unknown perturbation {name!r}; known: {', '.join(PERTURBATIONS)}{nearest(name, PERTURBATIONS)}")
    return PERTURBATIONS[name]
