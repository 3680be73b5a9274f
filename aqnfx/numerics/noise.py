"""Counter-based noise: a pure function of (seed, site, step, sample row, coordinates), in plain int32 tensor operations.

Integers come first and are identical in eager, Inductor, CPU and CUDA; floats follow to 1 ulp. A sample's noise depends
on its own row number and coordinates only, so it is the same for any batch size, batch order offset and padding on the right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import StrEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class NoiseKind(StrEnum):
    """How noise of level ``l`` perturbs a value ``y``; ``z`` is standard normal.

    ``relative_gaussian``: y + l·|y|·z. ``rms_gaussian``: y + l·rms·z, with rms over the last dimension at the same
    position. ``absolute_gaussian``: y + l·z. ``uniform``: y + l·|y|·u, u uniform on (−√3, √3), so of unit variance.
    ``bias``: y + l·|y|, a systematic error. Values that are not finite, or whose noise would not be, pass through
    unchanged in every kind.
    """

    RELATIVE_GAUSSIAN = "relative_gaussian"
    RMS_GAUSSIAN = "rms_gaussian"
    ABSOLUTE_GAUSSIAN = "absolute_gaussian"
    UNIFORM = "uniform"
    BIAS = "bias"


def as_int32(value: int) -> int:
    """Return ``value`` modulo 2³² as a signed 32-bit integer."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


# Odd multipliers of the bias-tested 32-bit mixer "lowbias32" (C. Wellons, hash-prospector, 2018-2022, public domain);
# GOLDEN is 2**32 / golden ratio, whose multiples mod 2**32 are spread evenly, so that coordinates never collide before
# they are mixed.
MIX_1, MIX_2 = as_int32(0x7FEB352D), as_int32(0x846CA68B)
GOLDEN = as_int32(0x9E3779B1)
_PHASE_SALT = (0, as_int32(0xA511E9B3))  # forward, backward

# sin(pi/2 v) on [-1, 1]: odd least-squares polynomial, absolute error below 6e-9 (below fp32 rounding).
SIN = (1.5707963166, -0.6459637095, 0.0796896732, -0.0046737578, 0.0001514809)

# -2 log(1 + s) / s on [-1/3, 1/3]: least-squares polynomial at Chebyshev nodes, relative error below 2e-7.
LOG = (-1.9999996424, 0.9999998212, -0.6667583585, 0.5000750422, -0.3959351480, 0.3298024237, -0.3420164287, 0.3000823259)
TWO_THIRDS, EXPONENT = 0x3F2AAAAB, as_int32(0xFF800000)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32: torch's ``>>`` copies the sign, the mask clears the copies."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def mix32(x: Tensor) -> Tensor:
    """Return a bijective 32-bit hash of every element (int32 in, int32 out): xor-shift and multiply, two rounds."""
    x = x ^ _shift_right(x, 16)
    x = x * MIX_1
    x = x ^ _shift_right(x, 15)
    x = x * MIX_2
    return x ^ _shift_right(x, 16)


def columns(size: int, device: torch.device | str = "cpu", first: int = 0) -> Tensor:
    """Return the counters of ``size`` channels from ``first`` on, int32 (size,): multiples of the golden ratio modulo 2³²."""
    return _spread(torch.arange(size, device=device) + first)


def _spread(numbers: Tensor) -> Tensor:
    """Return whole numbers times the golden ratio modulo 2³², int32.

    In 64 bits, where it does not overflow: a C++ compiler takes an index whose 32-bit multiple would overflow for one that
    does not occur, and Inductor's loops then write past their ends. ``^ 0`` keeps Inductor from multiplying the index itself.
    """
    return ((numbers.to(torch.int64) ^ 0) * GOLDEN).to(torch.int32)


def row_keys(
    shape: tuple[int, ...], batch: int, key: Tensor, run: Tensor, phase: int, mix: Callable[[Tensor], Tensor] = mix32
) -> Tensor:
    """Return one 32-bit key per row (all dimensions but the last), int32 of ``shape[:-1]``, or (1,) for 0-d and 1-d.

    ``batch`` is the number of samples: where it divides ``shape[0]``, row ``r`` belongs to sample
    ``r // (shape[0] // batch)`` and the sample's number is that plus ``run[2]``; ``key`` int32 (1,) is the site's,
    ``run`` int32 (3,) holds seed, step and row offset. ``batch`` 0 says that the value belongs to no sample: the row
    offset does not count. ``phase`` is 0 forward, 1 backward. ``key`` (K, 1) gives the keys of K sites, in front of those of
    one. ``mix`` computes :func:`mix32`.
    """
    base = mix(key ^ mix(run[0:1] ^ mix(run[1:2] + (GOLDEN ^ _PHASE_SALT[phase]))))
    if len(shape) < 2:
        return base
    shared = isinstance(batch, int) and batch == 0
    inner = shape[0] if shared else shape[0] // batch
    rows = torch.arange(shape[0], dtype=torch.int32, device=key.device)
    sample = rows // inner
    keys = mix(mix((sample if shared else sample + run[2:3]) ^ base) + _spread(rows - sample * inner))
    for size in shape[1:-1]:
        keys = mix(keys.unsqueeze(-1) + columns(size, key.device, first=1))
    return keys


