"""Blocks: the parts of a graph between the boundaries of its layers, each as a graph whose weights are inputs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from aqnfx.errors import PassError
from aqnfx.graph.edit import copy_graph, output_node
from aqnfx.graph.operands import Place, role_of
from aqnfx.graph.program import Program
from aqnfx.graph.render import render
from aqnfx.graph.sites import Role
from aqnfx.graph.tags import get_tag, static_size
from aqnfx.numerics.formats import parse_format, quantize
from aqnfx.numerics.noise import with_keys
from aqnfx.ops.mix32 import MIX
from aqnfx.ops.noise import NoiseCall
from aqnfx.ops.normal import NORMAL
from aqnfx.ops.table import is_counter, is_switched, operator_of, stands_for


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
        latest = max((blocks.get(n, 0) for n in (*node.all_input_nodes, *_beside(node))), default=0)
        if tag.inserted_by is not None and tag.site:
            latest = served[tag.site] = max(latest, served.get(tag.site, 0))
        own = place.get((tag.stack, tag.layer), 0) if tag.stack is not None and tag.layer is not None else 0
        # What has no layer and follows the last one (final norm, head) is a block of its own.
        blocks[node] = last if place and own == 0 and latest >= last - 1 else max(latest, own)
    return blocks


def _beside(node: Node) -> Sequence[Node]:
    """Return what the reader of an operand reads besides, for a node inserted there: a weight has no place of its own."""
    reader = node
    while get_tag(reader).inserted_by is not None and role_of(str(get_tag(reader).site)) is not Role.OUTPUT and reader.users:
        reader = next(iter(reader.users))
    return reader.all_input_nodes if reader is not node else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One part of a graph, called with ``inputs`` and then ``attributes``, returning the tuple of its ``outputs``.

    ``inputs`` and ``outputs`` name values of the whole graph (its inputs by their placeholder), ``attributes`` parameters
    and buffers of its module. Blocks with the same ``fingerprint`` compute the same function of tensors of the same
    shapes and dtypes. ``noisy``: ids of the sites with a noise node, or a fake-quant node with controls, in it;
    ``pattern`` their places among those of the whole graph's block. ``dynamic``: the dimensions of every input and
    attribute that the batch decides. ``lowered``: noise and formats are plain functions for a compiler. ``stores``: operands
    and the formats that they are stored in, which are arguments too, after the attributes: :meth:`storing` others is free.
    """

    number: int
    module: GraphModule
    inputs: tuple[str, ...]
    attributes: tuple[str, ...]
    outputs: tuple[str, ...]
    fingerprint: str
    noisy: tuple[str, ...]
    pattern: tuple[int, ...]
    dynamic: tuple[tuple[int, ...], ...]
    lowered: bool = False
    stores: Mapping[str, str] = field(default_factory=dict, hash=False)

    def storing(self, formats: Mapping[str, str]) -> Block:
        """Return the block with its operands in ``formats``, and as they are where that names none.

        Raises :class:`PassError` for a site that the block was not cut with formats for.
        """
        if unknown := [site for site in formats if site not in self.stores]:
            raise PassError(f"{unknown[0]} has no format in block {self.number}; cut the block with it")
        return dataclasses.replace(self, stores={site: formats.get(site, "") for site in self.stores})


