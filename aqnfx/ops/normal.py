"""``aqnfx::normal``: hash bits to normal values, for compilers as one operation."""

from __future__ import annotations

import torch
from torch import Tensor

from aqnfx.numerics.noise import normal_of


@torch.library.custom_op("aqnfx::normal", mutates_args=())
def normal(bits: Tensor) -> Tensor:
    """Return :func:`aqnfx.numerics.noise.normal_of`, fp32, for compilers as one operation."""
    return normal_of(bits)


@normal.register_fake
def _(bits: Tensor) -> Tensor:
    return torch.empty_like(bits, dtype=torch.float32)


NORMAL = torch.ops.aqnfx.normal.default
