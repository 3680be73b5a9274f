"""Placeholders of fake-quant nodes in an ONNX model, written out as ``QuantizeLinear`` and ``DequantizeLinear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aqnfx.numerics.formats import Format, IntElement, encode, parse_format

DOMAIN, PLACEHOLDER = "aqnfx", "FakeQuant"


def expand(model: Any) -> tuple[int, int]:
    """Replace every placeholder of an ``onnx.ModelProto`` in place; return planned and stored bytes of the weights.

    A placeholder of an initializer becomes integers, scales and a ``DequantizeLinear``; one of another value computes the
    scales, quantises and dequantises.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes, planned, stored = [], 0, 0
    for node in model.graph.node:
        if node.op_type != PLACEHOLDER or node.domain != DOMAIN:
            nodes.append(node)
            continue
        given = {attribute.name: attribute for attribute in node.attribute}
        fmt, dim = parse_format(given["format"].s.decode()), given["dim"].i
        if node.input[0] in weights:
            made, tensors = _weight(node, weights[node.input[0]], fmt, dim)
            planned += fmt.stored_bits(tuple(_moved(tuple(weights[node.input[0]].dims), dim))) // 8
            stored += sum(len(tensor.raw_data) for tensor in tensors)
        else:
            made, tensors = _value(node, fmt, dim, given["rank"].i, given["width"].i)
        nodes += made
        model.graph.initializer.extend(tensors)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input} | {output.name for output in model.graph.output}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in read]:
        model.graph.initializer.remove(tensor)
    for domain in [entry for entry in model.opset_import if entry.domain == DOMAIN]:
        model.opset_import.remove(domain)
    return planned, stored


def _moved(shape: tuple[int, ...], dim: int) -> list[int]:
    return [size for d, size in enumerate(shape) if d != dim] + [shape[dim]]


def _weight(node: Any, tensor: Any, fmt: Format, dim: int) -> tuple[list[Any], list[Any]]:
    from onnx import TensorProto, helper, numpy_helper

    values = torch.from_numpy(numpy_helper.to_array(tensor).copy())
    rows = values.movedim(dim, -1)
    code = encode(rows.reshape(-1, rows.shape[-1]), fmt)
    assert isinstance(fmt.element, IntElement)  # others were refused
    bits, name = fmt.element.bits, node.output[0]
    kind = getattr(TensorProto, f"{'' if code.zeros is None else 'U'}INT{bits}")

    def stored(part: str, found: Tensor, of: int) -> Any:
        return _integers(f"{name}_{part}", found, of) if of != TensorProto.FLOAT else numpy_helper.from_array(
            found.contiguous().numpy(), f"{name}_{part}"
        )  # fmt: skip

    def back(found: Tensor) -> Tensor:
        """From (rows, values or groups of one) to the shape of the weight."""
        return found.reshape(*rows.shape[:-1], -1).movedim(-1, dim)

    attributes: dict[str, Any] = {}
    per_row = values.dim() == 2 and fmt.grouping not in ("block", "tensor")
    if per_row:
        attributes["axis"] = 1 - dim
    elif fmt.grouping != "tensor":
        attributes |= {"axis": dim, "block_size": fmt.block or rows.shape[-1]}

    def shaped(found: Tensor) -> Tensor:
        return found.reshape(()) if fmt.grouping == "tensor" else found.reshape(-1) if per_row else back(found)

    parts = [stored("codes", back(code.elements), kind), stored("scales", shaped(code.scales), TensorProto.FLOAT)]
    if code.zeros is not None:
        parts.append(stored("zeros", shaped(code.zeros), kind))
    made = helper.make_node("DequantizeLinear", [part.name for part in parts], [name], name=f"{name}_dq", **attributes)
    return [made], parts


def _integers(name: str, values: Tensor, kind: int) -> Any:
    """Return integers as a tensor of an ONNX type; two of 4 bits share a byte, the first in its low half."""
    from onnx import TensorProto, helper

    flat = values.contiguous().reshape(-1).to(torch.int16)
    if kind in (TensorProto.INT4, TensorProto.UINT4):
        low = torch.cat([flat, flat.new_zeros(flat.numel() % 2)]).reshape(-1, 2) & 0xF
        flat = low[:, 0] | (low[:, 1] << 4)
    raw = (flat & 0xFF).to(torch.uint8).numpy().tobytes()
    return helper.make_tensor(name, kind, list(values.shape), raw, raw=True)


def _value(node: Any, fmt: Format, dim: int, rank: int, width: int) -> tuple[list[Any], list[Any]]:
    """Nodes that store a value which is computed: its scales are those of :func:`aqnfx.numerics.formats.quantize`."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    (x,), (y,) = node.input, node.output
    tensors: list[Any] = []
    nodes: list[Any] = []

    def constant(part: str, value: Any, dtype: Any) -> str:
        tensors.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), f"{y}_{part}"))
        return str(tensors[-1].name)

    def call(operation: str, part: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operation, list(inputs), [f"{y}_{part}"], name=f"{y}_{part}_op", **attributes))
        return f"{y}_{part}"

    magnitude = call("Abs", "abs", x)
    if fmt.grouping == "tensor":
        largest = call("ReduceMax", "largest", magnitude, keepdims=0)
        attributes: dict[str, Any] = {}
    else:
        block = fmt.block or width
        attributes = {"axis": dim, "block_size": block}
        if fmt.grouping == "block":
            split = constant("split", [0] * (rank - 1) + [width // block, block], np.int64)
            magnitude = call("Reshape", "groups", magnitude, split)
            largest = call("ReduceMax", "largest", magnitude, constant("axes", [rank], np.int64), keepdims=0)
        else:
            largest = call("ReduceMax", "largest", magnitude, constant("axes", [dim], np.int64), keepdims=1)
    scale = call("Div", "ratio", largest, constant("steps", fmt.element.largest, np.float32))
    if fmt.scale == "bf16":
        scale = call("Cast", "wide", call("Cast", "narrow", scale, to=TensorProto.BFLOAT16), to=TensorProto.FLOAT)
    empty = call("Equal", "empty", scale, constant("zero", 0.0, np.float32))
    scale = call("Where", "scale", empty, constant("one", 1.0, np.float32), scale)
    kind = getattr(TensorProto, f"INT{fmt.element.bits}")
    codes = call("QuantizeLinear", "codes", x, scale, output_dtype=kind, **attributes)
    nodes.append(helper.make_node("DequantizeLinear", [codes, scale], [y], name=f"{y}_dq", **attributes))
    return nodes, tensors
