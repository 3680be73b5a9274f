"""What ``aqnfx::mix32`` and ``aqnfx::normal`` are to Inductor: one pointwise operation each, of some twenty instructions.

Written as tensor operations they take Inductor very long: it follows every use of a value by itself, and a hash uses each of its
intermediate values twice, one after the other.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch._inductor.lowering import make_pointwise, register_lowering
from torch._inductor.virtualized import ops

from aqnfx.numerics.noise import EXPONENT, LOG, MIX_1, MIX_2, SIN, TWO_THIRDS
from aqnfx.ops.mix32 import MIX
from aqnfx.ops.normal import NORMAL


def _int(value: int) -> Any:
    return ops.constant(value, torch.int32)


def _float(value: float) -> Any:
    return ops.constant(value, torch.float32)


def _shift_right(x: Any, bits: int) -> Any:
    return ops.bitwise_and(ops.bitwise_right_shift(x, _int(bits)), _int((1 << (32 - bits)) - 1))


def _mix32(x: Any) -> Any:
    """See :func:`aqnfx.numerics.noise.mix32`."""
    x = ops.bitwise_xor(x, _shift_right(x, 16))
    x = ops.mul(x, _int(MIX_1))
    x = ops.bitwise_xor(x, _shift_right(x, 15))
    x = ops.mul(x, _int(MIX_2))
    return ops.bitwise_xor(x, _shift_right(x, 16))


def _polynomial(coefficients: tuple[float, ...], x: Any) -> Any:
    value = _float(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = ops.add(ops.mul(value, x), _float(coefficient))
    return value


def _normal(bits: Any) -> Any:
    """See :func:`aqnfx.numerics.noise.normal_of`; operation by operation the same."""
    u = ops.mul(ops.add(ops.to_dtype(_shift_right(bits, 12), torch.float32), _float(0.5)), _float(2.0**-20))
    whole = ops.to_dtype_bitcast(u, torch.int32, torch.float32)
    exponent = ops.bitwise_and(ops.sub(whole, _int(TWO_THIRDS)), _int(EXPONENT))
    s = ops.sub(ops.to_dtype_bitcast(ops.sub(whole, exponent), torch.float32, torch.int32), _float(1.0))
    twice_log = ops.mul(ops.to_dtype(exponent, torch.float32), _float(-2.0 * math.log(2.0) * 2.0**-23))
    radius = ops.sqrt(ops.add(twice_log, ops.mul(_polynomial(LOG, s), s)))
    angle = ops.to_dtype(ops.bitwise_and(bits, _int(0xFFF)), torch.float32)
    fold = ops.add(ops.mul(angle, _float(-(2.0**-11))), _float(1.0 - 2.0**-12))
    return ops.mul(radius, ops.mul(fold, _polynomial(SIN, ops.mul(fold, fold))))


@functools.cache
def register() -> None:
    """Tell Inductor; later calls do nothing."""
    register_lowering(MIX, type_promotion_kind=None)(make_pointwise(_mix32))
    register_lowering(NORMAL, type_promotion_kind=None)(make_pointwise(_normal, override_return_dtype=torch.float32))
