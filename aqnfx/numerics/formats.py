"""Number formats: what a tensor becomes when it is stored in few bits, in plain tensor operations that a compiler fuses.

A format is an element type, the values that share a scale, and the kind of the scale. :func:`quantize` returns the stored
values as floats ("fake quantisation"). Rounding is to nearest, ties to even; what is beyond the largest element saturates.
Sources: OCP 8-bit Floating Point Specification 1.0 (2023); OCP Microscaling Formats (MX) Specification 1.0 (2023); for
nvfp4 "Pretraining Large Language Models with NVFP4" (NVIDIA 2025, arXiv:2509.25149), appendix on quantisation.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from aqnfx.errors import InputError, nearest
from aqnfx.numerics.noise import as_int32

Grouping = Literal["none", "tensor", "channel", "row", "block"]
Scale = Literal["none", "fp32", "e8m0", "e4m3"]

_EXPONENT = 0x7F800000
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
    the last dimension; "none" has no scale. ``scale``: "fp32"; "e8m0", a power of two; "e4m3", an 8-bit float times one
    fp32 scale per tensor.
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
    def _group_bits(self) -> int:
        """Bits of one scale, and of the zero point beside it."""
        offset = isinstance(self.element, IntElement) and self.element.zero_point
        return {"fp32": 32, "e8m0": 8, "e4m3": 8, "none": 0}[self.scale] + (self.element.bits if offset else 0)

    def stored_bits(self, shape: tuple[int, ...], channel_dim: int = 0) -> int:
        """Return the bits of a whole tensor of ``shape``, scales and zero points included."""
        count = math.prod(shape)
        width = shape[-1] if shape else 1
        groups = {
            "none": 0, "tensor": 1, "channel": shape[channel_dim] if shape else 1, "row": count // max(width, 1),
            "block": count // max(width, 1) * -(-width // max(self.block, 1)),
        }[self.grouping]  # fmt: skip
        return count * self.element.bits + groups * self._group_bits + (32 if self.scale == "e4m3" else 0)


def _exponent_field(x: Tensor) -> Tensor:
    """Return the biased exponents of fp32 values, int32: 0 for zeros and subnormals, 255 for infinities and NaN."""
    return (x.view(torch.int32) & _EXPONENT) >> 23


def _power_of_two(field: Tensor) -> Tensor:
    """Return 2^(field - 127) as fp32, for int32 fields in [0, 254]; NaN for 255, as E8M0 has it."""
    bits = torch.where(field > 0, field << 23, 1 << 22)
    return torch.where(field == 255, as_int32(0x7FC00000), bits).view(torch.float32)


def round_element(x: Tensor, element: Element) -> Tensor:
    """Return fp32 ``x`` rounded to the values of ``element``, to nearest with ties to even; NaN stays NaN."""
    if isinstance(element, IntElement):
        step = 2.0**-element.fraction
        return torch.round(x.clamp(-element.largest, element.largest) * (1.0 / step)) * step
    if element.exponent == 8:
        return _round_mantissa(x, 23 - element.mantissa)
    top = element.largest
    # Clamping first changes no rounding, and keeps infinities out of the arithmetic.
    held = x.clamp(-2.0 * top, 2.0 * top) if element.overflow else x.clamp(-top, top)
    power = (held.view(torch.int32) & _EXPONENT).view(torch.float32)
    spacing = (power * 2.0**-element.mantissa).clamp_min(2.0 ** (element.lowest - element.mantissa))
    magic = spacing * _TO_INTEGER
    rounded = torch.copysign((held + magic) - magic, x)
    if element.overflow:
        rounded = torch.where(rounded.abs() > top, torch.copysign(torch.full_like(x, math.inf), x), rounded)
    return rounded


def _round_mantissa(x: Tensor, dropped: int) -> Tensor:
    """Return fp32 ``x`` without its ``dropped`` last mantissa bits; exponents are those of fp32, so overflow is infinite."""
    bits = x.view(torch.int32)
    half = (1 << (dropped - 1)) - 1
    rounded = (bits + half + ((bits >> dropped) & 1)) & as_int32(-(1 << dropped))
    return torch.where(x.isnan(), x, rounded.view(torch.float32))


def quantize(x: Tensor, fmt: Format, *, channel_dim: int = 0) -> Tensor:
    """Return ``x`` as ``fmt`` stores it, with the dtype and shape of ``x``; the arithmetic is in fp32.

    ``channel_dim`` is the dimension of the grouping "channel". A last block that is not full stands as if zeros followed.
    Groups of zeros stay zeros. NaN stays NaN; an infinity takes part as the format says: where a scale is read off the
    values, its whole group becomes NaN, since no scale describes it. Empty tensors come back as they are.
    """
    if x.numel() == 0:
        return x.clone()
    wide = x.to(torch.float32)
    if fmt.grouping == "none":
        return round_element(wide, fmt.element).to(x.dtype)
    return _held(_grouped(wide, fmt, channel_dim), x.dtype)


def _held(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` in ``dtype``; a value that rounding took beyond its largest number becomes that."""
    largest = torch.finfo(dtype).max
    return (x if dtype.itemsize >= 4 else x.clamp(-largest, largest)).to(dtype)


