"""Floating-point operations and sizes of the nodes of a traced graph, at given sizes of its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from aqnfx.errors import InputError
from aqnfx.graph.opkinds import base_name
from aqnfx.graph.program import Program
from aqnfx.graph.tags import static_size, tensor_value

_INPUT_RANK = 2  # token ids and masks: (batch, sequence)


class Sizes:
    """Sizes of the values of a Program for inputs of given shapes, from the formulas that tracing left in its graph.

    ``shapes`` has one shape per input of ``program.signature.tensor_names``. Nothing is run. Raises :class:`InputError`
    where a shape differs from a size that the trace has fixed, or two inputs disagree.
    """

    def __init__(self, program: Program, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._symbols: dict[Any, int] = {}
        self._known: dict[Any, int] = {}
        placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
        for name, node in zip(program.signature.tensor_names, placeholders, strict=True):
            traced = [static_size(size) for size in node.meta["val"].shape]
            given = shapes[name]
            if len(given) != len(traced):
                raise InputError(f"input {name!r} has {len(traced)} dimensions; the shape {list(given)} has {len(given)}")
            for dim, (size, value) in enumerate(zip(traced, given, strict=True)):
                if isinstance(size, int):
                    if size != value:
                        raise InputError(f"input {name!r}: the trace fixes dimension {dim} at {size}; {value} was asked")
                elif size.node.expr.is_Symbol and self._symbols.setdefault(size.node.expr, value) != value:
                    raise InputError(f"input {name!r}: dimension {dim} must be {self._symbols[size.node.expr]}, not {value}")
        if program.domain is not None:
            program.domain.check_shapes(tuple(tuple(shapes[name]) for name in program.signature.tensor_names))

    def shape(self, node: Node) -> tuple[int, ...]:
        """Return the shape of the one tensor that ``node`` returns."""
        value = tensor_value(node)
        if value is None:
            raise ValueError(f"{node} does not return one tensor")
        return tuple(self._size(size, node) for size in value.shape)

    def numel(self, node: Node) -> int:
        """Return the number of elements of the tensor that ``node`` returns."""
        return math.prod(self.shape(node))

    def nbytes(self, node: Node) -> int:
        """Return the bytes of the tensor that ``node`` returns."""
        value = tensor_value(node)
        assert value is not None  # numel raises
        return self.numel(node) * value.dtype.itemsize

    def _size(self, size: int | torch.SymInt, node: Node) -> int:
        known = static_size(size)
        if isinstance(known, int):
            return known
        expression = known.node.expr
        if expression not in self._known:
            value = expression.subs(self._symbols)
            if not value.is_number:
                raise InputError(f"the size {expression} of {node} depends on the values of the inputs, not on their shapes")
            self._known[expression] = int(value)
        return self._known[expression]


def input_shapes(program: Program, batch: int | None = None, tokens: int | None = None) -> dict[str, tuple[int, ...]]:
    """Return the shape of every input: as traced, with ``batch`` samples and ``tokens`` positions where they are open.

    The first dimension of an input is its samples, the second of a matrix of integers its positions.
    """
    found = {}
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    defaults = [value for value in program.signature.defaults if isinstance(value, torch.Tensor)]
    for name, node, default in zip(program.signature.tensor_names, placeholders, defaults, strict=True):
        shape = list(default.shape)
        if batch is not None and shape:
            shape[0] = batch
        if tokens is not None and len(shape) == _INPUT_RANK and not node.meta["val"].is_floating_point():
            shape[1] = tokens
        found[name] = tuple(shape)
    return found


def node_flops(node: Node, sizes: Sizes) -> int:
    """Return the floating-point operations of a matrix product, attention or convolution; 0 for any other node.

    A multiply-add counts two, a masked attention is counted whole, biases and element-wise operations are not counted: the
    conventions of ``torch.utils.flop_counter``.
    """
    formula = _FORMULAS.get(base_name(node.target) or "")
    return formula(node, sizes) if formula is not None and tensor_value(node) is not None else 0


def _shape(node: Node, position: int, sizes: Sizes) -> tuple[int, ...]:
    operand = node.args[position]
    assert isinstance(operand, Node)  # the operators of _FORMULAS take tensors there
    return sizes.shape(operand)


def _product(position: int) -> Callable[[Node, Sizes], int]:
    """2 · (elements of the result) · (terms of each sum): the last dimension of the operand at ``position``."""
    return lambda node, sizes: 2 * sizes.numel(node) * _shape(node, position, sizes)[-1]


def _attention(node: Node, sizes: Sizes) -> int:
    query, key, value = (_shape(node, position, sizes) for position in range(3))
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _convolution(node: Node, sizes: Sizes) -> int:
    """Every weight meets every position: of the result, or of the input where the convolution is transposed."""
    transposed = "transpose" in (base_name(node.target) or "") or (len(node.args) > 6 and node.args[6] is True)
    positions = _shape(node, 0, sizes) if transposed else sizes.shape(node)
    return 2 * math.prod(positions) * math.prod(_shape(node, 1, sizes)[1:])


def _grouped(node: Node, sizes: Sizes) -> int:
    """Every row meets the matrix of its group once; with two matrices the groups split the dimension summed over."""
    first, second = (_shape(node, position, sizes) for position in range(2))
    return 2 * math.prod(first) * second[-1]


def _einsum(node: Node, sizes: Sizes) -> int:
    """2 · the product of all sizes, where anything is summed over; of two operands."""
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return 0
    terms, _, result = equation.replace(" ", "").partition("->")
    labels: dict[str, int] = {}
    for term, operand in zip(terms.split(","), operands, strict=True):
        assert isinstance(operand, Node)
        shape = sizes.shape(operand)
        before, dots, after = term.partition("...")
        if dots:
            middle = shape[len(before) : len(shape) - len(after)]
            labels["..."] = max(labels.get("...", 1), math.prod(middle))
            shape = shape[: len(before)] + shape[len(shape) - len(after) :]
        labels |= dict(zip(before + after, shape, strict=True))
    summed = set(labels) - set(result) - {"..."}
    return 2 * math.prod(labels.values()) if summed else 0


_FORMULAS: dict[str, Callable[[Node, Sizes], int]] = {
    **dict.fromkeys(("linear", "matmul", "mm", "bmm", "mv", "dot"), _product(0)),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _product(1)),
    **dict.fromkeys(
        (
            "scaled_dot_product_attention", "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_cudnn_attention",
        ),
        _attention,
    ),
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d"), _convolution
    ),
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _grouped),
    "einsum": _einsum,
}  # fmt: skip
