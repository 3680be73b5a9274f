"""``aqnfx::capture_gradient``: the identity, whose backward pass adds up how large the gradient is; nothing is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from aqnfx.ops.call import Call
from aqnfx.ops.capture import dropped_rows

# Entries of the buffer ``gradients``.
GRADIENT_COUNT, GRADIENT_MAGNITUDE, GRADIENT_SQUARE = range(3)


def accumulate_gradient(grad: Tensor, mask: Tensor | None, gradients: Tensor) -> None:
    """Add what ``grad`` holds to ``gradients`` fp64 (3,), in place: number of elements, Σ|g|, Σg².

    ``mask`` is that of :func:`aqnfx.ops.capture.accumulate`: only positions with a mask that is not 0 count.
    """
    if grad.numel() == 0:
        return
    width = grad.shape[-1] if grad.dim() else 1
    rows = grad.detach().reshape(-1, width)
    rows = rows if rows.dtype == torch.float64 else rows.to(torch.float32)
    magnitude = torch.linalg.vector_norm(rows, 1, dim=-1).double()
    square = torch.linalg.vector_norm(rows, dim=-1).double().square_()
    counted = float(len(rows))
    if mask is not None:
        dropped = dropped_rows(mask, grad, len(rows)).squeeze(1)
        magnitude.masked_fill_(dropped, 0.0)
        square.masked_fill_(dropped, 0.0)
        gradients[GRADIENT_COUNT] -= (dropped.sum() * width).to(gradients.device)
    gradients[GRADIENT_COUNT] += counted * width
    gradients[GRADIENT_MAGNITUDE] += magnitude.sum().to(gradients.device)
    gradients[GRADIENT_SQUARE] += square.sum().to(gradients.device)


class _CaptureGradient(torch.autograd.Function):
    """The identity; its output shares the storage of its input, and nothing is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, mask: Tensor | None, gradients: Tensor) -> Tensor:
        ctx.mask, ctx.gradients = mask, gradients
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            accumulate_gradient(grads[0], ctx.mask, ctx.gradients)
        return grads[0], None, None


_LIBRARY = torch.library.Library("aqnfx", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("capture_gradient(Tensor y, Tensor? mask, Tensor gradients) -> Tensor")  # type: ignore[no-untyped-call]


# Composite, like aqnfx::score: an operator of its own would have to return a copy.
@torch.library.impl(_LIBRARY, "capture_gradient", "CompositeImplicitAutograd")
def capture_gradient(y: Tensor, mask: Tensor | None, gradients: Tensor) -> Tensor:
    """Return ``y`` itself; its gradient, where there is one, goes to :func:`accumulate_gradient`."""
    result: Tensor = _CaptureGradient.apply(y, mask, gradients)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True, slots=True)
class CaptureGradientCall(Call):
    """The arguments of :func:`capture_gradient`."""

    target: ClassVar[Any] = torch.ops.aqnfx.capture_gradient.default
    y: Node
    mask: Node | None
    gradients: Node
