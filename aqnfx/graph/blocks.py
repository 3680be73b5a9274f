"""Blocks: the parts of a graph between the boundaries of its layers, each as a graph whose weights are inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

import aqnfx.numerics.ops  # noqa: F401  (registers aqnfx::noise)
from aqnfx.errors import PassError
from aqnfx.graph.program import Program
from aqnfx.graph.render import render
from aqnfx.graph.tags import get_tag, static_size

NOISE = (torch.ops.aqnfx.noise.default, torch.ops.aqnfx.count.default)


def number_blocks(program: Program) -> dict[Node, int]:
    """Return the block of every function node: 0 before the first layer, then the layers in order, one more after them.

    A node stands in its layer's block or in that of its latest input, whichever is later: no edge leads back.
    """
    place = {layer: number for number, layer in enumerate(program.layers, start=1)}
    last = len(place) + 1
    blocks: dict[Node, int] = {}
    served: dict[str, int] = {}  # site -> block of what was inserted there: a counter reads no value of the graph
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        tag = get_tag(node)
        latest = max((blocks.get(n, 0) for n in node.all_input_nodes), default=0)
        if tag.inserted_by is not None and tag.site:
            latest = served[tag.site] = max(latest, served.get(tag.site, 0))
        own = place.get((tag.stack, tag.layer), 0) if tag.stack is not None and tag.layer is not None else 0
        # What has no layer and follows the last one (final norm, head) is a block of its own.
        blocks[node] = last if place and own == 0 and latest >= last - 1 else max(latest, own)
    return blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One part of a graph, called with ``inputs`` and then ``attributes``, returning the tuple of its ``outputs``.

    ``inputs`` and ``outputs`` name values of the whole graph (its inputs by their placeholder), ``attributes`` parameters
    and buffers of its module. Blocks with the same ``fingerprint`` compute the same function of tensors of the same
    shapes and dtypes. ``noisy``: ids of the sites with a noise node in it.
    """

    number: int
    module: GraphModule
    inputs: tuple[str, ...]
    attributes: tuple[str, ...]
    outputs: tuple[str, ...]
    fingerprint: str
    noisy: tuple[str, ...]


def cut(program: Program, *, noise: bool = True) -> tuple[Block, ...]:
    """Return the blocks of ``program`` in order, without the noise nodes where ``noise`` is false.

    Liveness decides what crosses: a block returns what any later block, or the output, reads. Value names are the same
    with and without noise. Raises :class:`PassError` before ``partition-blocks`` ran.
    """
    if not program.ran("partition-blocks"):
        raise PassError("the program has no blocks; run the pass partition-blocks first")
    members: dict[int, list[Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            members.setdefault(_block(node), []).append(node)
    return tuple(_extract(program, number, nodes, noise) for number, nodes in sorted(members.items()))


def _block(node: Node) -> int:
    return get_tag(node).block or 0


def _extract(program: Program, number: int, nodes: Sequence[Node], noise: bool) -> Block:
    inside = set(nodes)
    read = [n for node in nodes for n in (node.all_input_nodes if noise or node.target not in NOISE else node.args[:1])]
    # In order of first use: equal blocks then take their weights in the same order.
    outer = dict.fromkeys(n for n in read if isinstance(n, Node) and n not in inside)
    values = [n for n in outer if n.op != "get_attr"]
    wanted = [n for n in outer if n.op == "get_attr" and (noise or any(u.target not in NOISE for u in n.users))]
    live = [n for n in nodes if any(u not in inside for u in n.users)]
    graph, copies = Graph(), {}
    for position, node in enumerate((*values, *wanted)):
        copies[node] = graph.placeholder(f"{'value' if position < len(values) else 'weight'}_{position}")
        copies[node].meta = dict(node.meta)
    for node in nodes:
        if not noise and node.target in NOISE:
            if isinstance(source := node.args[0], Node) and node.target is NOISE[0]:
                copies[node] = copies[source]
            continue
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[n] for n in live))
    module = GraphModule(program.module, graph, class_name="Block")
    return Block(
        number=number, module=module, inputs=tuple(n.name for n in values), attributes=tuple(str(n.target) for n in wanted),
        outputs=tuple(n.name for n in live), fingerprint=_fingerprint(graph),
        noisy=tuple(str(get_tag(n).site) for n in nodes if noise and n.target is NOISE[0]),
    )  # fmt: skip


def _fingerprint(graph: Graph) -> str:
    shapes = [str(_described(n.meta.get("val"))) for n in graph.nodes if n.op == "placeholder"]
    return hashlib.sha256("\n".join((render(graph), *shapes)).encode()).hexdigest()


def _described(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.dtype, [str(static_size(s)) for s in value.shape], value.device.type


def results(program: Program, values: Mapping[str, Any]) -> Any:
    """Return the output of the whole graph, as ``program.module`` returns it, from its values by name."""
    output = next(n for n in reversed(program.graph.nodes) if n.op == "output")
    return map_arg(output.args[0], lambda n: values[n.name])


def output_names(program: Program) -> frozenset[str]:
    """Return the names of the values that the whole graph returns."""
    output = next(n for n in reversed(program.graph.nodes) if n.op == "output")
    return frozenset(n.name for n in output.all_input_nodes)
