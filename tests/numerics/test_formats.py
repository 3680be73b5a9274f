"""Number formats: every encoding, every 16-bit input, blocks, edges, and the properties that rounding has."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aqnfx.errors import InputError
from aqnfx.numerics import formats as F
from aqnfx.numerics.formats import KNOWN, Format, parse_format, quantize, round_element

FLOATS: dict[str, tuple[F.FloatElement, Any]] = {
    "e2m1": (F.E2M1, ml_dtypes.float4_e2m1fn), "e2m3": (F.E2M3, ml_dtypes.float6_e2m3fn),
    "e3m2": (F.E3M2, ml_dtypes.float6_e3m2fn), "e4m3": (F.E4M3, ml_dtypes.float8_e4m3fn),
    "e5m2": (F.E5M2, ml_dtypes.float8_e5m2),
}  # fmt: skip
ALL = (
    *KNOWN, "int4:g32", "int3:g7", "int4:g32:fp32", "int8:row:bf16", "fp8_e4m3:none", "int8:g128",
    "int8:tensor", "int4:channel", "int4:asym", "int8:g16:asym", "fp8_e4m3:tensor",
    "fp8_e5m2:g128",
)  # fmt: skip


def every_16_bit_value(dtype: torch.dtype) -> torch.Tensor:
    """Return all 65,536 values of a 16-bit type in fp32: zeros of both signs, subnormals, infinities and NaN too."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    both = a.isnan() & b.isnan()
    return bool((both | (a.view(torch.int32) == b.view(torch.int32))).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FLOATS)
def test_every_16_bit_value_in_every_small_float(name: str, dtype: torch.dtype) -> None:
    element, oracle = FLOATS[name]
    x = every_16_bit_value(dtype)
    with np.errstate(invalid="ignore"):  # NaN becomes an integer on the way
        expected = torch.from_numpy(x.clamp(-element.largest, element.largest).numpy().astype(oracle).astype(np.float32))
    expected[x.isnan()] = math.nan  # the 4- and 6-bit types of the oracle have no NaN
    assert same_bits(round_element(x, element), expected)


@pytest.mark.parametrize("name", FLOATS)
def test_every_encoding_is_a_fixed_point_and_every_midpoint_goes_to_even(name: str) -> None:
    element, oracle = FLOATS[name]
    codes = np.arange(2**element.bits, dtype=np.uint8)
    values = torch.from_numpy(codes.view(oracle).astype(np.float32))
    finite = values[values.isfinite()]
    assert same_bits(round_element(finite, element), finite)
    assert float(finite.max()) == element.largest
    ordered = finite.unique()
    low, high = ordered[:-1], ordered[1:]
    middle = (low + high) / 2.0
    found = round_element(middle, element)
    expected = torch.from_numpy(middle.numpy().astype(oracle).astype(np.float32))
    assert torch.equal(found, expected)
    assert torch.equal(round_element(torch.nextafter(middle, high), element), high)
    assert torch.equal(round_element(torch.nextafter(middle, low), element), low)


@pytest.mark.parametrize(("element", "dtype"), [(F.FP16, torch.float16), (F.BF16, torch.bfloat16)])
def test_16_bit_floats_are_those_of_the_machine(element: F.FloatElement, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (10**6,), generator=generator).to(torch.int32)
    large, small = [65504.0, 65519.9, 65520.0, 7e4, 3.4e38, 3.39e38, math.inf], [2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 0.0, -0.0]
    edges = torch.tensor([*large, *small])
    x = torch.cat([bits.view(torch.float32), edges, -edges, every_16_bit_value(dtype)])
    assert same_bits(round_element(x, element), x.to(dtype).float())


def test_tf32_keeps_ten_bits_of_the_mantissa() -> None:
    e = 2.0**-11
    x = torch.tensor([1.0 + e, 1.0 + 3 * e, 1.0 + e + 2.0**-20, -(1.0 + 2 * e), math.inf, math.nan, 3.4028235e38])
    expected = torch.tensor([1.0, 1.0 + 4 * e, 1.0 + 2 * e, -(1.0 + 2 * e), math.inf, math.nan, math.inf])
    assert same_bits(round_element(x, F.TF32), expected)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 40), (2, 3, 33), (0,), (2, 0, 4)])
def test_shapes_and_dtypes_are_kept_and_finite_stays_finite(name: str, shape: tuple[int, ...]) -> None:
    fmt = parse_format(name)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for scale in (1.0, 1e-30, 1e30 if fmt.grouping != "none" else 1e4, 1e-42):
            x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale).to(dtype)
            before = x.clone()
            found = quantize(x, fmt, channel_dim=-1)
            assert torch.equal(x, before)  # the arithmetic goes on in place, but not there
            assert (found.shape, found.dtype) == (x.shape, x.dtype)
            assert bool(found.isfinite().all())
            assert found.data_ptr() != x.data_ptr() or not x.numel()
    assert torch.equal(quantize(torch.zeros(4, 40), fmt), torch.zeros(4, 40))
    if fmt.grouping != "none":
        for value, dtype in ((2e38, torch.float32), (65504.0, torch.float16)):
            wide = torch.tensor([value, -value, 1.0] * 20, dtype=dtype)
            assert bool(quantize(wide, fmt, channel_dim=-1).isfinite().all())


