"""Random signs by counter: the projections of one-pass prediction, the same on every device and for any batch size."""

from __future__ import annotations

import torch
from torch import Tensor

from aqnfx.numerics.noise import GOLDEN, as_int32, columns, mix32

_BITS = 32  # signs per hash


def random_signs(numbers: Tensor, width: int, key: int) -> Tensor:
    """Return independent signs, fp32 (R, ``width``) of -1 and 1, for rows of the given ``numbers`` (int32, (R,)).

    A row's signs depend on ``key`` (32 bits) and its number only. One 32-bit hash makes 32 of them.
    """
    base = mix32(torch.tensor(as_int32(key), dtype=torch.int32, device=numbers.device))
    rows = mix32(base + numbers * GOLDEN).unsqueeze(-1)
    words = mix32(columns(-(-width // _BITS), numbers.device) ^ rows)
    bits = (words.unsqueeze(-1) >> torch.arange(_BITS, dtype=torch.int32, device=numbers.device)) & 1
    return bits.reshape(len(numbers), -1)[:, :width].to(torch.float32).mul_(2.0).sub_(1.0)
