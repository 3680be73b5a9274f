"""Statistics of formats: known figures, the definitions by a second computation, chunks, edges, and compiled kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kurtosis

from aqnfx.numerics.format_stats import (
    BEYOND,
    DEAD,
    ERROR_SUMS,
    NO_ERROR,
    NO_SIGNAL,
    NONZERO,
    OVERFLOW,
    ValueStatistics,
    error_record,
    format_sums,
)
from aqnfx.numerics.formats import KNOWN, parse_format, quantize
from aqnfx.probes.compile_choice import compiler_problem

ALL = (*KNOWN, "int4:g32", "int8:g48", "int4:g32:asym", "int8:tensor", "int4:tensor:asym", "int4:channel", "fp8_e4m3:none")
COUNTS = [NONZERO, DEAD, BEYOND]


def gaussian(rows: int, width: int, std: float = 1.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * std


def spread_out(rows: int, width: int) -> torch.Tensor:
    """Values with outliers, zeros of both signs, tiny ones, a row of zeros and one of subnormal numbers."""
    x = gaussian(rows, width, seed=1) * gaussian(rows, 1, seed=2).exp() + 0.1
    x[torch.rand(rows, width, generator=torch.Generator().manual_seed(3)) < 0.1] = 0.0
    x[0, :7] *= 1000.0
    x[1] = 0.0
    x[2] *= 1e-41
    x[3, ::3] = -0.0
    return x


def bounds_of(x: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    return (x.amin(), x.amax()) if parse_format(name).static else None


def sums(x: torch.Tensor, name: str, rows: int | None = None, *, compiled: bool = False) -> torch.Tensor:
    """Return the sums of ``x``, added up over chunks of ``rows`` rows."""
    fmt, bounds = parse_format(name), bounds_of(x, name)
    total = torch.zeros(ERROR_SUMS, dtype=torch.float64)
    for chunk in x.split(rows or x.shape[0]):
        total += format_sums(chunk, fmt, bounds, compiled=compiled)
    return total


def record(x: torch.Tensor, name: str) -> dict[str, Any]:
    return error_record(sums(x, name), x.numel())


# Published figures for standard normal values: SQNR in dB, dead zone, mean relative error.
@pytest.mark.parametrize(("name", "sqnr", "dead", "relative"), [("mxfp4", 18.79, 0.088, 0.21), ("nvfp4", 20.44, 0.068, 0.18)])
def test_the_known_figures_of_gaussian_values(name: str, sqnr: float, dead: float, relative: float) -> None:
    found = record(gaussian(1024, 2048), name)
    assert found["sqnr_db"] == pytest.approx(sqnr, abs=0.015)
    assert found["dead_zone"] == pytest.approx(dead, abs=0.0006)
    assert found["relative_error"] == pytest.approx(relative, abs=0.002)
    assert "reason" not in found


def test_int8_and_bf16_of_gaussian_values() -> None:
    # A row of 2048 normal values reaches about 3.5 σ: a step of that / 127, whose rounding error is uniform.
    x = gaussian(512, 2048)
    steps = x.abs().amax(1) / 127.0
    expected = 10.0 * math.log10(float(x.double().square().mean() / (steps.double().square().mean() / 12.0)))
    assert record(x, "int8")["sqnr_db"] == pytest.approx(expected, abs=0.02)
    assert record(x, "bf16")["relative_error"] == pytest.approx(2.0**-9 / math.log(2) / 2, rel=0.02)  # log-uniform mantissas


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("width", [96, 77])
def test_records_are_what_their_definitions_say(name: str, width: int) -> None:
    x = spread_out(40, width)
    fmt = parse_format(name)
    q = quantize(x, fmt, bounds=bounds_of(x, name)).double().numpy()
    v = x.double().numpy()
    nonzero, error = v != 0.0, q - v
    found = record(x, name)
    assert found["sqnr_db"] == pytest.approx(10.0 * np.log10((v**2).sum() / (error**2).sum()), rel=1e-7)
    assert found["dead_zone"] == np.mean(q[nonzero] == 0.0)
    assert found["relative_error"] == pytest.approx(np.mean(np.abs(error[nonzero]) / np.abs(v[nonzero])), rel=1e-6)
    dead = nonzero & (q == 0.0)
    assert found["dead_noise"] == pytest.approx((error[dead] ** 2).sum() / (error**2).sum(), rel=1e-6)
    # What exceeds the range of its group is stored as the end of that range: nothing that is stored is larger.
    beyond = round(found["saturation"] * x.numel())
    assert beyond <= np.sum(np.abs(v) > np.abs(q))


@pytest.mark.parametrize(
    ("name", "values", "beyond"),
    [
        ("mxfp4", [7.9, 6.1, 6.0, -6.5, 1.0, 0.0], 3),  # a scale of 1: 6 is the largest
        ("mxfp4", [8.0, 6.1, 1.0], 0),  # a scale of 2
        ("mxint8", [1.99, 1.0], 1),  # 127/64 = 1.984 is the largest
        ("nvfp4", [6.0, 5.9, 0.1] + [0.0] * 13 + [2.8] + [0.0] * 15, 1),  # the scale 209/448 becomes 208/448
        ("int4:g32", [1.7, -1.7, 0.1], 0),  # 1.7/7 in bf16 is rounded up
        ("int4:g32", [1.3, -1.3, 0.1], 2),  # 1.3/7 in bf16 is rounded down
        ("int4:g32:fp32", [1.3, -1.3, 0.1], 0),  # an fp32 scale is rounded too; that is no saturation
        ("int4", [1.3, -1.3, 0.1], 0),
        ("fp8_e4m3:none", [448.0, 449.0, -1000.0, 1.0], 2),
        ("bf16", [3.4e38, 1.0], 1),
        ("fp16", [65504.0, 65519.0, 7e4, -1e9], 3),
    ],
)
def test_saturation_counts_what_exceeds_the_range_of_its_scale(name: str, values: list[float], beyond: int) -> None:
    x = torch.tensor([values])
    assert record(x, name)["saturation"] == beyond / len(values)


def test_the_rounding_of_an_fp32_scale_is_no_saturation() -> None:
    x = gaussian(2000, 16)
    largest = x.abs().amax(1)
    assert bool((largest / 127.0 * 127.0 < largest).any())  # by an ulp
    assert record(x, "int8")["saturation"] == 0.0
    assert record(x, "int8:row:bf16")["saturation"] > 0.01


def test_a_zero_point_that_is_rounded_cuts_off_one_end() -> None:
    x = torch.tensor([[-0.4, 2.7, 1.0, 0.0]])  # a step of 3.1/15, so the zero point 1.94 becomes 2: the largest is 13 steps
    assert record(x, "int4:asym")["saturation"] == 0.25
    assert record(torch.tensor([[0.0, 15.0, 3.0]]), "int4:asym")["saturation"] == 0.0


def test_a_block_whose_scale_vanishes_is_dead_and_beyond() -> None:
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16:] = 1.0, 1e-6  # 1e-6 / 6 is below half of the least fp8 scale
    found = record(x, "nvfp4")
    assert (found["dead_zone"], found["saturation"]) == (16 / 17, 0.5)


def test_what_cannot_be_divided_is_none_with_a_reason() -> None:
    zeros = record(torch.zeros(4, 40), "mxfp4")
    assert zeros == {
        "sqnr_db": None, "dead_zone": None, "saturation": 0.0, "relative_error": None, "dead_noise": None,
        "reason": NO_SIGNAL,
    }  # fmt: skip
    exact = record(torch.ones(4, 40), "bf16")
    assert (exact["sqnr_db"], exact["relative_error"], exact["reason"]) == (None, 0.0, NO_ERROR)
    infinite = record(torch.tensor([[1.0, 1e5, 3.0]]), "fp16")
    assert (infinite["sqnr_db"], infinite["relative_error"], infinite["reason"]) == (None, None, OVERFLOW)
    assert infinite["saturation"] == 1 / 3
    assert record(torch.full((2, 32), 1e-30), "fp16")["dead_zone"] == 1.0


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("width", [1, 33, 96])
def test_chunks_of_rows_add_up_to_the_whole(name: str, width: int) -> None:
    x = spread_out(61, width)
    whole = sums(x, name)
    for rows in (1, 7, 60):
        parts = sums(x, name, rows)
        assert torch.equal(parts[COUNTS], whole[COUNTS])
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0.0)


def test_16_bit_values_are_read_as_they_are() -> None:
    x = gaussian(32, 64).bfloat16()
    assert torch.equal(sums(x, "mxfp4"), sums(x.float(), "mxfp4"))
    assert torch.equal(sums(gaussian(32, 64).half(), "nvfp4"), sums(gaussian(32, 64).half().float(), "nvfp4"))


@pytest.mark.parametrize("shift", [0.0, 1000.0, -1e-20])
@pytest.mark.parametrize("rows", [1, 9, 50])
def test_values_are_described_in_chunks(shift: float, rows: int) -> None:
    x = gaussian(50, 40, seed=4)
    x[3] *= 20.0
    x = x * (1e-21 if shift == -1e-20 else 1.0) + shift
    found = ValueStatistics(50)
    for chunk in x.split(rows):
        found.add(chunk)
    v = x.double().numpy()
    facts = found.record()
    assert facts["elements"] == 2000
    assert facts["max"] == np.abs(v).max()
    assert facts["rms"] == pytest.approx(np.sqrt((v**2).mean()), rel=1e-12)
    assert facts["kurtosis"] == pytest.approx(float(kurtosis(v, axis=None, fisher=False)), rel=1e-9)
    means = np.abs(v).mean(1)
    assert facts["outlier_ratio"] == pytest.approx(means.max() / np.median(means), rel=1e-12)


def test_values_without_spread_have_no_kurtosis_and_zeros_no_outliers() -> None:
    for value in (0.0, 0.1, -3e20):
        found = ValueStatistics(5)
        found.add(torch.full((5, 7), value))
        facts = found.record()
        assert facts["kurtosis"] is None
        assert (facts["outlier_ratio"] is None) == (value == 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 1, 3])
def test_values_that_are_not_finite_are_seen(bad: float, row: int) -> None:
    x = gaussian(4, 8)
    x[row, 3] = bad
    for chunks in (x.split(1), [x]):
        found = ValueStatistics(4)
        for chunk in chunks:
            found.add(chunk)
        assert not math.isfinite(found.largest)
        assert math.isnan(found.largest) == math.isnan(bad)


@pytest.mark.slow
def test_kernels_count_the_same_and_add_up_to_the_same() -> None:
    if compiler_problem("cpu"):
        pytest.skip("a C++ compiler is absent")
    # Several formats in one process: what Dynamo has seen of one must not reach the kernel of another.
    for name in ("mxfp4", "bf16", "nvfp4", "int8", "int4:g48:asym", "int8:tensor"):
        for width in (768, 1000):
            x = spread_out(300, width).bfloat16()
            plain, compiled = sums(x, name), sums(x, name, 150, compiled=True)
            assert torch.equal(plain[COUNTS], compiled[COUNTS]), name
            torch.testing.assert_close(compiled, plain, rtol=1e-9, atol=0.0, msg=name)
    plain_values, compiled_values = ValueStatistics(300), ValueStatistics(300)
    plain_values.add(x)
    for chunk in x.split(150):
        compiled_values.add(chunk, compiled=True)
    assert compiled_values.record() == pytest.approx(plain_values.record(), rel=1e-9)
