"""The level of a perturbation that a control buffer switches: off, whole, or a multiple of its error."""

from __future__ import annotations

import torch
from torch import Tensor


def is_off(level: Tensor | None, x: Tensor) -> bool:
    """Return whether nothing is to be computed for ``x``: known without waiting for a device where the level is on the CPU."""
    return level is not None and (x.numel() == 0 or (level.device.type == "cpu" and float(level[0]) == 0.0))


def placed(level: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the level where ``x`` is; None, which means the whole error, where the CPU knows that it is 1."""
    if level is None or (level.device.type == "cpu" and float(level[0]) == 1.0):
        return None
    return level.to(x.device, non_blocking=True)


def blend(x: Tensor, perturbed: Tensor, level: Tensor | None) -> Tensor:
    """Return ``x`` moved towards ``perturbed`` by the factor ``level[0]``, in the memory layout of ``x``.

    0 returns ``x`` bit for bit, 1 (and None) ``perturbed``. A graph may view what it reads, which not every layout allows.
    """
    if level is not None:
        scale = level[0]
        between = (x + scale * (perturbed - x)).to(x.dtype)
        perturbed = torch.where(scale == 0, x, torch.where(scale == 1, perturbed, between))
    return perturbed if perturbed.stride() == x.stride() else torch.empty_like(x).copy_(perturbed)
