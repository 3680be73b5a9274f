"""``aqnfx::noise``: a value with controlled noise, and its gradient on the way back."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from aqnfx.numerics.noise import columns, draws, host_row_keys, noise_reference, perturb, row_keys, with_keys
from aqnfx.ops.call import Call
from aqnfx.ops.mix32 import MIX
from aqnfx.ops.normal import NORMAL


@functools.cache
def _compiled_perturb(variant: tuple[Any, ...]) -> Callable[..., Tensor]:
    """One Inductor kernel for (rows, channels) per variant (kind, dtype, …); shapes are dynamic.

    A copy of the code object for each: Dynamo counts recompilations per code object and gives up after a few, and a
    process that measures several models needs more than those few kernels.
    """
    from aqnfx.ops.inductor import register  # loads Inductor

    register()
    copy = types.FunctionType(_perturb_rows.__code__.replace(), _perturb_rows.__globals__, "perturb_rows")
    return torch.compile(copy, dynamic=True, fullgraph=True)


def _perturb_rows(
    x: Tensor, level: Tensor, keys: Tensor, cols: Tensor, channels: Tensor | None, kind: str, keep_zeros: bool
) -> Tensor:
    return perturb(x, level, draws(keys, cols, kind, MIX, NORMAL), channels, kind, keep_zeros)


def _rows_first(x: Tensor) -> list[int] | None:
    """Return the permutation of the leading dimensions that makes ``x`` contiguous, or None where there is none."""
    if x.dim() < 2 or x.stride(-1) != 1:
        return None
    strides = x.stride()
    order = sorted(range(x.dim() - 1), key=lambda d: (-strides[d], d))
    return [*order, x.dim() - 1] if x.permute([*order, x.dim() - 1]).is_contiguous() else None


@torch.library.custom_op("aqnfx::noise", mutates_args=())
def noise(
    x: Tensor, level: Tensor, key: Tensor, run: Tensor, channels: Tensor | None, cols: Tensor | None,
    batch: int, kind: str, channel_dim: int = -1, phase: int = 0, keep_zeros: bool = False, compiled: bool = False,
) -> Tensor:  # fmt: skip
    """Return ``x`` with noise (see :func:`aqnfx.numerics.noise.noise_reference`), always a new tensor.

    ``compiled`` runs the arithmetic in one Inductor kernel where the layout allows; the numbers agree to 1 ulp. On the
    CPU a level of 0 costs a copy. The controls may be on another device than ``x``. To autograd the forward noise is an
    additive constant; the backward noise (``level[1]``) perturbs the gradient on its way back.
    """
    host = key.device.type == "cpu"
    if x.numel() == 0 or (host and float(level[phase]) == 0.0):
        return x.clone()
    if key.device != x.device:
        level, key, run = (one.to(x.device, non_blocking=True) for one in (level, key, run))
        channels, cols = (None if one is None else one.to(x.device, non_blocking=True) for one in (channels, cols))
        host = key.device.type == "cpu"
    keys = (host_row_keys if host else row_keys)(tuple(x.shape), batch, key, run, phase)
    last = channels is None or channel_dim % x.dim() == x.dim() - 1
    order = _rows_first(x) if compiled and last else None
    if order is None:
        return with_keys(x, level[phase], keys, channels, cols, kind, channel_dim, keep_zeros)
    flat = x.detach().permute(order)  # Dynamo would compile again for a tensor that takes part in autograd
    keys = keys.permute(order[:-1]).reshape(-1, 1)
    if cols is None:
        cols = columns(x.shape[-1], x.device)
    kernel = _compiled_perturb((kind, keep_zeros, x.dtype, x.device, channels is None, torch.is_inference_mode_enabled()))
    result = kernel(flat.reshape(-1, x.shape[-1]), level[phase], keys, cols, channels, kind, keep_zeros)
    return result.reshape(flat.shape).permute(sorted(range(x.dim()), key=order.__getitem__))


@noise.register_fake
def _(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, level, key, run, channels, cols, batch, kind, channel_dim, phase, keep_zeros, compiled = inputs
    # Controls may be set anew between forward and backward: the backward uses those of its own forward.
    ctx.save_for_backward(level.clone(), key, run.clone(), None if channels is None else channels.clone(), cols)
    ctx.settings = (batch, kind, channel_dim, 1 - phase, keep_zeros, compiled)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    noised = torch.ops.aqnfx.noise(grad, *ctx.saved_tensors, *ctx.settings)
    return (noised, *(None,) * 11)


noise.register_autograd(_backward, setup_context=_setup_context)


def noise_plain(
    x: Tensor, level: Tensor, key: Tensor, run: Tensor, channels: Tensor | None, cols: Tensor | None,
    batch: int, kind: str, channel_dim: int = -1, phase: int = 0, keep_zeros: bool = False, compiled: bool = False,
) -> Tensor:  # fmt: skip
    """What ``aqnfx::noise`` means in plain operations; ``compiled`` says how and not what, so it is not used."""
    return noise_reference(x, level, key, run, channels, cols, batch, kind, channel_dim, phase, keep_zeros)


@dataclass(frozen=True, slots=True)
class NoiseCall(Call):
    """The arguments of :func:`noise`; see :func:`aqnfx.numerics.noise.noise_reference`."""

    target: ClassVar[Any] = torch.ops.aqnfx.noise.default
    x: Node
    level: Node
    key: Node
    run: Node
    channels: Node | None
    cols: Node | None
    batch: Any
    kind: str
    channel_dim: int = -1
    phase: int = 0
    keep_zeros: bool = False
    compiled: bool = False
