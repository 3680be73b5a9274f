"""``aqnfx::score``: the identity, whose backward pass accumulates what a perturbation at this value would cost.

With g the gradient of a random projection of the logits (see :mod:`aqnfx.probes.predict`) and y the value, independent
noise of unit level costs half of Σ (g·s)² with s the scale of the noise (|y| for relative noise), and a fixed
perturbation δ costs half of (Σ g·δ)²: the second-order expansion of KL with the Fisher matrix of the output.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils.weak import WeakTensorKeyDictionary

from aqnfx.numerics.formats import unmasked
from aqnfx.numerics.noise import NoiseKind
from aqnfx.numerics.perturbations import declared_change, perturbation
from aqnfx.ops.call import Call

_HELD = 1 << 26  # bytes of what perturbations change in values, of all values together
_LOCK = threading.RLock()  # every device has a thread of its own for the backward pass


class Changes:
    """What the declared perturbations change in one value, for all score nodes that read it and all draws.

    It is held as long as a graph asks for it, where all that is held so has 64 MiB at the most; else every node makes it again.
    """

    __slots__ = ("__weakref__", "_made", "_size")
    held: ClassVar[int] = 0

    def __init__(self) -> None:
        self._made, self._size = list[Tensor](), 0

    def __del__(self) -> None:
        with _LOCK:
            Changes.held -= self._size

    def of(self, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return what ``make`` returns, from an earlier reader or draw where there was one."""
        if self._made:
            return self._made
        found = make()
        size = sum(tensor.nbytes for tensor in found)
        with _LOCK:
            if Changes.held + size <= _HELD:
                Changes.held += size
                self._made, self._size = found, size
        return found


_CHANGES = WeakTensorKeyDictionary()
"""Value -> how it is read -> its changes: gone with the graph that asks for them, as the value may be a parameter."""


def _shared(y: Tensor, *reading: Any) -> Changes:
    """Return the changes of a value that all its readers share."""
    known = _CHANGES.setdefault(y, WeakValueDictionary())  # type: ignore[no-untyped-call]
    version = 0 if y.is_inference() else y._version
    found: Changes = known.setdefault((version, *reading), Changes())
    return found


def _changed(y: Tensor, perturbations: list[str], dim: int, channel_dim: int, masked: bool) -> list[Tensor]:
    """Return what each perturbation changes in ``y``; what a mask put there (:func:`unmasked`) it does not change."""
    if not masked:
        return [declared_change(name)(y, dim, channel_dim) for name in perturbations]
    outside = ~unmasked(y)
    y = y.masked_fill(outside, 0.0)
    return [declared_change(name)(y, dim, channel_dim).masked_fill(outside, 0.0) for name in perturbations]


def scaled_gradient(grad: Tensor, y: Tensor, kind: str, keep_zeros: bool, masked: bool = False) -> Tensor:
    """Return g·s, a new tensor of the shape of ``y``, with s the scale of unit noise of ``kind`` (fp32 or fp64).

    ``masked``: ``y`` may hold infinities, as a mask added to it leaves them; noise does not change those, so s is 0 there.
    """
    wide = grad.dtype if grad.dtype in (torch.float32, torch.float64) else torch.float32
    grad, y = grad.to(wide), y.to(wide)
    if masked:
        outside = ~torch.isfinite(y)
        grad = grad.masked_fill(outside, 0.0)
        # The rms of a row with an infinity is infinite, and such noise changes nothing in the whole row.
        rows = outside.any(-1, keepdim=True) if kind == NoiseKind.RMS_GAUSSIAN else outside
        y = y.masked_fill(rows, 0.0)
    if kind in (NoiseKind.RELATIVE_GAUSSIAN, NoiseKind.UNIFORM):
        return grad * y
    scaled = grad.clone()
    if kind == NoiseKind.RMS_GAUSSIAN:
        scaled *= y.square().mean(-1, keepdim=True).sqrt()
    return scaled.masked_fill_(y == 0, 0.0) if keep_zeros else scaled


