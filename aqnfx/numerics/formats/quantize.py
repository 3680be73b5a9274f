"""Number formats: what a tensor becomes when it is stored in few bits, in plain tensor operations that a compiler fuses.

:func:`quantize` returns the stored values as floats ("fake quantisation"), :func:`encode` the elements and scales that a file
holds. Both go through one function that chooses scales, so what is packed is what was measured. Rounding is to nearest, ties to
even; what is beyond the largest element saturates.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from aqnfx.errors import AqnfxError, InputError
from aqnfx.numerics.formats.elements import (
    BF16,
    E4M3,
    EXPONENT,
    FloatElement,
    IntElement,
    round_element,
    round_mantissa,
)
from aqnfx.numerics.formats.names import Format, parse_format
from aqnfx.numerics.noise import GOLDEN, as_int32, columns, mix32, standard_normal

_LEAST = 1 << 22  # the bits of 2^-127, which fp32 has as a subnormal number


@functools.cache
def relative_error(name: str) -> float:
    """Return the rms error of a format relative to the rms of what it stores, for normal values in rows of 512.

    10^(-SQNR / 20): what the level of relative Gaussian noise is to noise.
    """
    rows, cols = torch.arange(256, dtype=torch.int32).unsqueeze(1) * GOLDEN, columns(512)
    x = standard_normal(mix32(rows), cols)
    wrong = (quantize(x, parse_format(name)) - x).double()
    return float(wrong.square().sum().sqrt() / x.double().square().sum().sqrt())


def unmasked(x: Tensor) -> Tensor:
    """Return which values are no mask's: models add -inf, or the least finite number, where nothing may be seen."""
    return x.abs() < torch.finfo(x.dtype).max / 2


