"""What arithmetic allows: how far the outputs of a Program move when every operation rounds as another implementation may.

Sums in another order have the error of a small change of their operands (Higham, Accuracy and Stability of Numerical
Algorithms, section 3.5); for terms of either sign it grows with the square root of their number (Higham and Mary, SIAM J.
Sci. Comput. 41, 2019). So every value gets a relative change of its unit roundoff, and products one of the square root of
their terms besides; a target of 16 bits rounds every value to these 16 bits, weights too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from aqnfx.graph.opkinds import OpKind, op_kind

_PRODUCTS = frozenset({OpKind.LINEAR, OpKind.MATMUL, OpKind.BMM, OpKind.SDPA, OpKind.CONV, OpKind.GROUPED_MM})
_HUGE = 1e30  # masks, which nothing is added to


class Rounded(Interpreter):
    """Run a graph with the rounding of another implementation, which computes in ``dtype`` where that is narrower."""

    def __init__(self, module: GraphModule, dtype: torch.dtype, seed: int) -> None:
        super().__init__(module)
        self.dtype = dtype
        self.random = torch.Generator().manual_seed(seed)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a weight as a checkpoint of the dtype stores it."""
        return self._narrow(super().get_attr(target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return what the operation gives, rounded anew."""
        value = super().call_function(target, args, kwargs)
        kind = op_kind(target)
        if kind is None or not isinstance(value, Tensor) or not value.is_floating_point():
            return self._narrow(value)
        wide = value.to(torch.float32)
        moved = wide * (1.0 + torch.finfo(value.dtype).eps * self._like(wide))
        if kind in _PRODUCTS and value.dim():
            terms = max(a.shape[-1] for a in args if isinstance(a, Tensor) and a.dim())
            rows = wide.square().mean(-1, keepdim=True).sqrt()
            moved = moved + 2.0**-24 * math.sqrt(terms) * rows * self._like(wide)
        return self._narrow(torch.where(wide.abs() < _HUGE, moved, wide).to(value.dtype))

    def _like(self, value: Tensor) -> Tensor:
        return torch.randn(value.shape, generator=self.random)

    def _narrow(self, value: Any) -> Any:
        narrow = torch.finfo(self.dtype)
        if not isinstance(value, Tensor) or not value.is_floating_point() or torch.finfo(value.dtype).eps >= narrow.eps:
            return value
        return value.clamp(narrow.min, narrow.max).to(self.dtype).to(value.dtype)
