"""What a number format is called: an element type, the values that share a scale, and the kind of the scale.

For nvfp4 see "Pretraining Large Language Models with NVFP4" (NVIDIA 2025, arXiv:2509.25149), appendix on quantisation.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from aqnfx.errors import InputError, nearest
from aqnfx.numerics.formats.elements import (
    BF16,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    FP16,
    TF32,
    Element,
    IntElement,
)

Grouping = Literal["none", "tensor", "channel", "row", "block"]
Scale = Literal["none", "fp32", "bf16", "e8m0", "e4m3"]


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
