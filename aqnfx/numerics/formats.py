"""Number formats: what a tensor becomes when it is stored in few bits, in plain tensor operations that a compiler fuses.

A format is an element type, the values that share a scale, and the kind of the scale. :func:`quantize` returns the stored
values as floats ("fake quantisation"). Rounding is to nearest, ties to even; what is beyond the largest element saturates.
Sources: OCP 8-bit Floating Point Specification 1.0 (2023); OCP Microscaling Formats (MX) Specification 1.0 (2023); for
nvfp4 "Pretraining Large Language Models with NVFP4" (NVIDIA 2025, arXiv:2509.25149), appendix on quantisation.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from aqnfx.errors import InputError, nearest
from aqnfx.numerics.noise import GOLDEN, as_int32, columns, mix32, standard_normal

Grouping = Literal["none", "tensor", "channel", "row", "block"]
Scale = Literal["none", "fp32", "bf16", "e8m0", "e4m3"]

_EXPONENT = 0x7F800000
_LEAST = 1 << 22  # the bits of 2^-127, which fp32 has as a subnormal number
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A number format: ``name`` is its canonical text, see :func:`parse_format`.

    ``grouping`` is what shares a scale: "tensor"; "channel", every index of one dimension; "row", every vector along the
    last dimension (an output channel of a weight, a token of an activation); "block", ``block`` consecutive values of
    the last dimension; "none" has no scale. ``scale``: "fp32"; "bf16", the fp32 one rounded; "e8m0", a power of two;
    "e4m3", an 8-bit float times one fp32 scale per tensor.
    """

    name: str
    element: Element
    grouping: Grouping
    scale: Scale
    block: int = 0

    @property
    def bits(self) -> float:
        """Bits per value with the scales that the format itself has per block; scales of rows and tensors are extra."""
        return self.element.bits + (self._group_bits / self.block if self.grouping == "block" else 0.0)

    @property
    def static(self) -> bool:
        """Whether a scale is of the whole tensor, so that it can be fixed before the values are known."""
        return self.grouping == "tensor" or self.scale == "e4m3"

    @property
    def _group_bits(self) -> int:
        """Bits of one scale, and of the zero point beside it."""
        offset = isinstance(self.element, IntElement) and self.element.zero_point
        return {"fp32": 32, "bf16": 16, "e8m0": 8, "e4m3": 8, "none": 0}[self.scale] + (self.element.bits if offset else 0)

    def stored_bits(self, shape: tuple[int, ...], channel_dim: int = 0) -> int:
        """Return the bits of a whole tensor of ``shape``, scales and zero points included."""
        count = math.prod(shape)
        width = shape[-1] if shape else 1
        groups = {
            "none": 0, "tensor": 1, "channel": shape[channel_dim] if shape else 1, "row": count // max(width, 1),
            "block": count // max(width, 1) * -(-width // max(self.block, 1)),
        }[self.grouping]  # fmt: skip
        return count * self.element.bits + groups * self._group_bits + (32 if self.scale == "e4m3" else 0)


@functools.cache
def relative_error(name: str) -> float:
    """Return the rms error of a format relative to the rms of what it stores, for normal values in rows of 512.

    10^(-SQNR / 20): what the level of relative Gaussian noise is to noise.
    """
    rows, cols = torch.arange(256, dtype=torch.int32).unsqueeze(1) * GOLDEN, columns(512)
    x = standard_normal(mix32(rows), cols)
    wrong = (quantize(x, parse_format(name)) - x).double()
    return float(wrong.square().sum().sqrt() / x.double().square().sum().sqrt())