def cut(
    program: Program, *, noise: bool | Collection[str] = True, only: Collection[int] | None = None,
    formats: Mapping[str, str] | None = None,
) -> tuple[Block, ...]:  # fmt: skip
    """Return the blocks of ``program`` in order, with the noise nodes of all sites, of none, or of those in ``noise``.

    ``only`` names the numbers of the blocks that are wanted. ``formats``, sites of operands -> number formats ("": as it is),
    stores what is read there as ``insert-fake-quant`` does, in one block for all formats: a rewritten program for every choice
    would cost more than running it. No gradient goes through what is stored so. Liveness
    decides what crosses: a block returns what any later block, or the output, reads. Value names are the same with and without
    noise. Raises :class:`PassError` before ``partition-blocks`` ran.
    """
    if not program.ran("partition-blocks"):
        raise PassError("the program has no blocks; run the pass partition-blocks first")
    members: dict[int, list[Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            members.setdefault(_block(node), []).append(node)
    wanted = noise if not isinstance(noise, bool) else None
    stored: dict[Node, list[tuple[Place, str]]] = {}
    for site, fmt in (formats or {}).items():
        stored.setdefault(program.places[site].node, []).append((program.places[site], fmt))
    found = []
    for number, nodes in sorted(members.items()):
        if only is not None and number not in only:
            continue
        sites = [str(get_tag(n).site) for n in nodes if is_switched(n)]
        kept = frozenset(s for s in sites if (noise if wanted is None else s in wanted))
        pattern = tuple(i for i, s in enumerate(sites) if s in kept)
        found.append(_extract(program, number, nodes, kept, pattern, stored))
    return tuple(found)


def _block(node: Node) -> int:
    return get_tag(node).block or 0


def _extract(
    program: Program, number: int, nodes: Sequence[Node], kept: frozenset[str], pattern: tuple[int, ...],
    stored: Mapping[Node, Sequence[tuple[Place, str]]],
) -> Block:  # fmt: skip
    inside = set(nodes)
    gone = {n for n in nodes if (is_switched(n) or is_counter(n)) and get_tag(n).site not in kept}
    read = [n for node in nodes for n in ([stands_for(node)] if node in gone else node.all_input_nodes)]
    # In order of first use: equal blocks then take their weights in the same order.
    outer = dict.fromkeys(n for n in read if n is not None and n not in inside)
    crossing = [n for n in outer if n.op != "get_attr"]
    # Sizes are read off a tensor that crosses too: as integers of their own a compiler would take them for constants.
    sizes = {n: found for n in crossing if (found := _sized(n, crossing)) is not None}
    values = [n for n in crossing if n not in sizes]

    def read_on(value: Node) -> bool:
        """Return whether anything that stays reads ``value``, directly or past a node that is gone."""
        return any(u in inside and (u not in gone or (stands_for(u) is value and read_on(u))) for u in value.users)

    wanted = [n for n in outer if n.op == "get_attr" and read_on(n)]
    live = [n for n in nodes if any(u not in inside for u in n.users)]
    graph, copies = Graph(), dict[Node, Node]()
    slots = [(place.site.id, fmt) for node in nodes for place, fmt in stored.get(node, ())]
    for position, node in enumerate((*values, *wanted)):
        copies[node] = graph.placeholder(f"{'value' if position < len(values) else 'weight'}_{position}")
        copies[node].meta = dict(node.meta)
    formats = {site: graph.placeholder(f"format_{number}") for number, (site, _) in enumerate(slots)}
    known: dict[Any, list[tuple[Node, Node]]] = {}  # operand -> formats that it is stored in, and the results
    for node, (tensor, dim) in sizes.items():
        copies[node] = graph.call_function(torch.ops.aten.sym_size.int, (copies[tensor], dim))
        copies[node].meta = dict(node.meta)
    for node in nodes:
        if node in gone:
            if (source := stands_for(node)) is not None:
                copies[node] = copies[source]
            continue
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        for place, _ in stored.get(node, ()):
            # Readers of one value that ask for the same format share it.
            before = known.setdefault((place.value, place.dim, place.channel_dim), [])
            fmt = formats[place.site.id]
            names, others = [name for name, _ in before], [other for _, other in before]
            with graph.inserting_before(copies[node]):
                made = graph.call_function(
                    _stored, (copies[place.value], fmt, place.dim, place.channel_dim, names, others)
                )
            before.append((fmt, made))
            assert place.position is not None  # an operand's
            copies[node].update_arg(place.position, made)
    graph.output(tuple(copies[n] for n in live))
    module = GraphModule(program.module, graph, class_name="Block")
    return Block(
        number=number, module=module, inputs=tuple(n.name for n in values), attributes=tuple(str(n.target) for n in wanted),
        outputs=tuple(n.name for n in live), fingerprint=_fingerprint(graph),
        noisy=tuple(str(get_tag(n).site) for n in nodes if is_switched(n) and n not in gone), pattern=pattern,
        dynamic=(*(_dynamic(n.meta.get("val")) for n in (*values, *wanted)), *(() for _ in slots)),
        stores=dict(slots),
    )  # fmt: skip


def _stored(
    x: torch.Tensor, fmt: str, dim: int, channel_dim: int, formats: list[str], found: list[torch.Tensor]
) -> torch.Tensor:  # fmt: skip
    """Return ``x`` as a format stores it, "": as it is; ``found`` is what it is in ``formats``."""
    if not fmt:
        return x
    if fmt in formats:
        return found[formats.index(fmt)]
    return quantize(x, parse_format(fmt), dim=dim, channel_dim=channel_dim)


def lower(block: Block) -> Block:
    """Return the block with its noise as plain functions, which a compiler traces through and fuses with what is around.

    Sites of one shape share one call of ``aqnfx::row_keys``. The result has a fingerprint of its own.
    """
    from aqnfx.ops.inductor import register  # loads Inductor

    register()
    graph, _ = copy_graph(block.module.graph)
    groups: dict[tuple[Any, ...], list[tuple[Node, NoiseCall]]] = {}
    for node in graph.nodes:
        if node.target is NoiseCall.target:
            call = NoiseCall.of(node)
            shape = call.x.meta["val"].shape
            groups.setdefault((str(shape[:-1]), len(shape), call.batch, call.run), []).append((node, call))
        elif (operator := operator_of(node)) is not None and operator.reference is not None:
            node.target = operator.reference
    for (_, _, batch, run), calls in groups.items():
        first, before = calls[0]
        with graph.inserting_before(first):
            keys = graph.call_function(_group_keys, (before.x, batch, [call.key for _, call in calls], run))
        for place, (node, call) in enumerate(calls):
            node.target = _inlined
            node.args = (
                call.x, call.level, keys, place, call.channels, call.cols, call.kind, call.channel_dim, call.keep_zeros,
            )  # fmt: skip
    module = GraphModule(block.module, graph, class_name="Block")
    return dataclasses.replace(block, module=module, fingerprint=f"{block.fingerprint} lowered", lowered=True)


def _group_keys(x: torch.Tensor, batch: int, keys: list[torch.Tensor], run: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.aqnfx.row_keys(list(x.shape), batch, keys, run, 0)
    return found


def _inlined(
    x: torch.Tensor, level: torch.Tensor, keys: torch.Tensor, place: int, channels: torch.Tensor | None,
    cols: torch.Tensor | None, kind: str, channel_dim: int, keep_zeros: bool,
) -> torch.Tensor:  # fmt: skip
    return with_keys(x, level[0], keys[place], channels, cols, kind, channel_dim, keep_zeros, MIX, NORMAL)


def _fingerprint(graph: Graph) -> str:
    shapes = [str(_described(n.meta.get("val"))) for n in graph.nodes if n.op == "placeholder"]
    return hashlib.sha256("\n".join((render(graph), *shapes)).encode()).hexdigest()


def _sized(node: Node, among: Sequence[Node]) -> tuple[Node, int] | None:
    """Return a tensor and its dimension whose size is the integer that ``node`` gives, or None for no such integer."""
    if not isinstance(size := node.meta.get("val"), torch.SymInt):
        return None
    tensors = [(n, n.meta["val"]) for n in among if isinstance(n.meta.get("val"), torch.Tensor)]
    wanted = str(size)
    return next(((n, dim) for n, t in tensors for dim, s in enumerate(t.shape) if str(s) == wanted), None)


def _dynamic(value: Any) -> tuple[int, ...]:
    """Return the dimensions of a value whose size is not fixed."""
    sizes = value.shape if isinstance(value, torch.Tensor) else ()
    return tuple(dim for dim, size in enumerate(sizes) if not isinstance(static_size(size), int))


def _described(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.dtype, [str(static_size(s)) for s in value.shape], value.device.type


def results(program: Program, values: Mapping[str, Any]) -> Any:
    """Return the output of the whole graph, as ``program.module`` returns it, from its values by name."""
    return map_arg(output_node(program.graph).args[0], lambda n: values[n.name])


def output_names(program: Program) -> frozenset[str]:
    """Return the names of the values that the whole graph returns."""
    return frozenset(n.name for n in output_node(program.graph).all_input_nodes)
