"""``aqnfx::scan``: what number formats do to a value as it comes, and its range, in accumulators; nothing is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from aqnfx.numerics.format_stats import ERROR_SUMS, format_sums, kurtosis, outlier_ratio
from aqnfx.numerics.formats import parse_format
from aqnfx.ops.call import Call
from aqnfx.ops.capture import dropped_rows

COUNT = 0
"""Entry of the buffer ``moments`` that counts values; Σx to Σx⁴ follow."""


def new_buffers(formats: int, channels: int) -> dict[str, Tensor]:
    """Return accumulators that have counted nothing, for a number of ``formats`` and of ``channels``, fp64.

    ``sums`` (formats, 7), see :func:`~aqnfx.numerics.format_stats.format_sums`; ``moments`` (5,); ``extremes`` (2,), the
    least and the largest value; ``magnitude`` (channels,), Σ|x| of each.
    """
    return {
        "sums": torch.zeros(formats, ERROR_SUMS, dtype=torch.float64),
        "moments": torch.zeros(5, dtype=torch.float64),
        "extremes": torch.tensor([math.inf, -math.inf], dtype=torch.float64),
        "magnitude": torch.zeros(channels, dtype=torch.float64),
    }


def accumulate(
    x: Tensor, mask: Tensor | None, sums: Tensor, moments: Tensor, extremes: Tensor, magnitude: Tensor,
    formats: list[str], dim: int, channel_dim: int,
) -> None:  # fmt: skip
    """Add what ``x`` holds, and what each of ``formats`` would make of it, to the accumulators, in place.

    ``dim`` and ``channel_dim`` are those of :func:`~aqnfx.numerics.formats.quantize`. ``mask`` (B, S): positions where it is
    0 do not count, and take no part in a scale; ``x`` then is (B, S, …) or (B·S, …) with its channels last.
    """
    x = x.detach()
    rows = (x.movedim(channel_dim, -1) if x.dim() else x).reshape(-1, magnitude.shape[0])
    along = (x.movedim(dim, -1) if x.dim() else x).reshape(-1, x.shape[dim] if x.dim() else 1)
    if mask is not None:
        rows = along = rows[~dropped_rows(mask, x, len(rows)).squeeze(1)]
    if rows.numel() == 0:
        return
    there, wide = sums.device, rows.double()
    square = wide * wide
    parts = (wide.sum(), square.sum(), (square * wide).sum(), (square * square).sum())
    moments += torch.stack((wide.new_tensor(rows.numel()), *parts)).to(there)
    magnitude += wide.abs().sum(0).to(there)
    low, high = rows.amin(), rows.amax()
    extremes[0] = torch.minimum(extremes[0], low.double().to(there))
    extremes[1] = torch.maximum(extremes[1], high.double().to(there))
    for number, name in enumerate(formats):
        fmt = parse_format(name)
        table = rows.t() if fmt.grouping == "channel" else along
        sums[number] += format_sums(table, fmt, (low, high) if fmt.static else None).to(there)


@torch.library.custom_op("aqnfx::scan", mutates_args=("sums", "moments", "extremes", "magnitude"))
def scan(
    x: Tensor, mask: Tensor | None, sums: Tensor, moments: Tensor, extremes: Tensor, magnitude: Tensor,
    formats: str, dim: int = -1, channel_dim: int = -1,
) -> None:  # fmt: skip
    """See :func:`accumulate`; ``formats`` are joined by ``|``. Like ``aqnfx::capture`` it has no output."""
    accumulate(x, mask, sums, moments, extremes, magnitude, formats.split("|"), dim, channel_dim)


@scan.register_fake
def _(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    return None


@dataclass(frozen=True, slots=True)
class ScanCall(Call):
    """The arguments of :func:`scan`."""

    target: ClassVar[Any] = torch.ops.aqnfx.scan.default
    x: Node
    mask: Node | None
    sums: Node
    moments: Node
    extremes: Node
    magnitude: Node
    formats: str
    dim: int = -1
    channel_dim: int = -1

    @property
    def accumulators(self) -> dict[str, Node]:
        """The accumulators by their names, as :func:`new_buffers` makes them."""
        return {"sums": self.sums, "moments": self.moments, "extremes": self.extremes, "magnitude": self.magnitude}


def facts(moments: Tensor, extremes: Tensor, magnitude: Tensor) -> dict[str, Any]:
    """Return ``elements``, ``low``, ``high``, ``max`` (magnitude), ``rms``, ``kurtosis`` and ``outlier_ratio`` of what was added.

    See :func:`~aqnfx.numerics.format_stats.kurtosis` and :func:`~aqnfx.numerics.format_stats.outlier_ratio` of the mean
    magnitudes of channels. None where there is nothing to divide by.
    """
    count = float(moments[COUNT])
    means = [float(value) / count for value in moments[1:]]
    low, high = (float(value) for value in extremes)
    return {
        "elements": int(count), "low": low, "high": high, "max": max(-low, high), "rms": math.sqrt(means[1]),
        "kurtosis": kurtosis(means, least=1e-7 * means[1]), "outlier_ratio": outlier_ratio(magnitude.numpy()),
    }  # fmt: skip