@pytest.mark.parametrize("name", ALL)
def test_values_with_a_gradient_are_stored_and_lose_it(name: str) -> None:
    x = torch.randn(4, 37, requires_grad=True)
    found = quantize(x, parse_format(name))
    assert not found.requires_grad
    assert found.is_contiguous()
    assert torch.equal(found, quantize(x.detach(), parse_format(name)))


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e4m3", "mxint8", "nvfp4", "int4:g32", "fp8_e4m3:row"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_group_with_a_value_that_is_not_finite_is_nan_and_no_other(name: str, value: float) -> None:
    fmt = parse_format(name)
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(2))
    x[1, 70] = value
    found = quantize(x, fmt)
    if fmt.scale == "e4m3":  # the scale of the tensor is gone with it
        assert bool(found.isnan().any())
        return
    width = fmt.block or 96
    first = 70 // width * width
    assert bool(found[1, first : first + width].isnan().all())
    found[1, first : first + width] = 0.0
    assert bool(found.isfinite().all())
    clean = quantize(x.nan_to_num(0.0, 0.0, 0.0), fmt)
    clean[1, first : first + width] = 0.0
    assert torch.equal(found, clean)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int4:g7", "int8:row", "fp8_e4m3:row"])
@pytest.mark.parametrize("dim", [0, 1, -2])
def test_rows_and_blocks_run_along_any_dimension(name: str, dim: int) -> None:
    x, fmt = torch.randn(33, 20, 5, generator=torch.Generator().manual_seed(3)), parse_format(name)
    expected = quantize(x.movedim(dim, -1).contiguous(), fmt).movedim(-1, dim)
    assert torch.equal(quantize(x, fmt, dim=dim), expected)
    assert not torch.equal(quantize(x, fmt), expected)


@pytest.mark.parametrize("name", ["int8:tensor", "int4:tensor:asym", "fp8_e4m3:tensor", "fp8_e5m2:tensor", "nvfp4"])
def test_fixed_bounds_are_those_of_the_tensor_or_saturate(name: str) -> None:
    x, fmt = torch.randn(8, 64, generator=torch.Generator().manual_seed(4)) + 0.3, parse_format(name)
    whole = quantize(x, fmt)
    assert torch.equal(quantize(x, fmt, bounds=(x.min(), x.max())), whole)
    parts = [quantize(part, fmt, bounds=(x.min(), x.max())) for part in x.split(3)]
    assert torch.equal(torch.cat(parts), whole)
    limits = torch.tensor(-1.0), torch.tensor(2.0)
    narrow = quantize(torch.tensor([-9.0, 9.0, 0.5]), fmt, bounds=limits)
    low = -1.0 if name.endswith("asym") else -2.0
    assert narrow[:2].tolist() == pytest.approx([low, 2.0], rel=0.15 if fmt.scale == "e4m3" else 1e-6)
    assert bool(quantize(torch.tensor([math.nan, 1.0]), fmt, bounds=limits)[0].isnan())


def test_bounds_for_scales_that_are_read_off_the_values_are_refused() -> None:
    for name in ("mxfp4", "int8:row", "int4:g32", "fp8_e4m3:channel", "bf16"):
        with pytest.raises(InputError, match=f"format {name} reads its scales off the values"):
            quantize(torch.ones(3), parse_format(name), bounds=(torch.zeros(()), torch.ones(())))


def test_a_row_shorter_than_a_block_is_a_block_of_its_own() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(5))
    for name in ("int8:g999999", "mxfp4", "int4:g64:asym", "nvfp4"):
        fmt = parse_format(name)
        assert torch.equal(quantize(x, fmt), quantize(torch.nn.functional.pad(x, (0, 61)), fmt)[:, :3])


def test_values_beyond_fp32_and_formats_beyond_the_dtype_stay_finite() -> None:
    for name in ALL:
        fmt = parse_format(name)
        if fmt.grouping != "none":
            wide = torch.tensor([1e300, -1e300, 1.0, 0.0], dtype=torch.float64)
            assert bool(quantize(wide, fmt, channel_dim=-1).isfinite().all()), name
    half = torch.tensor([65504.0, -65504.0, math.inf], dtype=torch.float16)
    assert quantize(half, parse_format("bf16")).tolist() == [65504.0, -65504.0, math.inf]


# Properties ---------------------------------------------------------------------------------------------------------

rows = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=70).map(lambda v: torch.tensor(v, dtype=torch.float32))
some = st.sampled_from(ALL).map(parse_format)


