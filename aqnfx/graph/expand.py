"""Replace one node by the plain operations of a Python function, traced at the node's symbolic shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def traced(
    function: Callable[..., Any], arguments: Sequence[Any], named: Mapping[str, Any], traces: Traces, **how: Any
) -> Graph:
    """Return the graph of ``function`` called with ``arguments`` and ``named``, whose placeholders are the nodes among them.

    ``how`` are options of ``make_fx``; ``traces`` is filled, and saves tracing the same function again at the same shapes.
    """
    everything = (*arguments, *named.values())
    key = (function, *map(_signature, everything), *named)
    if key in traces:
        return traces[key]

    def call(*given: Any) -> Any:
        it = iter(given)
        filled = [next(it) if isinstance(a, Node) else a for a in everything]
        return function(*filled[: len(arguments)], **dict(zip(named, filled[len(arguments) :], strict=True)))

    values = [a.meta["val"] for a in everything if isinstance(a, Node)]
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    found = make_fx(call, **how)(*(_fake(value, mode) if mode else value for value in values))
    found.graph.eliminate_dead_code()
    traces[key] = found.graph
    return found.graph


def expand(module: GraphModule, node: Node, function: Callable[..., Any], traces: Traces | None = None) -> None:
    """Replace ``node`` by ``function`` called with the same arguments; the new nodes take its tag and module stack.

    ``function`` must be traceable: tensor operations on its tensor arguments, Python on the others. ``traces`` is
    filled with the traced functions and saves tracing the same one again at the same shapes.
    """
    traces = {} if traces is None else traces
    mode = fake_mode(module)
    # pre_dispatch keeps matmul, softmax and the like whole, so that they are tagged as what they are.
    # Symbolic mode, or sizes among the operands would be fixed at their example values.
    kind: Literal["symbolic", "real"] = "symbolic" if mode and mode.shape_env else "real"
    graph = traced(function, node.args, node.kwargs, traces, pre_dispatch=True, tracing_mode=kind)
    operands = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Node)]
    result = inline(node, graph, operands)
    if isinstance(result, Node):
        if "val" in node.meta and "val" in result.meta:
            result.meta["val"] = node.meta["val"]  # in the symbols of this graph
        node.replace_all_uses_with(result)
    node.graph.erase_node(node)