def _grouped(wide: Tensor, fmt: Format, channel_dim: int) -> Tensor:
    if fmt.grouping == "block":
        return _by_blocks(wide, fmt)
    if fmt.grouping == "tensor" or wide.dim() == 0:
        dims = tuple(range(wide.dim()))
    elif fmt.grouping == "row":
        dims = (wide.dim() - 1,)
    else:
        dims = tuple(d for d in range(wide.dim()) if d != channel_dim % wide.dim())
    return _scaled(wide, fmt, dims, None)


def _by_blocks(x: Tensor, fmt: Format) -> Tensor:
    flat = x.reshape(1) if x.dim() == 0 else x
    width = flat.shape[-1]
    missing = -width % fmt.block
    padded = pad(flat, (0, missing)) if missing else flat
    blocks = padded.reshape(*padded.shape[:-1], -1, fmt.block)
    whole = x.abs().amax() if fmt.scale == "e4m3" else None
    found = _scaled(blocks, fmt, (blocks.dim() - 1,), whole).reshape(padded.shape)
    return (found[..., :width] if missing else found).reshape(x.shape)


def _scaled(x: Tensor, fmt: Format, dims: tuple[int, ...], whole: Tensor | None) -> Tensor:
    """Return ``x`` stored with one scale per slice over ``dims``; ``whole`` is the largest magnitude of the tensor."""
    element = fmt.element
    if isinstance(element, IntElement) and element.zero_point:
        return _with_zero_point(x, element, dims)
    largest = x.abs().amax(dims, keepdim=True) if dims else x.abs()
    if fmt.scale == "e8m0":
        top = element.top if isinstance(element, FloatElement) else 0
        field = _exponent_field(largest)
        field = torch.where(field == 255, field, (field - top).clamp(0, 254))
        inverse = torch.where(field == 255, field, 254 - field)
        return round_element(x * _power_of_two(inverse), element) * _power_of_two(field)
    if fmt.scale == "e4m3":
        assert whole is not None  # given by the caller for this scale
        tensor_scale = _divisor(whole / (E4M3.largest * element.largest))
        scale = round_element(largest / element.largest / tensor_scale, E4M3) * tensor_scale
    else:
        scale = largest / element.largest
    return round_element(x / _divisor(scale), element) * scale


def _divisor(scale: Tensor) -> Tensor:
    """Return the scale, and 1 where it is 0: nothing but zeros is divided by that."""
    return torch.where(scale == 0, 1.0, scale)


def _with_zero_point(x: Tensor, element: IntElement, dims: tuple[int, ...]) -> Tensor:
    steps = float((1 << element.bits) - 1)
    low = x.amin(dims, keepdim=True).clamp_max(0.0) if dims else x.clamp_max(0.0)
    high = x.amax(dims, keepdim=True).clamp_min(0.0) if dims else x.clamp_min(0.0)
    scale = _divisor(high / steps - low / steps)  # each by itself: their difference may overflow
    zero = torch.round(-low / scale).clamp(0.0, steps)
    stored = (torch.round(x / scale) + zero).clamp(0.0, steps)
    return (stored - zero) * scale


_PLAIN = {"bf16": BF16, "fp16": FP16, "tf32": TF32}
_FP8 = {"fp8_e4m3": E4M3, "fp8_e5m2": E5M2}
_MX: dict[str, Element] = {
    "mxfp8_e4m3": E4M3, "mxfp8_e5m2": E5M2, "mxfp6_e2m3": E2M3, "mxfp6_e3m2": E3M2, "mxfp4": E2M1,
    "mxint8": IntElement(bits=8, fraction=6),
}  # fmt: skip
_INTEGERS = {f"int{bits}": bits for bits in (2, 3, 4, 6, 8)}
KNOWN = (*_INTEGERS, *_FP8, *_MX, "nvfp4", *_PLAIN)
_GROUPS = ("tensor", "channel", "row", "token")


def parse_format(text: str) -> Format:
    """Return the format that a text names; raises :class:`InputError` for any other text.

    ``int2``, ``int3``, ``int4``, ``int6``, ``int8``, ``fp8_e4m3`` and ``fp8_e5m2`` take what shares a scale: ``:tensor``,
    ``:channel``, ``:row`` (or ``:token``, the same), ``:g32`` (any block size; the default is ``:row``); integers also
    ``:asym`` for a zero point. ``mxfp8_e4m3``, ``mxfp8_e5m2``, ``mxfp6_e2m3``, ``mxfp6_e3m2``, ``mxfp4``, ``mxint8``,
    ``nvfp4``, ``bf16``, ``fp16`` and ``tf32`` are whole as they stand.
    """
    base, *options = text.strip().lower().split(":")
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
    groups = [option for option in options if option != "asym"]
    if len(groups) > 1 or options.count("asym") > 1 or (asymmetric and base not in _INTEGERS):
        raise InputError(f"format {text!r}: one of {', '.join(_GROUPS)}, gN, and for integers asym, were expected")
    group, block = groups[0] if groups else "row", 0
    if match := re.fullmatch(r"g([1-9]\d{0,5})", group):
        group, block = "block", int(match[1])
    elif group not in _GROUPS:
        raise InputError(f"format {text!r}: {group!r} is not one of {', '.join(_GROUPS)}, gN{nearest(group, _GROUPS)}")
    group = "row" if group == "token" else group
    element: Element = _FP8[base] if base in _FP8 else IntElement(bits=_INTEGERS[base], zero_point=asymmetric)
    name = f"{base}:{f'g{block}' if block else group}{':asym' if asymmetric else ''}"
    return Format(name=name, element=element, grouping=group, scale="fp32", block=block)  # type: ignore[arg-type]
