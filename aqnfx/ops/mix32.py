"""``aqnfx::mix32``: the hash of the noise's counters, for compilers as one operation."""

from __future__ import annotations

import torch
from torch import Tensor

from aqnfx.numerics.noise import mix32


@torch.library.custom_op("aqnfx::mix32", mutates_args=())
def mix(x: Tensor) -> Tensor:
    """Return :func:`aqnfx.numerics.noise.mix32`, for compilers as one operation."""
    return mix32(x)


@mix.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


MIX = torch.ops.aqnfx.mix32.default
