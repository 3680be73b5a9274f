"""Weights as a file stores them: the elements, and the scales and zero points of their groups."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aqnfx.errors import AqnfxError
from aqnfx.numerics.formats import E4M3, FloatElement, Format, IntElement, quantize, round_element

_SMALLEST_E8M0 = -127


class Codes(NamedTuple):
    """A weight of shape (out, in) in a format, in fp32: what is stored is ``(values - zeros) * scales`` group by group.

    ``values`` has the weight's shape and holds elements of the format, whole numbers for integers; ``scales`` has the shape
    (out, in / block), (out, 1) for rows and (1, 1) for the whole tensor; ``zeros``, of that shape, is None without zero points.
    ``whole`` is the fp32 scale of the tensor that the scales of nvfp4 hold as a factor, else None.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    whole: Tensor | None = None

    def stored(self) -> Tensor:
        """Return the values that the weight has when it is read again, fp32."""
        groups = self.values.reshape(*self.scales.shape, -1) if self.scales.numel() > 1 else self.values.reshape(1, 1, -1)
        offset = groups if self.zeros is None else groups - self.zeros.unsqueeze(-1)
        return (offset * self.scales.unsqueeze(-1)).reshape(self.values.shape)


def encode(weight: Tensor, fmt: Format) -> Codes:
    """Return the elements and scales of ``weight``, a matrix (out, in) whose rows ``fmt``'s blocks divide.

    The stored values are those of :func:`aqnfx.numerics.formats.quantize` bit for bit, signs of zeros aside: that is checked
    at every call, so what is exported is what was planned. Raises :class:`AqnfxError` where they would differ.
    """
    wide = weight.detach().to(torch.float32)
    # A kernel without groups has one scale for everything: "channel" of a matrix (out, in) is its rows.
    width = {"block": fmt.block, "tensor": wide.numel()}.get(fmt.grouping, wide.shape[1])
    shape = (1, 1) if fmt.grouping == "tensor" else (wide.shape[0], wide.shape[1] // width)
    groups = wide.reshape(*shape, -1)
    if isinstance(fmt.element, IntElement) and fmt.element.zero_point:
        found = _asymmetric(groups, fmt, fmt.element)
    else:
        found = _symmetric(groups, fmt)
    codes = found._replace(values=found.values.reshape(wide.shape))
    wanted = quantize(weight.detach(), fmt)
    if not torch.equal(codes.stored().to(weight.dtype), wanted):
        raise AqnfxError(f"the elements and scales of {fmt.name} are not the values that were planned; this is a fault of aqnfx")
    return codes


def _symmetric(groups: Tensor, fmt: Format) -> Codes:
    largest = groups.abs().amax(-1)
    element, whole = fmt.element, None
    if fmt.scale == "e8m0":
        top = element.top if isinstance(element, FloatElement) else 0
        scales = torch.ldexp(torch.ones_like(largest), (torch.frexp(largest).exponent - 1 - top).clamp_min(_SMALLEST_E8M0))
    elif fmt.scale == "e4m3":
        whole = _divisor(groups.abs().amax() / (E4M3.largest * element.largest))
        scales = round_element(largest / element.largest / whole, E4M3) * whole
    else:
        scales = _rounded(largest / element.largest, fmt)
    return Codes(round_element(groups / _divisor(scales).unsqueeze(-1), element), scales, whole=whole)


def _asymmetric(groups: Tensor, fmt: Format, element: IntElement) -> Codes:
    steps = float((1 << element.bits) - 1)
    low, high = groups.amin(-1).clamp_max(0.0), groups.amax(-1).clamp_min(0.0)
    scales = _divisor(_rounded(high / steps - low / steps, fmt))
    zeros = torch.round(-low / scales).clamp(0.0, steps)
    values = (torch.round(groups / scales.unsqueeze(-1)) + zeros.unsqueeze(-1)).clamp(0.0, steps)
    return Codes(values, scales, zeros=zeros)


def _rounded(scales: Tensor, fmt: Format) -> Tensor:
    return scales.to(torch.bfloat16).to(torch.float32) if fmt.scale == "bf16" else scales


def _divisor(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1.0, scales)
