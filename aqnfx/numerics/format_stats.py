"""What a number format does to values, and what the values are like, in sums that add up over chunks of any size.

Sums are taken in fp64. Those of a format are one tensor that may be a buffer of a graph as well: ``sums += error_sums(…)``
for every chunk, then :func:`error_record`.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from aqnfx.numerics.formats import Format, quantize_group

NONZERO, SIGNAL, NOISE, DEAD_NOISE, RELATIVE, DEAD, BEYOND = range(7)
"""Entries of the sums of a format: see :func:`error_sums` and :func:`format_sums`."""
ERROR_SUMS = 7

NO_ERROR, NO_SIGNAL, OVERFLOW = "no error", "all values are zero", "values become infinite"
"""Why a record has no SQNR: nothing was changed, there was nothing to change, or the error is infinite."""

# A scale in fp32 is itself rounded, which moves the largest value of a group by an ulp or two: no saturation.
_MARGIN = 1.0 + 2.0**-20
_WORTH_COMPILED = 1 << 16  # elements of a chunk; below, the call costs more than the arithmetic

Bounds = tuple[Tensor, Tensor]


def error_sums(x: Tensor, q: Tensor) -> Tensor:
    """Return fp64 (6,) over all values of ``x`` and ``q``, what a format stores for them, fp32; sums of chunks add up.

    NONZERO: number of x ≠ 0; SIGNAL: Σx²; NOISE: Σ(q−x)²; DEAD_NOISE: that part of it where q = 0; RELATIVE: Σ|q−x|/|x| over
    x ≠ 0; DEAD: number of x ≠ 0 with q = 0, where zeros are stored as zeros. q−x is taken in fp32, which is exact for
    values that are close and correct to 1 part in 2^24 for others.
    """
    x = x.to(torch.float32)
    nonzero, lost = x != 0.0, q == 0.0
    change = q - x
    wide, delta = x.double(), change.double()
    dead = torch.where(lost, change, 0.0).double()
    relative = (change / torch.where(nonzero, x, 1.0)).abs().double()
    parts = (
        nonzero.sum(), (wide * wide).sum(), (delta * delta).sum(), (dead * dead).sum(), relative.sum(),
        lost.sum() - (x == 0.0).sum(),
    )  # fmt: skip
    return torch.stack([part.double() for part in parts])


def format_sums(x: Tensor, fmt: Format, bounds: Bounds | None = None, *, compiled: bool = False) -> Tensor:
    """Return fp64 (7,), :func:`error_sums` and BEYOND of ``x`` (rows, width), of any float dtype, stored in ``fmt``.

    BEYOND: the number of values outside of the range that the scale of their group holds (by more than 1 part in 2^20,
    which is the rounding of an fp32 scale). Rows and blocks run along the width, so that chunks of whole rows add up to
    the whole tensor; a format with a scale of the whole tensor (``fmt.static``) needs its ``bounds``, see
    :func:`~aqnfx.numerics.formats.quantize`. ``compiled`` does it in two Inductor kernels, of which the first is the
    format's own: counts are the same, sums agree to about 1e-11.
    """
    groups = _groups(x, fmt)
    varying = (0, 1) if fmt.grouping in ("row", "channel") else (0,)  # a block stays as wide as it is
    kernel = _kernel(_store, fmt.name) if compiled and _worth_compiling(groups, *varying) else _store
    q, beyond = kernel(groups, fmt, bounds if fmt.static else None)
    flat, stored = groups.reshape(-1), q.reshape(-1)
    whole = compiled and _worth_compiling(flat, 0) and _worth_compiling(stored, 0)
    sums = (_kernel(error_sums, "all") if whole else error_sums)(flat, stored)
    return torch.cat([sums, beyond.double().reshape(1)])


def _store(x: Tensor, fmt: Format, bounds: Bounds | None) -> tuple[Tensor, Tensor]:
    """Return the stored values of groups, and how many are outside of their range.

    A kernel of its own: one for everything takes three times as long, because it hands masks from one loop to the next.
    """
    wide = x.to(torch.float32)
    stored = quantize_group(wide, fmt, bounds)
    return stored.values, ((wide > stored.high * _MARGIN) | (wide < stored.low * _MARGIN)).sum()


def _groups(x: Tensor, fmt: Format) -> Tensor:
    """Return ``x`` with a group per row. Zeros fill up a last block: they are no error, and no part of any share."""
    if fmt.grouping == "block":
        block = min(fmt.block, x.shape[1])  # a short row is a block of its own
        missing = -x.shape[1] % block
        return (pad(x, (0, missing)) if missing else x).reshape(-1, block)
    # A channel of rows is a row; where no group matters, one long row is what a compiler likes best.
    return x if fmt.grouping in ("row", "channel") else x.reshape(-1)


@functools.cache
def _kernel(function: Callable[..., Any], key: str) -> Callable[..., Any]:
    """Return ``function`` compiled, a kernel for each ``key``; a copy of the code for each, as Dynamo counts by code.

    Only the sizes that a caller marked vary. Left to itself, Dynamo makes the constants of a format variables once it has
    seen those of another, and Inductor then computes the mask of a rounded mantissa wrongly (torch 2.13).
    """
    assert isinstance(function, types.FunctionType)
    copy = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    return torch.compile(copy, fullgraph=True, dynamic=False)


def _worth_compiling(x: Tensor, *varying: int) -> bool:
    """Return whether a kernel is to run on ``x``; the sizes that vary between calls are then marked as such."""
    if x.numel() < _WORTH_COMPILED or any(x.shape[dim] < 2 for dim in varying):  # Dynamo takes a size of 1 as a constant
        return False
    for dim in varying:
        torch._dynamo.mark_dynamic(x, dim)
    return True


def error_record(sums: Tensor, count: int) -> dict[str, Any]:
    """Return the statistics of a format over ``count`` values from their summed :func:`error_sums`.

    ``sqnr_db``: 10·log10(Σx² / Σ(q−x)²), None with the ``reason`` where that is no number. ``dead_zone``: share of the
    values that become zero, of those that are not zero before: zeros do not count. ``saturation``: share of all values
    whose magnitude is cut because it exceeds |q|, the largest that the scale of their group can hold: what the power of
    two of an MX scale or a rounded scale cuts off, and without a scale what is beyond the format (bf16, fp16 and tf32
    make that infinite, the others saturate). ``relative_error``: mean of |q−x|/|x| over all values that are not zero,
    those in the dead zone included, which count exactly 1 (the convention by which Gaussian values of variance 1 have
    0.21 in mxfp4 and 0.18 in nvfp4). ``dead_noise``: the share of Σ(q−x)² that is lost in the dead zone. None where
    there is nothing to divide by.
    """
    values = [float(value) for value in sums]
    nonzero, signal, noise = values[NONZERO], values[SIGNAL], values[NOISE]
    reason = NO_SIGNAL if signal == 0.0 else NO_ERROR if noise == 0.0 else OVERFLOW if not math.isfinite(noise) else None
    record: dict[str, Any] = {
        "sqnr_db": None if reason else 10.0 * math.log10(signal / noise),
        "dead_zone": values[DEAD] / nonzero if nonzero else None,
        "saturation": values[BEYOND] / count if count else None,
        "relative_error": values[RELATIVE] / nonzero if nonzero and math.isfinite(values[RELATIVE]) else None,
        "dead_noise": values[DEAD_NOISE] / noise if noise and math.isfinite(noise) else None,
    }
    return record | ({"reason": reason} if reason else {})


def value_sums(x: Tensor, pivot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σy, Σy², Σy³, Σy⁴, Σx² as fp64 (5,), max |x|, and Σ|x| per row as fp64 (rows,), with y = x − ``pivot``.

    ``x`` (rows, width) of any float dtype. NaN in ``x`` makes the maximum NaN.
    """
    wide = x.double()
    y = wide - pivot
    square, magnitude = y * y, wide.abs()
    parts = (y.sum(), square.sum(), (square * y).sum(), (square * square).sum(), (wide * wide).sum())
    return torch.stack(parts), magnitude.amax(), magnitude.sum(1)


