"""``aqnfx::accumulate``: a product as hardware computes it whose running sum has few bits.

Elements of a dot product are multiplied and summed exactly in groups of ``every``; after each group the running sum is
rounded to a short float, as a tensor core does that keeps its accumulator in fp16 or bf16. With fp32 accumulation the error
of a dot product hardly grows with its length; with a short accumulator small terms vanish beside a large sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from aqnfx.errors import InputError
from aqnfx.numerics.formats import BF16, FP16, FloatElement, round_element
from aqnfx.ops.call import Call
from aqnfx.ops.switch import blend, is_off, placed

ACCUMULATORS: dict[str, FloatElement] = {"fp16": FP16, "bf16": BF16}


def accumulated_product(x: Tensor, weight: Tensor, element: str, every: int, *, transposed: bool = False) -> Tensor:
    """Return x·weight with a running sum in ``element`` ("fp16" or "bf16") that is rounded after ``every`` terms, in fp32.

    ``x`` (…, M, K) or (…, K), ``weight`` (…, K, N), or (N, K) where ``transposed``. A sum beyond the largest fp16 value is
    infinite, as in the hardware. Raises :class:`InputError` for an unknown element or ``every`` below 1.
    """
    if element not in ACCUMULATORS:
        raise InputError(f"accumulator {element!r} is not one of {', '.join(ACCUMULATORS)}")
    if every < 1:
        raise InputError(f"accumulating every {every} elements was asked; it must be 1 or more")
    short, wide = ACCUMULATORS[element], x.to(torch.float32)
    table = weight.to(torch.float32).transpose(-1, -2) if transposed else weight.to(torch.float32)
    total: Tensor | None = None
    for start in range(0, wide.shape[-1], every):
        part = torch.matmul(wide[..., start : start + every], table[..., start : start + every, :])
        total = round_element(part if total is None else total + part, short)
    return torch.matmul(wide, table) if total is None else total


def accumulate_reference(
    y: Tensor, level: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, element: str, every: int,
    transposed: bool,
) -> Tensor:  # fmt: skip
    """Return the product ``y`` = x·weight + bias as a short accumulator gives it, in plain tensor operations.

    ``level`` is a factor on the error, see :func:`~aqnfx.ops.switch.blend`.
    """
    found = accumulated_product(x, weight, element, every, transposed=transposed)
    if bias is not None:
        found = found + bias.to(torch.float32)
    return blend(y, found.to(y.dtype), level)


@torch.library.custom_op("aqnfx::accumulate", mutates_args=())
def accumulate(
    y: Tensor, level: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, element: str, every: int,
    transposed: bool = False,
) -> Tensor:  # fmt: skip
    """See :func:`accumulate_reference`; always a new tensor. To autograd it is the identity on ``y``: straight through."""
    if is_off(level, y):
        return y.clone()
    return accumulate_reference(y, placed(level, y), x, weight, bias, element, every, transposed)


@accumulate.register_fake
def _(y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(y)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    return None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (grad, *(None,) * 7)


accumulate.register_autograd(_backward, setup_context=_setup_context)


@dataclass(frozen=True, slots=True)
class AccumulateCall(Call):
    """The arguments of :func:`accumulate`."""

    target: ClassVar[Any] = torch.ops.aqnfx.accumulate.default
    y: Node
    level: Node | None
    x: Node
    weight: Node
    bias: Node | None
    element: str
    every: int
    transposed: bool = False

    def cannot_be_lowered(self) -> str:
        """Return why the sum cannot be written out, "" where it can: it has one step per group, so a fixed number of them."""
        value = self.x.meta.get("val")
        size = value.shape[-1] if isinstance(value, Tensor) else None
        if isinstance(size, torch.SymInt):
            size = size.node.maybe_as_int()
        if size is not None:
            return ""
        return (
            "sums over a dimension of open length, which cannot be written out in steps; leave it out of insert-accumulation, or "
            "run without lower-ops"
        )