def _power_of_two_scale(largest: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return 2^(floor(log2(largest)) - top) as E8M0 has it, at least 2^-127 and NaN for infinities and NaN, and its inverse."""
    exponent = largest.view(torch.int32) & EXPONENT
    bits = (exponent - (top << 23)).clamp_min_(0)
    inverse = ((254 << 23) - bits).clamp_min_(_LEAST)
    bits = bits.clamp_min_(_LEAST).masked_fill_(exponent == EXPONENT, as_int32(0x7FC00000))
    return bits.view(torch.float32), inverse.view(torch.float32)


class Codes(NamedTuple):
    """A tensor in a format, in fp32: what is stored is ``(elements - zeros) * scales`` group by group.

    ``elements`` are values of the format's element type, whole numbers for integers. Of :func:`encode`: they have the shape
    of the weight (out, in), ``scales`` (out, in / block), (out, 1) for rows and (1, 1) for the whole tensor; ``zeros``, of
    that shape, is None without zero points. ``whole`` is the fp32 scale of the tensor that the scales of nvfp4 hold as a
    factor, else None.
    """

    elements: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    whole: Tensor | None = None

    def stored(self) -> Tensor:
        """Return the values that a weight has when it is read again, fp32."""
        groups = self.elements.reshape(*self.scales.shape, -1) if self.scales.numel() > 1 else self.elements.reshape(1, 1, -1)
        offset = groups if self.zeros is None else groups - self.zeros.unsqueeze(-1)
        return (offset * self.scales.unsqueeze(-1)).reshape(self.elements.shape)


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


def encode(weight: Tensor, fmt: Format) -> Codes:
    """Return the elements and scales of ``weight``, a matrix (out, in) whose rows the blocks of ``fmt`` divide.

    :meth:`Codes.stored` of them is what :func:`quantize` returns, bit for bit where the dtype of the weight holds it. A kernel
    without groups has one scale for everything; "channel" of a matrix (out, in) is its rows. Raises :class:`InputError` for a
    format without scales and for blocks that do not divide a row, :class:`AqnfxError` where the dtype does not hold a value.
    """
    wide = _single(weight.detach())
    out, width = wide.shape
    block = {"block": fmt.block, "tensor": wide.numel()}.get(fmt.grouping, width)
    if fmt.grouping == "none" or (fmt.grouping == "block" and width % block):
        raise InputError(f"format {fmt.name} has no elements and scales of a weight whose rows are {width} long")
    groups = wide.reshape(*((1, 1) if fmt.grouping == "tensor" else (out, width // block)), -1)
    found = _scaled(groups, fmt, (2,), wide.abs().amax() if fmt.scale == "e4m3" else None, None)
    zeros = None if found.zeros is None else found.zeros.squeeze(-1)
    codes = Codes(found.elements.reshape(wide.shape), found.scales.squeeze(-1), zeros, found.whole)
    if not torch.equal(codes.stored().to(weight.dtype).isfinite(), wide.isfinite()):
        raise AqnfxError(
            f"the weight is not finite, or {weight.dtype} does not hold what {fmt.name} stores of it; there is nothing to pack"
        )
    return codes


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
    return _decoded(_scaled(wide, fmt, dims, None, bounds), fmt)


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
    found = _decoded(_scaled(blocks, fmt, (blocks.dim() - 1,), whole, None), fmt)
    values = found.values.reshape(padded.shape)
    return Stored((values if full else values[..., :width].contiguous()).reshape(x.shape), found.low[..., 0], found.high[..., 0])


def _scaled(
    x: Tensor, fmt: Format, dims: tuple[int, ...], whole: Tensor | None, bounds: tuple[Tensor, Tensor] | None
) -> Codes:
    """Return the elements of ``x``, a new tensor, with one scale per slice over ``dims``, which broadcasts to them.

    ``whole`` is the largest magnitude of the tensor, for scales that are a factor on one of the whole.
    """
    element = fmt.element
    if isinstance(element, IntElement) and element.zero_point:
        return _with_zero_point(x, fmt, element, dims, bounds)
    found = x.abs().amax(dims, keepdim=True) if dims and bounds is None else x.abs()
    largest = found if bounds is None else _largest(bounds)
    if fmt.scale == "e8m0":
        top = element.top if isinstance(element, FloatElement) else 0
        scale, inverse = _power_of_two_scale(largest, top)
        return Codes(round_element(x * inverse, element), scale)
    tensor_scale = None
    if fmt.scale == "e4m3":
        assert whole is not None  # given by the caller for this scale
        tensor_scale = _divisor(whole / (E4M3.largest * element.largest))
        scale = round_element(largest / element.largest / tensor_scale, E4M3) * tensor_scale
    else:
        scale = _stored_scale(largest / element.largest, fmt)
    return Codes(round_element(x / _divisor(scale), element), scale, whole=tensor_scale)


def _decoded(codes: Codes, fmt: Format) -> Stored:
    """Return the stored values, made in the tensor of the elements, and the range of each group."""
    elements, scales, zeros, _ = codes
    largest = fmt.element.largest
    if zeros is None:
        return Stored(elements.mul_(scales), scales * -largest, scales * largest)
    assert isinstance(fmt.element, IntElement)  # floats have no zero point
    steps = float((1 << fmt.element.bits) - 1)
    return Stored(elements.sub_(zeros).mul_(scales), -zeros * scales, (steps - zeros) * scales)


def _stored_scale(scale: Tensor, fmt: Format) -> Tensor:
    """Return an fp32 scale as the format stores it."""
    return round_mantissa(scale, 23 - BF16.mantissa) if fmt.scale == "bf16" else scale


def _divisor(scale: Tensor) -> Tensor:
    """Return the scale, and 1 where it is 0: nothing but zeros is divided by that."""
    return torch.where(scale == 0, 1.0, scale)


def _with_zero_point(
    x: Tensor, fmt: Format, element: IntElement, dims: tuple[int, ...], bounds: tuple[Tensor, Tensor] | None
) -> Codes:
    steps = float((1 << element.bits) - 1)
    if bounds is not None:
        low, high = (bound.to(torch.float32) for bound in bounds)
    else:
        low, high = (x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)) if dims else (x, x)
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    # Each by itself: their difference may overflow.
    scale = _divisor(_stored_scale(high / steps - low / steps, fmt))
    zero = torch.round(-low / scale).clamp(0.0, steps)
    return Codes((x / scale).round_().add_(zero).clamp_(0.0, steps), scale, zeros=zero)
