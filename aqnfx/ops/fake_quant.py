"""``aqnfx::fake_quant``: a value as a number format stores it, with a choice of what happens to its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from aqnfx.numerics.formats import parse_format, quantize, unmasked
from aqnfx.ops.call import Call
from aqnfx.ops.switch import blend, is_off, placed


def fake_quant_reference(
    x: Tensor, level: Tensor | None, low: Tensor | None, high: Tensor | None, format: str, gradient: str = "",
    dim: int = -1, channel_dim: int = -1, masked: bool = False,
) -> Tensor:  # fmt: skip
    """Return ``x`` stored in ``format`` ("": as it is), in plain operations: what the operator means, for ``lower-ops``.

    ``level`` fp32 (2,), forward and backward, see :func:`~aqnfx.ops.switch.blend`. ``low`` and ``high``, scalars: the
    fixed range of a static scale, see :func:`~aqnfx.numerics.formats.quantize`, as for ``dim`` and ``channel_dim``.
    ``masked``: what a mask has put there (:func:`~aqnfx.numerics.formats.unmasked`) passes through and takes no part in any
    scale.
    """
    if not format:
        return x.clone()
    bounds = None if low is None or high is None else (low, high)
    kept = unmasked(x) if masked else None
    given = x if kept is None else torch.where(kept, x, 0.0)
    stored = quantize(given, parse_format(format), dim=dim, channel_dim=channel_dim, bounds=bounds)
    if kept is not None:
        stored = torch.where(kept, stored, x)
    found = blend(x, stored, level)
    return found if kept is None or level is None else torch.where(kept, found, x)


@torch.library.custom_op("aqnfx::fake_quant", mutates_args=())
def fake_quant(
    x: Tensor, level: Tensor | None, low: Tensor | None, high: Tensor | None, format: str, gradient: str = "",
    dim: int = -1, channel_dim: int = -1, masked: bool = False,
) -> Tensor:  # fmt: skip
    """Return ``x`` stored in ``format`` (see :func:`fake_quant_reference`), always a new tensor.

    The gradient goes straight through, stored in the format ``gradient`` where one is named; with fixed bounds it is 0
    where ``x`` lies outside of them. Controls may be on another device than ``x``.
    """
    if is_off(level, x):
        return x.clone()
    if low is not None and high is not None:
        low, high = low.to(x.device, non_blocking=True), high.to(x.device, non_blocking=True)
    return fake_quant_reference(x, placed(level, x), low, high, format, gradient, dim, channel_dim, masked)


@fake_quant.register_fake
def _(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, level, low, high, format, gradient, dim, channel_dim, masked = inputs
    bounded = low is not None and high is not None
    if bounded and not getattr(parse_format(format).element, "zero_point", False):
        high = torch.maximum(low.abs(), high.abs())  # a scale without zero point holds as much on both sides
        low = -high
    ctx.save_for_backward(x if bounded else None, low, high, None if level is None else level.clone())
    ctx.settings = (gradient, dim, channel_dim, masked)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, low, high, level = ctx.saved_tensors
    gradient, dim, channel_dim, masked = ctx.settings
    if x is not None:
        inside = (x >= low.to(x.device)) & (x <= high.to(x.device))
        if level is not None:
            inside = inside | (level[0] == 0).to(x.device)
        grad = torch.where(inside, grad, 0.0)
    if gradient:
        switch = None if level is None else torch.stack([level[1], level[1]])
        grad = torch.ops.aqnfx.fake_quant(grad, switch, None, None, gradient, "", dim, channel_dim, masked)
    return (grad, *(None,) * 8)


fake_quant.register_autograd(_backward, setup_context=_setup_context)


@dataclass(frozen=True, slots=True)
class FakeQuantCall(Call):
    """The arguments of :func:`fake_quant`."""

    target: ClassVar[Any] = torch.ops.aqnfx.fake_quant.default
    x: Node
    level: Node | None
    low: Node | None
    high: Node | None
    format: str
    gradient: str = ""
    dim: int = -1
    channel_dim: int = -1
    masked: bool = False
