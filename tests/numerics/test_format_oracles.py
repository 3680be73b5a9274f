"""Formats against two independent libraries, torchao and compressed-tensors: bit for bit wherever their conventions agree."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor
from torch.nn.functional import pad
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.quantization import Float8Tensor, PerBlock, PerRow, PerTensor, quant_primitives
from torchao.quantization.quantize_.common import KernelPreference

from aqnfx.numerics import formats as F
from aqnfx.numerics.formats import Format, parse_format, quantize

MX = {
    "mxfp4": torch.float4_e2m1fn_x2, "mxfp6_e2m3": "fp6_e2m3", "mxfp6_e3m2": "fp6_e3m2",
    "mxfp8_e4m3": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2,
}  # fmt: skip
FP8 = ("fp8_e4m3:tensor", "fp8_e4m3:row", "fp8_e4m3:g128", "fp8_e5m2:tensor", "fp8_e5m2:row", "fp8_e5m2:g128")
SYMMETRIC = ("int8:tensor", "int8:row", "int4:row", "int4:g32:fp32")  # with scales in fp32, like those of
ASYMMETRIC = ("int8:tensor:asym", "int8:row:asym", "int4:row:asym", "int4:g32:asym")
ROWS, WIDTH = 24, 390  # no row ends in a full block
FINITE = ("gaussian", "student", "wide", "huge", "ties")
ALL = (*FINITE, "sparse", "nan", "infinity")


def ties(fmt: Format, groups: Tensor, random: torch.Generator) -> Tensor:
    """Return exact midpoints of the elements, in groups whose exact scale is a power of two from 2^-6 to 2^8."""
    element, asymmetric = fmt.element, getattr(fmt.element, "zero_point", False)
    if isinstance(element, F.FloatElement):
        steps = torch.arange(2**element.mantissa) * 2.0**-element.mantissa
        binades = [(1.0 + steps) * 2.0**e for e in range(element.lowest, element.top + 1)]
        values = torch.cat([steps * 2.0**element.lowest, *binades])
        values = values[values <= element.largest]
    else:
        values = torch.arange(2.0 ** (element.bits - (not asymmetric))) * 2.0**-element.fraction
    x = (values[1:] + values[:-1])[torch.randint(len(values) - 1, groups.shape, generator=random)] / 2.0
    x[:, 0], x[:, 1] = values.max(), 0.0
    shift = torch.randint(len(values), (len(x), 1), generator=random)
    x = x - shift if asymmetric else torch.where(torch.rand(x.shape, generator=random) < 0.5, -x, x)
    x *= 2.0 ** torch.randint(-6, 9, shift.shape, generator=random)
    if fmt.scale == "e4m3":  # so that the scale of the tensor is 1
        x[0] = torch.tensor([448.0 * 6.0] + [0.0] * 15)
    return x


def sample(kind: str, name: str) -> tuple[Format, Tensor, Tensor]:
    """Return the format, the sample (student's rows have one sign), and what the libraries get: zeros fill the blocks."""
    fmt, random = parse_format(name), torch.Generator().manual_seed(0)
    whole = torch.zeros(ROWS, WIDTH + -WIDTH % max(fmt.block, 1))
    x, a, b = torch.randn(3, ROWS, WIDTH, generator=random)
    wide = 2.0 ** torch.randint(-30, 31, x.shape, generator=random)
    x *= {"student": (x * a[:, :1]).sign() * (2.0 / (a * a + b * b)).sqrt(), "wide": wide, "huge": 6e37}.get(kind, 1.0)
    if kind == "ties":
        x = ties(fmt, in_groups(whole, fmt), random).reshape(whole.shape)[:, :WIDTH].contiguous()
    elif kind == "sparse":  # one subnormal number in a block of 32, zeros of both signs elsewhere and in the first row
        x = torch.where(a < 0.0, -0.0, 0.0)
        x[1:, 5::32] = b[1:, 5::32] * 1e-39
    elif kind in ("nan", "infinity"):
        x[::5, 40] = float(kind)
    return fmt, x, pad(x, (0, whole.shape[1] - WIDTH))


def in_groups(x: Tensor, fmt: Format) -> Tensor:
    return x.reshape(-1, {"tensor": x.numel(), "row": x.shape[-1], "block": fmt.block}[fmt.grouping])


def spread(groups: Tensor, fmt: Format, x: Tensor) -> Tensor:
    return groups.reshape(-1, 1).expand(in_groups(x, fmt).shape).reshape(x.shape)


def same(found: Tensor, expected: Tensor, where: Tensor | None = None) -> bool:
    """Say whether the bits are the same, but for those of NaN and for what fills the last block."""
    expected = expected[:, :WIDTH]
    agree = (found.isnan() & expected.isnan()) | (found.view(torch.int32) == expected.view(torch.int32))
    return bool((agree if where is None else agree | ~where[:, :WIDTH]).all())


def by_torchao(x: Tensor, name: str) -> Tensor:
    return MXTensor.to_mx(x, MX[name], 32, scaling_mode=ScaleCalculationMode.FLOOR).dequantize(torch.float32)


def arguments(fmt: Format, dtype: torch.dtype | None = None) -> QuantizationArgs:
    strategy = {"tensor": "tensor", "row": "channel", "block": "group"}[fmt.grouping]
    kind, size = "int" if isinstance(fmt.element, F.IntElement) else "float", fmt.block or None
    return QuantizationArgs(num_bits=fmt.element.bits, type=kind, strategy=strategy, group_size=size, scale_dtype=dtype)


def by_compressed_tensors(x: Tensor, fmt: Format, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    shape = (1,) if fmt.grouping == "tensor" else (len(x), -1)
    found = fake_quantize(x, scale.reshape(shape), None if zero is None else zero.reshape(shape), arguments(fmt))
    return torch.where(x == 0.0, x, found) if fmt.element == F.E2M1 else found  # its fp4 forgets the sign of a zero


@pytest.mark.parametrize("kind", [*FINITE, "nan"])
@pytest.mark.parametrize("name", MX)
def test_mx_is_that_of_torchao(name: str, kind: str) -> None:
    """Blocks with an infinity are left out: torchao gives them the scale 2^(128 - top), here they become NaN."""
    fmt, x, whole = sample(kind, name)
    assert same(quantize(x, fmt), by_torchao(whole, name))
    assert same(quantize(x.bfloat16(), fmt).float(), by_torchao(whole.bfloat16(), name).bfloat16().float())


@pytest.mark.parametrize("name", MX)
def test_the_smallest_scale_of_mx_is_that_of_torchao(name: str) -> None:
    """There torchao divides by 2^-126 and multiplies by 2^-127; so it gets a larger copy, and a value that sets the scale."""
    fmt, x, whole = sample("sparse", name)
    whole[12:, :WIDTH] = x[12:] = sample("gaussian", name)[1][12:] * 2e-39
    copy = whole * 2.0**64
    copy[:, ::32] = 2.0 ** (fmt.element.top - 127 + 64)
    others = torch.arange(whole.shape[1]).expand(whole.shape) % 32 != 0
    assert same(quantize(x, fmt), by_torchao(copy, name) * 2.0**-64, others)


@pytest.mark.parametrize("kind", [*FINITE, "sparse"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e2m3", "mxfp8_e4m3", "mxint8"])
def test_mx_is_that_of_compressed_tensors(name: str, kind: str) -> None:
    """It gets the scales of the specification, as its own round the largest magnitude first. Its mxint8 is int8 to -127."""
    fmt, x, whole = sample(kind, name)
    top, step = (0, 2.0**-6) if name == "mxint8" else (fmt.element.top, 1.0)
    largest = in_groups(whole, fmt).abs().amax(-1)
    mantissa, exponent = torch.frexp(largest)
    power = torch.ldexp(torch.ones_like(largest), (exponent - 1 - top).clamp_min(-127))
    if name != "mxint8":
        own, _ = calculate_qparams(-largest, largest, arguments(fmt, torch.uint8))
        assert bool(((own == power) | (mantissa >= 0.875) | (largest == 0.0)).all())
    found = by_compressed_tensors(whole, fmt, power * step)
    assert same(quantize(x, fmt), found.maximum(spread(-fmt.element.largest * power, fmt, whole)))


@pytest.mark.parametrize("kind", [*FINITE, "nan", "infinity"])
def test_nvfp4_is_that_of_torchao(kind: str) -> None:
    """It holds block scales above 2^-6 and multiplies by a reciprocal: other blocks count, away from inexact midpoints."""
    fmt, x, whole = sample(kind, "nvfp4")
    stored = NVFP4Tensor.to_nvfp4(whole, per_tensor_scale=per_tensor_amax_to_scale(whole.abs().amax()))
    scale = stored.get_hp_scales()
    free = spread((stored.scale.float() > 2.0**-6) | ~scale.isfinite(), fmt, whole)
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    near = (((whole / spread(scale, fmt, whole)).abs()[..., None] - middles).abs() <= middles * 2.0**-21).any(-1)
    assert free.float().mean() > 0.8
    assert same(quantize(x, fmt), stored.dequantize(), free if kind == "ties" else free & ~near)
    assert same(quantize(x, fmt), by_compressed_tensors(whole, fmt, scale), free)  # which divides


@pytest.mark.parametrize("kind", ["gaussian", "student", "wide", "ties"])
def test_nvfp4_is_that_of_compressed_tensors(kind: str) -> None:
    """It multiplies by the reciprocal of the tensor's scale: the same number where that is a power of two."""
    fmt, x, whole = sample(kind, "nvfp4")
    x[0, 0] = whole[0, 0] = torch.ldexp(torch.tensor(448.0 * 6.0), torch.frexp(x.abs().amax()).exponent - 11)
    largest, inverse = in_groups(whole, fmt).abs().amax(-1), generate_gparam(whole.amin(), whole.amax())
    scale, _ = calculate_qparams(-largest, largest, arguments(fmt, torch.float8_e4m3fn), inverse)
    assert same(quantize(x, fmt), by_compressed_tensors(whole, fmt, scale / inverse))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("name", FP8)
def test_fp8_is_that_of_both(name: str, kind: str) -> None:
    """Where a scale is 0, torchao divides by it; compressed-tensors has no E5M2."""
    fmt, x, whole = sample(kind, name)
    granularity = {"tensor": PerTensor(), "row": PerRow(), "block": PerBlock([1, fmt.block])}[fmt.grouping]
    stored = Float8Tensor.from_hp(whole, MX["mx" + name[:8]], granularity, kernel_preference=KernelPreference.TORCH)
    assert same(quantize(x, fmt), stored.dequantize(), spread(stored.scale != 0.0, fmt, whole))
    if fmt.element == F.E4M3:
        largest = in_groups(whole, fmt).abs().amax(-1)
        scale, _ = calculate_qparams(-largest, largest, arguments(fmt))
        assert same(quantize(x, fmt), by_compressed_tensors(whole, fmt, scale))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("name", [*SYMMETRIC, *ASYMMETRIC])
def test_integers_are_those_of_both(name: str, kind: str) -> None:
    """torchao has (high - low) / steps for the asymmetric scale, none below 2^-126: groups with the same scale count.

    compressed-tensors gets the scale, its own is for -128 to 127. It adds the zero point before it rounds, and torchao
    multiplies by 1 / scale: midpoints count where that is exact. Zeros have no sign.
    """
    (fmt, x, whole), asymmetric = sample(kind, name), name in ASYMMETRIC
    groups, found, bits = in_groups(whole, fmt), quantize(x, fmt) + 0.0, int(fmt.element.bits)
    low, high = groups.amin(-1).clamp_max(0.0), groups.amax(-1).clamp_min(0.0)
    top = 2.0 ** (bits - (not asymmetric)) - 1.0
    scale = high / top - low / top if asymmetric else high.maximum(-low) / top
    scale = torch.where(scale == 0.0, 1.0, scale)
    clear = ~(((whole / spread(scale, fmt, whole)).remainder(1.0) - 0.5).abs() < 2.0**-14)
    block = whole.shape if fmt.grouping == "tensor" else (1, groups.shape[1])
    kept = (torch.uint8, 0.0, top) if asymmetric else (torch.int8, -top, top)
    mapping = quant_primitives.MappingType["ASYMMETRIC" if asymmetric else "SYMMETRIC"]
    chosen = quant_primitives.choose_qparams_affine(whole, mapping, block, *kept, keepdim=True)
    stored = quant_primitives.quantize_affine(whole, block, *chosen, *kept)
    expected = quant_primitives.dequantize_affine(stored, block, *chosen, *kept)
    alike = spread(chosen[0].reshape(-1) == scale, fmt, whole)
    assert same(found, expected, alike if kind == "ties" else alike & clear)
    zero = torch.round(-low / scale) - 2.0 ** (bits - 1) if asymmetric else torch.zeros_like(scale)
    expected = by_compressed_tensors(whole, fmt, scale, zero) + 0.0
    assert same(found, expected, clear | spread(zero % 2.0 == 0.0, fmt, whole) if kind == "ties" else clear)
