"""Element types: short floats and integers, and rounding to their values, to nearest with ties to even.

Sources: OCP 8-bit Floating Point Specification 1.0 (2023); OCP Microscaling Formats (MX) Specification 1.0 (2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aqnfx.numerics.noise import as_int32

EXPONENT = 0x7F800000
"""The bits of an fp32 exponent."""
_TO_INTEGER = 1.5 * 2.0**23  # adding it to fp32 leaves no fraction: the sum rounds to nearest, ties to even


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatElement:
    """A float of one sign bit, ``exponent`` and ``mantissa`` bits; finite values reach ``largest``.

    ``lowest`` is the exponent of the smallest normal number; below it values are spaced evenly. ``overflow`` says that
    larger values become infinite instead of saturating.
    """

    exponent: int
    mantissa: int
    lowest: int
    largest: float
    overflow: bool = False

    @property
    def bits(self) -> int:
        """Bits of one value."""
        return 1 + self.exponent + self.mantissa

    @property
    def top(self) -> int:
        """The exponent of the largest number."""
        return math.frexp(self.largest)[1] - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class IntElement:
    """An integer of ``bits`` bits, multiplied by 2^-``fraction``; symmetric from -``largest`` to ``largest``.

    ``zero_point``: from 0 to 2^bits - 1 instead, around an integer zero point, so that the range is that of the values.
    """

    bits: int
    fraction: int = 0
    zero_point: bool = False

    @property
    def largest(self) -> float:
        """The largest value."""
        return float((1 << (self.bits - 1)) - 1) * 2.0**-self.fraction


Element = FloatElement | IntElement

E2M1 = FloatElement(exponent=2, mantissa=1, lowest=0, largest=6.0)
E2M3 = FloatElement(exponent=2, mantissa=3, lowest=0, largest=7.5)
E3M2 = FloatElement(exponent=3, mantissa=2, lowest=-2, largest=28.0)
E4M3 = FloatElement(exponent=4, mantissa=3, lowest=-6, largest=448.0)
E5M2 = FloatElement(exponent=5, mantissa=2, lowest=-14, largest=57344.0)
FP16 = FloatElement(exponent=5, mantissa=10, lowest=-14, largest=65504.0, overflow=True)
BF16 = FloatElement(exponent=8, mantissa=7, lowest=-126, largest=float(torch.finfo(torch.bfloat16).max), overflow=True)
TF32 = FloatElement(exponent=8, mantissa=10, lowest=-126, largest=(2.0 - 2.0**-10) * 2.0**127, overflow=True)


def round_element(x: Tensor, element: Element) -> Tensor:
    """Return fp32 ``x`` rounded to the values of ``element``, a new tensor, to nearest with ties to even; NaN stays NaN."""
    # Each step goes on in the tensor of the one before: fresh memory for each costs several times the arithmetic.
    if isinstance(element, IntElement):
        step = 2.0**-element.fraction
        held = x.clamp(-element.largest, element.largest)
        return held.round_() if step == 1.0 else held.mul_(1.0 / step).round_().mul_(step)
    if element.exponent == 8:
        return round_mantissa(x, 23 - element.mantissa)
    top = element.largest
    # Clamping first changes no rounding, and keeps infinities out of the arithmetic.
    held = x.clamp(-2.0 * top, 2.0 * top) if element.overflow else x.clamp(-top, top)
    power = (held.view(torch.int32) & EXPONENT).view(torch.float32)
    # The spacing of values there, times what pushes the digits below it out.
    magic = power.mul_(2.0**-element.mantissa * _TO_INTEGER)
    magic.clamp_min_(2.0 ** (element.lowest - element.mantissa) * _TO_INTEGER)
    rounded = held.add_(magic).sub_(magic).copysign_(x)
    if element.overflow:
        rounded = torch.where(rounded.abs() > top, torch.copysign(torch.full_like(x, math.inf), x), rounded)
    return rounded


def round_mantissa(x: Tensor, dropped: int) -> Tensor:
    """Return fp32 ``x`` without its ``dropped`` last mantissa bits; exponents are those of fp32, so overflow is infinite."""
    bits = x.view(torch.int32)
    half = (1 << (dropped - 1)) - 1
    rounded = (bits >> dropped).bitwise_and_(1).add_(bits).add_(half).bitwise_and_(as_int32(-(1 << dropped)))
    return torch.where(x.isnan(), x, rounded.view(torch.float32))