def host_row_keys(shape: tuple[int, ...], batch: int, key: Tensor, run: Tensor, phase: int) -> Tensor:
    """Return :func:`row_keys` for CPU tensors by NumPy: a fifth of the time, because calls dominate at this size.

    ``key`` may hold the keys of K sites that share a shape: int32 (K,) to (K, …) in front of the shape of one.
    """
    golden = np.uint32(GOLDEN & 0xFFFFFFFF)

    def mix(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
        x ^= x >> np.uint32(16)
        x *= np.uint32(MIX_1 & 0xFFFFFFFF)
        x ^= x >> np.uint32(15)
        x *= np.uint32(MIX_2 & 0xFFFFFFFF)
        x ^= x >> np.uint32(16)
        return x

    number: NDArray[np.uint32] = key.numpy().view(np.uint32)
    numbers: NDArray[np.uint32] = run.numpy().view(np.uint32)
    seed, step, offset = numbers[0:1], numbers[1:2], numbers[2:3]
    base = mix(number ^ mix(seed ^ mix(step + (golden ^ np.uint32(_PHASE_SALT[phase] & 0xFFFFFFFF)))))
    if len(shape) < 2:
        return torch.from_numpy(base.view(np.int32))
    per_sample = np.uint32(shape[0] // batch if batch else shape[0])
    sample, row = np.divmod(np.arange(shape[0], dtype=np.uint32), per_sample)
    if batch:
        sample += offset
    keys: NDArray[np.uint32] = mix(mix(sample ^ base[:, None]) + row.astype(np.uint32) * golden)
    for size in shape[1:-1]:
        keys = mix(keys[..., None] + np.arange(1, size + 1, dtype=np.uint32) * golden)
    return torch.from_numpy(keys.view(np.int32) if len(base) > 1 else keys[0].view(np.int32))


def hashes(keys: Tensor, cols: Tensor) -> Tensor:
    """Return one int32 hash per element, broadcasting row keys (…, 1) against column counters (C,)."""
    return mix32(cols ^ keys)


def _minus_two_log(u: Tensor) -> Tensor:
    """Return -2 log(u) of fp32 u in (0, 1): half the instructions of a logarithm that also knows 0, infinity and NaN.

    u = (1 + s)·2^k with 1 + s in [2/3, 4/3), so that both terms vanish together where u approaches 1.
    """
    bits = u.view(torch.int32)
    exponent = (bits - TWO_THIRDS) & EXPONENT  # k·2^23
    s = (bits - exponent).view(torch.float32) - 1.0
    series = LOG[7]
    for coefficient in LOG[6::-1]:
        series = series * s + coefficient  # type: ignore[assignment]  # float only before the first product
    return exponent.to(torch.float32) * (-2.0 * math.log(2.0) * 2.0**-23) + series * s


def standard_normal(keys: Tensor, cols: Tensor) -> Tensor:
    """Return standard normal fp32 values of the broadcast shape of row keys (…, 1) and column counters (C,)."""
    return normal_of(hashes(keys, cols))


def normal_of(bits: Tensor) -> Tensor:
    """Return a standard normal fp32 value for every int32 hash, by Box and Muller (1958).

    One hash serves both: 20 bits for the radius, so values reach ±5.4 (1 in 15 million lies beyond), and 12 for the
    angle, whose cosine is a polynomial. The mean over 4096 equally spaced angles differs from the integral by less than
    fp32 rounding, because the integrand is smooth and periodic.
    """
    radius = torch.sqrt(_minus_two_log((_shift_right(bits, 12).to(torch.float32) + 0.5) * 2.0**-20))
    fold = (bits & 0xFFF).to(torch.float32) * -(2.0**-11) + (1.0 - 2.0**-12)
    square = fold * fold
    cosine = SIN[4]
    for coefficient in SIN[3::-1]:
        cosine = cosine * square + coefficient  # type: ignore[assignment]  # float only before the first product
    return radius * (fold * cosine)


def draws(
    keys: Tensor, cols: Tensor, kind: str, mix: Callable[[Tensor], Tensor] = mix32,
    normal: Callable[[Tensor], Tensor] = normal_of,
) -> Tensor | None:  # fmt: skip
    """Return what a level is multiplied with for ``kind``, fp32 of unit variance, or None for a kind that draws nothing.

    ``keys`` (…, 1) and ``cols`` (C,) as :func:`hashes` takes them; ``mix`` computes :func:`mix32`, ``normal`` :func:`normal_of`.
    """
    if kind == NoiseKind.BIAS:
        return None
    bits = mix(cols ^ keys)
    return bits.to(torch.float32) * (math.sqrt(3.0) * 2.0**-31) if kind == NoiseKind.UNIFORM else normal(bits)


def draws_for(
    shape: Sequence[int], keys: Tensor, cols: Tensor | None, kind: str, mix: Callable[[Tensor], Tensor] = mix32,
    normal: Callable[[Tensor], Tensor] = normal_of,
) -> Tensor | None:  # fmt: skip
    """Return :func:`draws` for values of ``shape`` from their row keys, of one site or of K sites in front; see :func:`row_keys`.

    ``cols`` None: the counters of the last dimension are made here. The draws of a value without dimensions are (1,).
    """
    if len(shape) > 1:
        keys = keys.unsqueeze(-1)
    if cols is None:
        cols = columns(shape[-1] if shape else 1, keys.device)
    return draws(keys, cols, kind, mix, normal)


def perturb(
    x: Tensor, level: Tensor, drawn: Tensor | None, channels: Tensor | None, kind: str, keep_zeros: bool = False
) -> Tensor:
    """Return ``x`` with noise of ``kind`` and scalar tensor ``level``; ``drawn`` are :func:`draws` of the shape of ``x``.

    ``channels`` fp32 is a factor on the level that broadcasts against ``x``, 0 for channels without noise. Where the
    level is 0 and where ``x`` is not finite the result is ``x`` bit for bit, with ``keep_zeros`` also where ``x`` is 0.
    Arithmetic is in fp32 at least; the result has the dtype of ``x``.
    """
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    magnitude = wide.abs()
    if channels is not None:
        level = level * channels
    # The level multiplies first: |y|·z alone could overflow where y is a mask value near the largest float.
    if kind in (NoiseKind.RELATIVE_GAUSSIAN, NoiseKind.UNIFORM, NoiseKind.BIAS):
        scale = level * magnitude
    elif kind == NoiseKind.RMS_GAUSSIAN:
        scale = level * wide.square().mean(-1, keepdim=True).sqrt()
    elif kind == NoiseKind.ABSOLUTE_GAUSSIAN:
        scale = level
    else:
        raise ValueError(f"noise kind {kind!r} is not one of {', '.join(NoiseKind)}")
    active = (scale > 0) & (scale < math.inf)
    if kind in (NoiseKind.RMS_GAUSSIAN, NoiseKind.ABSOLUTE_GAUSSIAN):
        active = active & (magnitude < math.inf)
        if keep_zeros:
            active = active & (magnitude > 0)
    noised = wide + (scale if drawn is None else scale * drawn)
    return torch.where(active, noised.to(x.dtype), x)


def noise_reference(
    x: Tensor, level: Tensor, key: Tensor, run: Tensor, channels: Tensor | None, cols: Tensor | None,
    batch: int, kind: str, channel_dim: int = -1, phase: int = 0, keep_zeros: bool = False,
) -> Tensor:  # fmt: skip
    """Return ``x`` perturbed, in plain tensor operations: what ``aqnfx::noise`` means and what ``lower-ops`` inlines.

    ``level`` fp32 (2,): forward and backward level. ``key`` int32 (1,), ``run`` int32 (3,): see :func:`row_keys`.
    ``channels`` fp32 (size of dimension ``channel_dim``,) or None: a factor on the level of each channel. ``cols`` int32
    (C,): :func:`columns`, or None where the last dimension is dynamic. ``keep_zeros``: see :func:`perturb`.
    """
    keys = row_keys(tuple(x.shape), batch, key, run, phase)
    return with_keys(x, level[phase], keys, channels, cols, kind, channel_dim, keep_zeros)


def with_keys(
    x: Tensor, level: Tensor, keys: Tensor, channels: Tensor | None, cols: Tensor | None,
    kind: str, channel_dim: int, keep_zeros: bool, mix: Callable[[Tensor], Tensor] = mix32,
    normal: Callable[[Tensor], Tensor] = normal_of,
) -> Tensor:  # fmt: skip
    """Return :func:`noise_reference` for row keys (of the shape of ``x`` but the last dimension) that exist already."""
    drawn = draws_for(x.shape, keys, cols, kind, mix, normal)
    if drawn is not None and x.dim() == 0:
        drawn = drawn.reshape(())
    return perturb(x, level, drawn, along(channels, channel_dim, x), kind, keep_zeros)


def along(channels: Tensor | None, channel_dim: int, x: Tensor) -> Tensor | None:
    """Return factors of dimension ``channel_dim`` in the shape in which they broadcast against ``x``."""
    if channels is None or channel_dim % x.dim() == x.dim() - 1:
        return channels
    return channels.reshape([-1] + [1] * (x.dim() - 1 - channel_dim % x.dim()))