def _power_of_two_scale(largest: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return 2^(floor(log2(largest)) - top) as E8M0 has it, at least 2^-127 and NaN for infinities and NaN, and its inverse."""
    exponent = largest.view(torch.int32) & _EXPONENT
    bits = (exponent - (top << 23)).clamp_min_(0)
    inverse = ((254 << 23) - bits).clamp_min_(_LEAST)
    bits = bits.clamp_min_(_LEAST).masked_fill_(exponent == _EXPONENT, as_int32(0x7FC00000))
    return bits.view(torch.float32), inverse.view(torch.float32)


def round_element(x: Tensor, element: Element) -> Tensor:
    """Return fp32 ``x`` rounded to the values of ``element``, a new tensor, to nearest with ties to even; NaN stays NaN."""
    # Each step goes on in the tensor of the one before: fresh memory for each costs several times the arithmetic.
    if isinstance(element, IntElement):
        step = 2.0**-element.fraction
        held = x.clamp(-element.largest, element.largest)
        return held.round_() if step == 1.0 else held.mul_(1.0 / step).round_().mul_(step)
    if element.exponent == 8:
        return _round_mantissa(x, 23 - element.mantissa)
    top = element.largest
    # Clamping first changes no rounding, and keeps infinities out of the arithmetic.
    held = x.clamp(-2.0 * top, 2.0 * top) if element.overflow else x.clamp(-top, top)
    power = (held.view(torch.int32) & _EXPONENT).view(torch.float32)
    # The spacing of values there, times what pushes the digits below it out.
    magic = power.mul_(2.0**-element.mantissa * _TO_INTEGER)
    magic.clamp_min_(2.0 ** (element.lowest - element.mantissa) * _TO_INTEGER)
    rounded = held.add_(magic).sub_(magic).copysign_(x)
    if element.overflow:
        rounded = torch.where(rounded.abs() > top, torch.copysign(torch.full_like(x, math.inf), x), rounded)
    return rounded


def _round_mantissa(x: Tensor, dropped: int) -> Tensor:
    """Return fp32 ``x`` without its ``dropped`` last mantissa bits; exponents are those of fp32, so overflow is infinite."""
    bits = x.view(torch.int32)
    half = (1 << (dropped - 1)) - 1
    rounded = (bits >> dropped).bitwise_and_(1).add_(bits).add_(half).bitwise_and_(as_int32(-(1 << dropped)))
    return torch.where(x.isnan(), x, rounded.view(torch.float32))


def unmasked(x: Tensor) -> Tensor:
    """Return which values are no mask's: models add -inf, or the least finite number, where nothing may be seen."""
    return x.abs() < torch.finfo(x.dtype).max / 2


class Stored(NamedTuple):
    """Stored values, and the least and the largest value that the scale of each group holds."""

    values: Tensor
    low: Tensor
    high: Tensor


def quantize(
    x: Tensor, fmt: Format, *, dim: int = -1, channel_dim: int = 0, bounds: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Return ``x`` as ``fmt`` stores it, with the dtype and shape of ``x``; the arithmetic is in fp32.

    ``dim`` is the dimension that rows and blocks run along (where products sum), ``channel_dim`` that of the grouping
    "channel". A last block that is not full stands as if zeros followed. ``bounds``, two scalars, are the least and the
    largest value that a scale of the whole tensor is made for, instead of those of ``x``; what lies beyond saturates.
    No gradient goes through: rounding has none. Groups of zeros stay zeros. NaN stays NaN; an infinity takes part as the
    format says: where a scale is read off the values, its whole group becomes NaN, since no scale describes it. Empty tensors
    come back as they are. Raises :class:`InputError` for bounds where no scale is of the whole tensor.
    """
    if bounds is not None and not fmt.static:
        raise InputError(
            f"format {fmt.name} reads its scales off the values; fixed bounds need intN:tensor, fp8_*:tensor or nvfp4"
        )
    if x.numel() == 0:
        return x.clone()
    wide = _single(x.detach())  # autograd would keep what is overwritten below
    if fmt.grouping == "none":
        stored = round_element(wide, fmt.element)
        return torch.where(stored.isinf(), stored, _held(stored.clone(), x.dtype)).to(x.dtype)
    if fmt.grouping in ("row", "block") and x.dim() > 1 and dim % x.dim() != x.dim() - 1:
        moved = wide.movedim(dim, -1)
        return _held(_grouped(moved, fmt, channel_dim, bounds).values, x.dtype).movedim(-1, dim)
    return _held(_grouped(wide, fmt, channel_dim, bounds).values, x.dtype)


def quantize_group(x: Tensor, fmt: Format, bounds: tuple[Tensor, Tensor] | None = None) -> Stored:
    """Return fp32 ``x`` of shape (groups, values of a group) as ``fmt`` stores it, with the range that it holds.

    A group is a block or a row; where the whole tensor shares a scale, or nothing does, any split is right. The range
    broadcasts to the values. ``x`` is not empty. ``bounds`` and the values are those of :func:`quantize`.
    """
    x = x.detach()
    if fmt.grouping == "none":
        largest = x.new_tensor(fmt.element.largest)
        return Stored(round_element(x, fmt.element), -largest, largest)
    return _grouped(x, fmt, 0, bounds)


def _single(x: Tensor) -> Tensor:
    """Return ``x`` in fp32; finite fp64 values beyond it become its largest."""
    if x.dtype != torch.float64:
        return x.to(torch.float32)
    largest = torch.finfo(torch.float32).max
    return torch.where(x.isinf(), x, x.clamp(-largest, largest)).to(torch.float32)


def _held(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return fp32 ``x`` in ``dtype``; a value that rounding took beyond the largest number becomes that, in ``x`` too."""
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return x.clamp_(-largest, largest).to(dtype)


def _grouped(wide: Tensor, fmt: Format, channel_dim: int, bounds: tuple[Tensor, Tensor] | None) -> Stored:
    if fmt.grouping == "block":
        return _by_blocks(wide, fmt, bounds)
    if fmt.grouping == "tensor" or wide.dim() == 0:
        dims = tuple(range(wide.dim()))
    elif fmt.grouping == "row":
        dims = (wide.dim() - 1,)
    else:
        dims = tuple(d for d in range(wide.dim()) if d != channel_dim % wide.dim())
    return _scaled(wide, fmt, dims, None, bounds)


def _largest(bounds: tuple[Tensor, Tensor]) -> Tensor:
    """Return the largest magnitude that bounds allow."""
    low, high = bounds
    return torch.maximum(low.abs(), high.abs()).to(torch.float32)


def _by_blocks(x: Tensor, fmt: Format, bounds: tuple[Tensor, Tensor] | None) -> Stored:
    flat = x.reshape(1) if x.dim() == 0 else x
    width = flat.shape[-1]
    block = min(fmt.block, width) if isinstance(width, int) else fmt.block  # a short row is a block of its own
    missing = -width % block
    full = isinstance(missing, int) and missing == 0  # of a size that is open, the example says nothing
    padded = flat if full else pad(flat, (0, missing))
    blocks = padded.reshape(*padded.shape[:-1], -1, block)
    whole = (x.abs().amax() if bounds is None else _largest(bounds)) if fmt.scale == "e4m3" else None
    found = _scaled(blocks, fmt, (blocks.dim() - 1,), whole, None)
    values = found.values.reshape(padded.shape)
    return Stored((values if full else values[..., :width].contiguous()).reshape(x.shape), found.low[..., 0], found.high[..., 0])


def _scaled(
    x: Tensor, fmt: Format, dims: tuple[int, ...], whole: Tensor | None, bounds: tuple[Tensor, Tensor] | None
) -> Stored:
    """Return ``x`` stored with one scale per slice over ``dims``; ``whole`` is the largest magnitude of the tensor."""
    element = fmt.element
    if isinstance(element, IntElement) and element.zero_point:
        return _with_zero_point(x, fmt, element, dims, bounds)
    found = x.abs().amax(dims, keepdim=True) if dims and bounds is None else x.abs()
    largest = found if bounds is None else _largest(bounds)
    if fmt.scale == "e8m0":
        top = element.top if isinstance(element, FloatElement) else 0
        scale, inverse = _power_of_two_scale(largest, top)
        values = round_element(x * inverse, element).mul_(scale)
        return Stored(values, scale * -element.largest, scale * element.largest)
    if fmt.scale == "e4m3":
        assert whole is not None  # given by the caller for this scale
        tensor_scale = _divisor(whole / (E4M3.largest * element.largest))
        scale = round_element(largest / element.largest / tensor_scale, E4M3) * tensor_scale
    else:
        scale = _stored_scale(largest / element.largest, fmt)
    values = round_element(x / _divisor(scale), element).mul_(scale)
    return Stored(values, scale * -element.largest, scale * element.largest)


def _stored_scale(scale: Tensor, fmt: Format) -> Tensor:
    """Return an fp32 scale as the format stores it."""
    return _round_mantissa(scale, 23 - BF16.mantissa) if fmt.scale == "bf16" else scale


def _divisor(scale: Tensor) -> Tensor:
    """Return the scale, and 1 where it is 0: nothing but zeros is divided by that."""
    return torch.where(scale == 0, 1.0, scale)


def _with_zero_point(
    x: Tensor, fmt: Format, element: IntElement, dims: tuple[int, ...], bounds: tuple[Tensor, Tensor] | None
) -> Stored:
    steps = float((1 << element.bits) - 1)
    if bounds is not None:
        low, high = (bound.to(torch.float32) for bound in bounds)
    else:
        low, high = (x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)) if dims else (x, x)
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    # Each by itself: their difference may overflow.
    scale = _divisor(_stored_scale(high / steps - low / steps, fmt))
    zero = torch.round(-low / scale).clamp(0.0, steps)
    stored = (x / scale).round_().add_(zero).clamp_(0.0, steps)
    return Stored(stored.sub_(zero).mul_(scale), -zero * scale, (steps - zero) * scale)


_PLAIN = {"bf16": BF16, "fp16": FP16, "tf32": TF32}
_FP8 = {"fp8_e4m3": E4M3, "fp8_e5m2": E5M2}
_MX: dict[str, Element] = {
    "mxfp8_e4m3": E4M3, "mxfp8_e5m2": E5M2, "mxfp6_e2m3": E2M3, "mxfp6_e3m2": E3M2, "mxfp4": E2M1,
    "mxint8": IntElement(bits=8, fraction=6),
}  # fmt: skip
_INTEGERS = {f"int{bits}": bits for bits in (2, 3, 4, 6, 8)}
KNOWN = (*_INTEGERS, *_FP8, *_MX, "nvfp4", *_PLAIN)
_GROUPS = ("tensor", "channel", "row", "token", "none")


_SHORT = {"fp8": "fp8_e4m3", "mxfp8": "mxfp8_e4m3"}


def parse_format(text: str) -> Format:
    """Return the format that a text names; raises :class:`InputError` for any other text.

    ``int2``, ``int3``, ``int4``, ``int6``, ``int8``, ``fp8_e4m3`` and ``fp8_e5m2`` take what shares a scale: ``:tensor``,
    ``:channel``, ``:row`` (or ``:token``, the same), ``:g32`` (any block size; the default is ``:row``), and the type of
    the scale, ``:fp32`` or ``:bf16`` (symmetric blocks of integers have bf16 scales, as files and kernels store them; all
    others fp32: with a zero point a rounded scale would make a second rounding differ from the first); integers also
    ``:asym`` for a zero point, fp8 ``:none`` for no scale. ``mxfp8_e4m3``, ``mxfp8_e5m2``, ``mxfp6_e2m3``,
    ``mxfp6_e3m2``, ``mxfp4``, ``mxint8``, ``nvfp4``, ``bf16``, ``fp16`` and ``tf32`` are whole as they stand. ``fp8`` and
    ``mxfp8`` alone are E4M3, as in the tools that write them.
    """
    base, *options = text.strip().lower().split(":")
    base = _SHORT.get(base, base)
    if base not in KNOWN:
        raise InputError(f"unknown format {text!r}; known: {', '.join(KNOWN)}{nearest(base, KNOWN)}")
    if base in _PLAIN or base in _MX or base == "nvfp4":
        if options:
            raise InputError(f"format {base} has no options, found {':'.join(options)}")
        if base in _PLAIN:
            return Format(name=base, element=_PLAIN[base], grouping="none", scale="none")
        if base == "nvfp4":
            return Format(name=base, element=E2M1, grouping="block", scale="e4m3", block=16)
        return Format(name=base, element=_MX[base], grouping="block", scale="e8m0", block=32)
    asymmetric = "asym" in options
    scales = [option for option in options if option in ("fp32", "bf16")]
    groups = [option for option in options if option not in ("asym", "fp32", "bf16")]
    known = _GROUPS if base in _FP8 else _GROUPS[:-1]
    if max(len(groups), len(scales), options.count("asym")) > 1 or (asymmetric and base not in _INTEGERS):
        raise InputError(
            f"format {text!r}: one of {', '.join(known)}, gN, one of fp32, bf16, and for integers asym, were expected"
        )
    group, block = groups[0] if groups else "row", 0
    if match := re.fullmatch(r"g([1-9]\d{0,5})", group):
        group, block = "block", int(match[1])
    elif group not in known:
        raise InputError(f"format {text!r}: {group!r} is not one of {', '.join(known)}, gN{nearest(group, known)}")
    group = "row" if group == "token" else group
    usual = "none" if group == "none" else "bf16" if block and base in _INTEGERS and not asymmetric else "fp32"
    if group == "none" and scales:
        raise InputError(f"format {text!r}: no scale and one in {scales[0]} cannot be meant together")
    scale = scales[0] if scales else usual
    element: Element = _FP8[base] if base in _FP8 else IntElement(bits=_INTEGERS[base], zero_point=asymmetric)
    suffix = (f"g{block}" if block else group, *((scale,) if scale != usual else ()), *(("asym",) if asymmetric else ()))
    return Format(
        name=":".join((base, *suffix)), element=element, grouping=group, scale=scale, block=block,  # type: ignore[arg-type]
    )  # fmt: skip
