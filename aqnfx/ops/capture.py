"""``aqnfx::capture``: streaming statistics of a value, none of which is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from aqnfx.errors import InputError
from aqnfx.numerics.perturbations import declared_change
from aqnfx.ops.call import Call

# Rows of the buffer ``channels``.
MAGNITUDE, SQUARE, LARGEST, ZEROS, SMALLEST = range(5)
# Entries of the buffer ``totals``.
COUNT, NOISE = range(2)

_CHUNK = 1 << 22  # elements that are held in fp64 at a time


def new_buffers(width: int) -> tuple[Tensor, Tensor]:
    """Return buffers that have counted nothing: ``channels`` fp64 (5, ``width``) and ``totals`` fp64 (2,)."""
    channels, totals = torch.zeros(5, width, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    clear(channels, totals)
    return channels, totals


def clear(channels: Tensor, totals: Tensor) -> None:
    """Set the buffers, in place, to what they are before anything is counted."""
    channels.zero_()
    channels[SMALLEST] = math.inf
    totals.zero_()


def accumulate(
    y: Tensor, mask: Tensor | None, channels: Tensor, totals: Tensor, perturbation: str, channel_dim: int = -1, dim: int = -1
) -> None:
    """Add what ``y`` holds to ``channels`` and ``totals``, in place.

    ``y`` of any float dtype is read as (rows, C), with C the width of ``channels``: the size of ``channel_dim``, or 1
    for a value without channels of fixed number. ``channels`` fp64 (5, C): Σ|y|, Σy², max |y|, number of exact zeros,
    min non-zero |y| (+inf before there is one). ``totals`` fp64 (2,): number of rows, Σδ² of the declared
    ``perturbation`` (none for an empty name), of which ``dim`` is the dimension of a format's rows and blocks. ``mask``
    (B, S), bool or number: only positions with a mask that is not 0 count; ``y`` then is (B, S, …) or (B·S, …), else
    :class:`InputError`.

    Values that are not finite are not counted out: at a position that counts they make the sums inf or NaN, for whoever
    reads the buffers to refuse. At masked positions they leave no trace. δ alone may overflow, then Σδ² is inf or NaN.
    """
    if y.numel() == 0:
        return
    width = channels.shape[1]
    y = y.detach()

    def table(values: Tensor) -> Tensor:
        return (values.movedim(channel_dim, -1) if width > 1 and values.dim() else values).reshape(-1, width)

    rows, there = table(y), channels.device
    dropped = None if mask is None else dropped_rows(mask, y, len(rows))
    # Of the whole value at once: a perturbation may depend on more than one element.
    delta = table(declared_change(perturbation)(y, dim, channel_dim)) if perturbation else None
    step = max(1, _CHUNK // width)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        magnitude = rows[part].double().abs()
        if dropped is not None:
            magnitude.masked_fill_(dropped[part], 0.0)
        channels[MAGNITUDE] += magnitude.sum(0).to(there)
        channels[SQUARE] += magnitude.square().sum(0).to(there)
        channels[LARGEST] = torch.maximum(channels[LARGEST], magnitude.amax(0).to(there))
        zero = magnitude == 0
        channels[ZEROS] += zero.sum(0).to(there)
        smallest = magnitude.masked_fill_(zero, math.inf).amin(0)
        channels[SMALLEST] = torch.minimum(channels[SMALLEST], smallest.to(there))
        if delta is not None:
            square = delta[part].double().square()
            totals[NOISE] += (square if dropped is None else square.masked_fill_(dropped[part], 0.0)).sum().to(there)
    totals[COUNT] += len(rows)
    if dropped is not None:  # masked rows were counted as zeros; no reading of the mask on the host
        gone = dropped.sum().to(there)
        totals[COUNT] -= gone
        channels[ZEROS] -= gone


def dropped_rows(mask: Tensor, y: Tensor, rows: int) -> Tensor:
    """Return which of the rows do not count, bool (rows, 1)."""
    if y.shape[:2] != mask.shape and y.shape[:1] != (mask.numel(),):
        raise InputError(
            f"aqnfx::capture: a mask of shape {list(mask.shape)} was given for a value of shape {list(y.shape)}; the "
            "value must begin with these sizes or with their product, or the mask be None"
        )
    return (mask.to(y.device) == 0).reshape(-1).repeat_interleave(rows // mask.numel()).unsqueeze(1)


@torch.library.custom_op("aqnfx::capture", mutates_args=("channels", "totals"))
def capture(
    y: Tensor, mask: Tensor | None, channels: Tensor, totals: Tensor, perturbation: str, channel_dim: int = -1, dim: int = -1
) -> None:
    """See :func:`accumulate`; like ``aqnfx::count`` it has no output, and takes no part in autograd.

    Mask and accumulators may be on another device than ``y``.
    """
    accumulate(y, mask, channels, totals, perturbation, channel_dim, dim)


@capture.register_fake
def _(
    y: Tensor, mask: Tensor | None, channels: Tensor, totals: Tensor, perturbation: str, channel_dim: int = -1, dim: int = -1
) -> Any:
    return None


@dataclass(frozen=True, slots=True)
class CaptureCall(Call):
    """The arguments of :func:`capture`."""

    target: ClassVar[Any] = torch.ops.aqnfx.capture.default
    y: Node
    mask: Node | None
    channels: Node
    totals: Node
    perturbation: str
    channel_dim: int = -1
    dim: int = -1
