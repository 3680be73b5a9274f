"""The operators that passes insert: ``aqnfx::noise`` and ``aqnfx::count``, registered with ``torch.library``."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aqnfx.numerics.noise import columns, draws, host_row_keys, mix32, normal_of, perturb, row_keys, with_keys


@functools.cache
def _compiled_perturb(variant: tuple[Any, ...]) -> Callable[..., Tensor]:
    """One Inductor kernel for (rows, channels) per variant (kind, dtype, …); shapes are dynamic.

    A copy of the code object for each: Dynamo counts recompilations per code object and gives up after a few, and a
    process that measures several models needs more than those few kernels.
    """
    from aqnfx.numerics.lowerings import register  # loads Inductor

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


@torch.library.custom_op("aqnfx::row_keys", mutates_args=())
def site_row_keys(shape: Sequence[int], batch: int, keys: Sequence[Tensor], run: Tensor, phase: int) -> Tensor:
    r"""Return the row keys of several sites of one ``shape``, int32 (K, \*shape[:-1]): for compilers, computed once.

    Inlined they would be computed anew for every element that they are broadcast over, which also takes a compiler
    minutes. See :func:`aqnfx.numerics.noise.row_keys`.
    """
    whole = tuple(shape)
    if run.device.type == "cpu":
        found = host_row_keys(whole, batch, torch.cat(list(keys)), run, phase)
    else:
        found = torch.stack([row_keys(whole, batch, key, run, phase) for key in keys])
    return found.reshape(len(keys), *(whole[:-1] if len(whole) > 1 else (1,)))


@site_row_keys.register_fake
def _(shape: Sequence[int], batch: int, keys: Sequence[Tensor], run: Tensor, phase: int) -> Tensor:
    rows = tuple(shape)[:-1] if len(shape) > 1 else (1,)
    return run.new_empty((len(keys), *rows))


@torch.library.custom_op("aqnfx::mix32", mutates_args=())
def mix(x: Tensor) -> Tensor:
    """Return :func:`aqnfx.numerics.noise.mix32`, for compilers as one operation."""
    return mix32(x)


@torch.library.custom_op("aqnfx::normal", mutates_args=())
def normal(bits: Tensor) -> Tensor:
    """Return :func:`aqnfx.numerics.noise.normal_of`, fp32, for compilers as one operation."""
    return normal_of(bits)


@mix.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@normal.register_fake
def _(bits: Tensor) -> Tensor:
    return torch.empty_like(bits, dtype=torch.float32)


MIX, NORMAL = torch.ops.aqnfx.mix32.default, torch.ops.aqnfx.normal.default


@torch.library.custom_op("aqnfx::count", mutates_args=("hits",))
def count(level: Tensor, hits: Tensor) -> None:
    """Add 1 to ``hits`` (int64, (1,)) where the forward level is not 0: the injection counter of a site."""
    hits.add_((level[0] != 0).to(hits.dtype))


@count.register_fake
def _(level: Tensor, hits: Tensor) -> None:
    return None


def count_reference(level: Tensor, hits: Tensor) -> Tensor:
    """What ``aqnfx::count`` means in plain operations; returns the updated ``hits``."""
    return hits.add_((level[0] != 0).to(hits.dtype))