@settings(max_examples=200, deadline=None)
@given(rows, some)
def test_quantising_twice_changes_nothing_more(x: torch.Tensor, fmt: Format) -> None:
    once = quantize(x, fmt, channel_dim=-1)
    twice = quantize(once, fmt, channel_dim=-1)
    if fmt.scale in ("none", "e8m0"):
        assert torch.equal(twice, once)
    else:  # a scale that is no power of two is rounded, and so read off again with an error of an ulp or two
        torch.testing.assert_close(twice, once, rtol=4 * 2.0**-23, atol=1e-37)


@settings(max_examples=200, deadline=None)
@given(rows, some)
def test_the_order_and_the_signs_of_a_group_are_kept(x: torch.Tensor, fmt: Format) -> None:
    found = quantize(x, fmt, channel_dim=-1)
    width = {"block": fmt.block, "channel": 1}.get(fmt.grouping, len(x))
    for start in range(0, len(x), width):
        order = x[start : start + width].argsort()
        assert bool((found[start : start + width][order].diff() >= 0).all())
    if not (isinstance(fmt.element, F.IntElement) and fmt.element.zero_point):
        assert torch.equal(quantize(-x, fmt, channel_dim=-1), -found)


@settings(max_examples=200, deadline=None)
@given(rows, some, st.integers(-20, 20))
def test_a_power_of_two_passes_through(x: torch.Tensor, fmt: Format, exponent: int) -> None:
    if fmt.name in ("fp16", "fp8_e4m3:none"):
        exponent = 0  # they have no scale, and few exponents
    x = torch.where(x.abs() < 1e-20, 0.0, x)  # no subnormal numbers on either side
    factor = 2.0**exponent
    assert torch.equal(quantize(x * factor, fmt, channel_dim=-1), quantize(x, fmt, channel_dim=-1) * factor)


# Sizes, names, misuse -----------------------------------------------------------------------------------------------


def test_effective_bits() -> None:
    expected = {
        "mxfp4": 4.25, "nvfp4": 4.5, "mxfp8_e4m3": 8.25, "mxfp6_e2m3": 6.25, "mxint8": 8.25, "int4:g32": 4.5, "bf16": 16.0,
        "tf32": 19.0, "int4:g32:fp32": 5.0, "fp8_e4m3:g128": 8.25,
    }  # fmt: skip
    assert {name: parse_format(name).bits for name in expected} == expected
    assert parse_format("int4:g32:asym").bits == 4 + 36 / 32
    assert parse_format("int8:row:bf16").stored_bits((3, 10)) == 240 + 3 * 16
    assert parse_format("int8:row").stored_bits((3, 10)) == 240 + 3 * 32
    assert parse_format("mxfp4").stored_bits((3, 33)) == 99 * 4 + 3 * 2 * 8
    assert parse_format("nvfp4").stored_bits((16,)) == 64 + 8 + 32
    assert parse_format("int8:channel").stored_bits((3, 10), channel_dim=1) == 240 + 10 * 32


@pytest.mark.parametrize(
    ("text", "name"),
    [("INT4", "int4:row"), ("int8:token", "int8:row"), (" mxfp4 ", "mxfp4"), ("int4:asym:g32", "int4:g32:asym"),
     ("int4:fp32:g32", "int4:g32:fp32"), ("int4:g32:bf16", "int4:g32"), ("int8:fp32", "int8:row"),
     ("fp8:tensor", "fp8_e4m3:tensor"), ("mxfp8", "mxfp8_e4m3")],
)
def test_names(text: str, name: str) -> None:
    assert parse_format(text).name == name
    assert parse_format(name) == parse_format(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mxfp5", "unknown format 'mxfp5'; known: .*did you mean"),
        ("int5", "unknown format 'int5'"),
        ("mxfp4:g16", "format mxfp4 has no options, found g16"),
        ("int4:g0", "'g0' is not one of tensor, channel, row, token, gN"),
        ("int4:none", "'none' is not one of"),
        ("fp8_e4m3:none:bf16", "no scale and one in bf16"),
        ("int4:bf16:fp32", "one of fp32, bf16"),
        ("int4:g32:row", "one of tensor, channel, row, token, gN, one of fp32, bf16, and for integers asym"),
        ("fp8_e4m3:asym", "for integers asym"),
        ("int4:colum", "'colum' is not one of"),
        ("", "unknown format ''"),
    ],
)
def test_misuse_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_format(text)


def test_gaussian_weights_have_the_known_error() -> None:
    """18.79 dB and a dead zone of 8.8 % for mxfp4, 20.44 dB and 6.8 % for nvfp4, by an independent implementation."""
    x = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0))
    for name, decibel, dead in (("mxfp4", 18.79, 0.088), ("nvfp4", 20.44, 0.068)):
        found = quantize(x, parse_format(name))
        noise = (found - x).double().square().sum()
        assert 10.0 * math.log10(float(x.double().square().sum() / noise)) == pytest.approx(decibel, abs=0.02)
        assert float((found == 0).double().mean()) == pytest.approx(dead, abs=0.001)