def accumulate(
    grad: Tensor, y: Tensor, run: Tensor, hits: Tensor, sequences: Tensor, channels: Tensor | None,
    sketch: Tensor | None, index: int, batch: int, kind: str, perturbations: list[str], channel_dim: int,
    keep_zeros: bool, masked: bool = False, dim: int = -1, elements: Tensor | None = None, changes: Changes | None = None,
) -> None:  # fmt: skip
    """Add what the gradient ``grad`` says of the value ``y`` to the accumulators, in place.

    ``run`` int32 (3,): seed, number of the draw, row offset. ``hits`` int64 (S,); ``sequences`` fp64 (S, K, N): per
    site, draw and sample; ``channels`` fp64 (2, C): sum and sum of squares over samples and draws; ``sketch`` fp64 (S,
    D, K, N): Σ g·δ per declared perturbation; ``elements`` fp64 (S, D, N): Σ (g·δ)² of the first draw, whose noise is
    small beside its bias. The accumulators may be on another device. ``batch`` 0: the value belongs to no sample, and its
    sum stands at the first sample of the batch. ``kind`` is that of the noise that ``sequences`` and ``channels`` are of; a
    declared perturbation leaves them alone. ``dim`` and ``channel_dim`` are what the scales of a format run along.
    ``changes``: what other readers of ``y`` share, or None.
    """
    hits[index] += 1
    draw, offset = int(run[1]), int(run[2])
    rows = batch or 1
    if perturbation(kind).random:
        scaled = scaled_gradient(grad, y, kind, keep_zeros, masked)
        if channels is not None:
            width = scaled.shape[channel_dim]
            last = channel_dim % scaled.dim() == scaled.dim() - 1
            table = (scaled if last else scaled.movedim(channel_dim, -1)).reshape(rows, -1, width)
            per_channel = torch.linalg.vector_norm(table, dim=1).double().square_()
            channels[0] += per_channel.sum(0).to(channels.device)
            channels[1] += per_channel.square().sum(0).to(channels.device)
            total = per_channel.sum(1)
        else:
            total = torch.linalg.vector_norm(scaled.reshape(rows, -1), dim=1).double().square_()
        sequences[index, draw, offset : offset + rows] += total.to(sequences.device)
    if not perturbations:
        return

    def made() -> list[Tensor]:
        return _changed(y, perturbations, dim, channel_dim, masked)

    for number, delta in enumerate(made() if changes is None else changes.of(made)):
        table = (grad.to(delta.dtype) * delta).reshape(rows, -1)
        products = table.sum(1, dtype=torch.float64)
        assert sketch is not None  # allocated by the pass that declares perturbations
        sketch[index, number, draw, offset : offset + rows] += products.to(sketch.device)
        if elements is not None and draw == 0:
            squares = torch.linalg.vector_norm(table, dim=1).double().square_()
            elements[index, number, offset : offset + rows] += squares.to(elements.device)


class _Score(torch.autograd.Function):
    """The identity; its output shares the storage of its input, so that nothing is copied."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, *rest: Any) -> Tensor:
        ctx.save_for_backward(y)
        ctx.rest = rest
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        with torch.no_grad():
            accumulate(grads[0], y, *ctx.rest)
        return (grads[0] if ctx.needs_input_grad[0] else None, None, *(None,) * len(ctx.rest))


_LIBRARY = torch.library.Library("aqnfx", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "score(Tensor y, Tensor anchor, Tensor run, Tensor hits, Tensor sequences, Tensor? channels, Tensor? sketch, "
    "int index, SymInt batch, str kind, str[] perturbations, int channel_dim=-1, bool keep_zeros=False, bool masked=False, "
    "int dim=-1, Tensor? elements=None) -> Tensor"
)


# Composite: it vanishes into the autograd function that it calls. An operator of its own would have to return a copy.
@torch.library.impl(_LIBRARY, "score", "CompositeImplicitAutograd")
def score(
    y: Tensor, anchor: Tensor, run: Tensor, hits: Tensor, sequences: Tensor, channels: Tensor | None,
    sketch: Tensor | None, index: int, batch: int, kind: str, perturbations: list[str], channel_dim: int = -1,
    keep_zeros: bool = False, masked: bool = False, dim: int = -1, elements: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return ``y`` itself; its gradient goes to :func:`accumulate`.

    ``anchor`` is an empty tensor that requires gradient: with it the backward pass reaches every site without a gradient
    for any weight.
    """
    changes = _shared(y, *perturbations, dim, channel_dim, masked) if perturbations else None
    result: Tensor = _Score.apply(  # type: ignore[no-untyped-call]
        y, anchor, run, hits, sequences, channels, sketch, index, batch, kind, perturbations, channel_dim, keep_zeros,
        masked, dim, elements, changes,
    )  # fmt: skip
    return result


@dataclass(frozen=True, slots=True)
class ScoringCall(Call):
    """What all operators that score have in common: their first eleven arguments."""

    y: Node
    anchor: Node
    run: Node
    hits: Node
    sequences: Node
    channels: Node | None
    sketch: Node | None
    index: int
    batch: Any
    kind: str
    perturbations: Sequence[str]


@dataclass(frozen=True, slots=True)
class ScoreCall(ScoringCall):
    """The arguments of :func:`score`."""

    target: ClassVar[Any] = torch.ops.aqnfx.score.default
    channel_dim: int = -1
    keep_zeros: bool = False
    masked: bool = False
    dim: int = -1
    elements: Node | None = None
