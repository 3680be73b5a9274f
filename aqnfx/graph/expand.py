"""Replace one node by the plain operations of a Python function, traced at the node's symbolic shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from aqnfx.graph.edit import inline


def fake_mode(module: GraphModule) -> FakeTensorMode | None:
    """Return the fake-tensor mode that the graph was traced under."""
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    return mode.from_tensor(value) if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) else value


Traces = dict[tuple[Any, ...], Graph]


def _signature(value: Any) -> Any:
    """Return what a trace depends on: dtype, sizes and strides of a tensor, the value of anything else."""
    if not isinstance(value, Node):
        return repr(value)
    tensor = value.meta["val"]
    if not isinstance(tensor, torch.Tensor):
        return "size", str(tensor)
    return str(tensor.dtype), str(tuple(tensor.shape)), str(tensor.stride()), str(tensor.device)


def expand(module: GraphModule, node: Node, function: Callable[..., Any], traces: Traces | None = None) -> None:
    """Replace ``node`` by ``function`` called with the same arguments; the new nodes take its tag and module stack.

    ``function`` must be traceable: tensor operations on its tensor arguments, Python on the others. ``traces`` is
    filled with the traced functions and saves tracing the same one again at the same shapes.
    """
    traces = {} if traces is None else traces
    mode = fake_mode(module)
    arguments = (*node.args, *node.kwargs.values())
    operands = [a for a in arguments if isinstance(a, Node)]
    values = [_fake(a.meta["val"], mode) if mode else a.meta["val"] for a in operands]

    def call(*given: Any) -> Any:
        it = iter(given)
        filled = [next(it) if isinstance(a, Node) else a for a in arguments]
        positional, named = filled[: len(node.args)], filled[len(node.args) :]
        return function(*positional, **dict(zip(node.kwargs, named, strict=True)))

    # pre_dispatch keeps matmul, softmax and the like whole, so that they are tagged as what they are.
    # Symbolic mode, or sizes among the operands would be fixed at their example values.
    kind: Literal["symbolic", "real"] = "symbolic" if mode and mode.shape_env else "real"
    key = (function, *map(_signature, arguments), *node.kwargs)
    if key not in traces:
        traced = make_fx(call, pre_dispatch=True, tracing_mode=kind)(*values)
        traced.graph.eliminate_dead_code()
        traces[key] = traced.graph
    result = inline(node, traces[key], operands)
    if isinstance(result, Node):
        if "val" in node.meta and "val" in result.meta:
            result.meta["val"] = node.meta["val"]  # in the symbols of this graph
        node.replace_all_uses_with(result)
    node.graph.erase_node(node)
