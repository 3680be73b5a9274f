"""``aqnfx::score_weight``: the identity on the output of a product, whose backward pass scores the product's weight.

The gradient of a weight is a sum over samples; what a perturbation costs is a sum over samples of squares. So the gradient
of each sample is formed by itself, G = Σ over its positions of (gradient of the output) ⊗ (input), and serves all
perturbations: Σ G·δ is what the output's gradient says of the change that δ makes to the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from aqnfx.numerics.perturbations import declared_change, perturbation
from aqnfx.ops.score import ScoringCall, scaled_gradient

_CHUNK = 1 << 24  # elements of per-sample gradients that are held at a time


def changes(weight: Tensor, perturbations: list[str], dim: int, channel_dim: int) -> Tensor | None:
    """Return what each perturbation changes in a weight, fp32 or fp64 (perturbations, elements); None without any."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    found = [declared_change(name)(weight, dim, channel_dim).to(wide).reshape(-1) for name in perturbations]
    return torch.stack(found) if found else None


def accumulate_weight(
    grad: Tensor, x: Tensor, weight: Tensor, table: Tensor | None, run: Tensor, hits: Tensor, sequences: Tensor,
    sketch: Tensor | None, index: int, batch: int, kind: str, dim: int, elements: Tensor | None = None,
) -> None:  # fmt: skip
    """Add what the gradient of x·weight says of the weight to the accumulators, in place.

    ``x`` (…, in), ``grad`` (…, out) and a ``weight`` of two dimensions, (out, in), or (in, out) where ``dim``, the
    dimension that is summed over, is the first. ``table`` is what :func:`changes` returns for it. The accumulators,
    ``kind`` and ``batch`` are those of :func:`aqnfx.ops.score.accumulate`.
    """
    hits[index] += 1
    draw, offset = int(run[1]), int(run[2])
    rows = batch or 1
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    first = dim % weight.dim() == 0
    outer, inner = (grad, x) if not first else (x, grad)
    outer = outer.to(wide).reshape(rows, -1, outer.shape[-1]).transpose(1, 2)
    inner = inner.to(wide).reshape(rows, -1, inner.shape[-1])
    table = table if table is None else table.to(wide)
    squared = table.square() if table is not None and elements is not None and draw == 0 else None
    step = max(1, _CHUNK // weight.numel())
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        place = slice(offset + part.start, offset + part.stop)
        per_sample = torch.bmm(outer[part], inner[part])
        if perturbation(kind).random:
            scaled = scaled_gradient(per_sample, weight, kind, False)
            total = torch.linalg.vector_norm(scaled.reshape(len(scaled), -1), dim=1).double().square_()
            sequences[index, draw, place] += total.to(sequences.device)
        if table is not None:
            # The few rows on the left: several times as fast as few columns on the right.
            products = (table @ per_sample.reshape(len(per_sample), -1).t()).double()
            assert sketch is not None  # allocated by the pass that declares perturbations
            sketch[index, :, draw, place] += products.to(sketch.device)
            if squared is not None:
                assert elements is not None  # what the squares are for
                squares = (squared @ per_sample.square_().reshape(len(per_sample), -1).t()).double()
                elements[index, :, place] += squares.to(elements.device)


class _ScoreWeight(torch.autograd.Function):
    """The identity; keeps the input of the product, and the weight as it is, for the backward pass."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, x: Tensor, weight: Tensor, changed: Any, *rest: Any) -> Tensor:
        ctx.save_for_backward(x.detach(), weight.detach())
        *ctx.changed, ctx.keep = changed
        ctx.rest, ctx.table = rest, None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        with torch.no_grad():
            table = changes(weight, *ctx.changed) if ctx.table is None else ctx.table
            if ctx.keep:  # for the other draws of this forward pass
                ctx.table = table
            accumulate_weight(grads[0], x, weight, table, *ctx.rest)
        return (grads[0] if ctx.needs_input_grad[0] else None, *(None,) * (4 + len(ctx.rest)))


_LIBRARY = torch.library.Library("aqnfx", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "score_weight(Tensor y, Tensor anchor, Tensor run, Tensor hits, Tensor sequences, Tensor? channels, Tensor? sketch, "
    "int index, SymInt batch, str kind, str[] perturbations, Tensor x, Tensor weight, int dim=-1, int channel_dim=0, "
    "Tensor? elements=None, bool keep=False) -> Tensor"
)


# Composite, like aqnfx::score: an operator of its own would have to return a copy.
@torch.library.impl(_LIBRARY, "score_weight", "CompositeImplicitAutograd")
def score_weight(
    y: Tensor, anchor: Tensor, run: Tensor, hits: Tensor, sequences: Tensor, channels: Tensor | None,
    sketch: Tensor | None, index: int, batch: int, kind: str, perturbations: list[str], x: Tensor, weight: Tensor,
    dim: int = -1, channel_dim: int = 0, elements: Tensor | None = None, keep: bool = False,
) -> Tensor:  # fmt: skip
    """Return ``y`` itself; its gradient goes to :func:`accumulate_weight`. ``channels`` is not used.

    ``keep`` holds what the perturbations change until the graph is freed, so that further draws need not compute it again.
    """
    result: Tensor = _ScoreWeight.apply(  # type: ignore[no-untyped-call]
        y, anchor, x, weight, (perturbations, dim, channel_dim, keep), run, hits, sequences, sketch, index, batch, kind, dim,
        elements,
    )  # fmt: skip
    return result


@dataclass(frozen=True, slots=True)
class ScoreWeightCall(ScoringCall):
    """The arguments of :func:`score_weight`."""

    target: ClassVar[Any] = torch.ops.aqnfx.score_weight.default
    x: Node
    weight: Node
    dim: int = -1
    channel_dim: int = 0
    elements: Node | None = None
    keep: bool = False