def kurtosis(means: Sequence[float], *, least: float) -> float | None:
    """Return fourth central moment / variance², 3 for a normal distribution, from the means of x to x⁴.

    None for a variance of ``least`` or less: what is left then is rounding.
    """
    one, two, three, four = means
    variance = two - one * one
    fourth = four - 4.0 * one * three + 6.0 * one * one * two - 3.0 * one**4
    return fourth / variance**2 if variance > least else None


def outlier_ratio(magnitudes: np.ndarray[Any, np.dtype[np.float64]]) -> float | None:
    """Return the largest of some magnitudes / their median; None where the median is 0."""
    median = float(np.median(magnitudes))
    return float(magnitudes.max()) / median if median > 0.0 else None


class ValueStatistics:
    """What the values of a tensor of ``rows`` rows are like, whatever format they are stored in; added by whole rows."""

    def __init__(self, rows: int) -> None:
        self.count = 0
        self.largest = 0.0
        self._sums = torch.zeros(5, dtype=torch.float64)
        # In one piece from the start: small blocks that stay, between large ones that go, would tear up the heap.
        self._means = torch.empty(rows, dtype=torch.float64)
        self._filled = 0
        self._pivot: Tensor | None = None

    def add(self, x: Tensor, *, compiled: bool = False) -> None:
        """Add a chunk (rows, width) of any float dtype; ``largest`` is NaN or infinite when a value of it is."""
        if self._pivot is None:
            # Of the first row, whatever the chunks: with it, moments of values far from zero keep their digits.
            first = x[0].double().mean()
            self._pivot = torch.where(first.isfinite(), first, 0.0)
        kernel = _kernel(value_sums, "values") if compiled and _worth_compiling(x, 0, 1) else value_sums
        sums, largest, rows = kernel(x, self._pivot)
        self._sums += sums
        self._means[self._filled : self._filled + x.shape[0]] = rows / x.shape[1]
        self._filled += x.shape[0]
        self.count += x.numel()
        # max() of Python would drop a NaN that comes second.
        self.largest = float(np.maximum(self.largest, float(largest)))

    def record(self) -> dict[str, Any]:
        """Return ``elements``, ``max`` (largest magnitude), ``rms``, ``kurtosis`` and ``outlier_ratio``.

        ``kurtosis`` is None where all values are equal; ``outlier_ratio`` is that of the mean magnitudes of rows (output
        channels).
        """
        n = self.count
        *means, square = (float(value) / n for value in self._sums)
        return {
            "elements": n,
            "max": self.largest,
            "rms": math.sqrt(square),
            # fp32 resolves no spread below 1e-8 of the values: what is left then is rounding.
            "kurtosis": kurtosis(means, least=1e-18 * square),
            "outlier_ratio": outlier_ratio(self._means[: self._filled].numpy()),
        }
