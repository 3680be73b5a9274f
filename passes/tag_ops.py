"""tag-ops: give every floating-point operation its kind, ordinal and region."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.fx import GraphModule, Node

from aqnfx.graph import composites
from aqnfx.graph.opkinds import OpKind, base_name, op_kind
from aqnfx.graph.program import Program
from aqnfx.graph.tags import constant, get_tag, is_float, update_tag
from aqnfx.passes.base import Pass

_NORMS = (OpKind.RMS_NORM, OpKind.LAYER_NORM)


@dataclass(frozen=True, kw_only=True)
class TagOps(Pass):
    """Map every node through the op-kind table, recognise composites, and mark the nodes that are sites."""

    name: ClassVar[str] = "tag-ops"
    needs: ClassVar[tuple[str, ...]] = ("tag-layers",)

    def run(self, program: Program) -> None:
        """Tag; every floating-point operation that computes (not moves or casts) becomes a site or part of one."""
        graph = program.graph
        kinds: dict[Node, OpKind] = {}
        for node in graph.nodes:
            if node.op == "call_function" and is_float(node) and get_tag(node).inserted_by is None:
                kind = op_kind(node.target)
                if kind is not None:
                    kinds[node] = kind
        kinds |= dict.fromkeys(composites.linear_products(graph), OpKind.LINEAR)
        parts: dict[Node, OpKind] = {}

        def add(found: composites.Composite) -> None:
            kinds[found.result] = found.kind
            parts.update(dict.fromkeys(found.parts & kinds.keys(), found.kind))

        for finder in (composites.rms_norms, composites.rotaries, composites.tanh_gelus):
            for composite in finder(graph):
                add(composite)
        for composite in [*composites.by_class(graph, kinds)]:
            add(composite)
        for composite in [*composites.gated_units(graph, kinds)]:
            add(composite)
        parameters = frozenset(
            n for n in graph.nodes if n.op == "get_attr" and isinstance(constant(program.module, n), nn.Parameter)
        )
        data = composites.depends_on_data(graph, parameters)
        regions = _regions(program.module, kinds)
        counter: collections.Counter[tuple[str, OpKind]] = collections.Counter()
        for node, kind in kinds.items():
            if node in parts:
                update_tag(node, part_of=parts[node], op=None)
                continue
            module = get_tag(node).module
            region = regions[node] if node in data else "position"
            update_tag(node, op=kind, ordinal=counter[module, kind], region=region, part_of=None)
            counter[module, kind] += 1


def _block_child(node: Node) -> str | None:
    """Return the name of the child of the block that the node lies in, the block's own name for its own operations."""
    tag = get_tag(node)
    if tag.layer is None:
        return None
    block = f"{tag.stack}.{tag.layer}"
    rest = tag.module.removeprefix(block).lstrip(".").split(".")
    depth = 2 if len(rest) > 1 and rest[1].isdigit() else 1  # a list inside of the block, such as T5's layer.0
    return ".".join([block, *rest[:depth]]).rstrip(".")


def _regions(module: GraphModule, kinds: dict[Node, OpKind]) -> dict[Node, str]:
    """Return the region of every node, from what its block's children contain rather than from their names."""
    attention, router, mlp = set(), set(), set()
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        child = _block_child(node)
        kind = kinds.get(node)
        if kind is OpKind.SDPA or (kind is OpKind.SOFTMAX and _feeds_product(node, kinds)):
            attention.add(child)
        elif base_name(node.target) == "topk":
            router.add(get_tag(node).module)
        elif kind in (OpKind.LINEAR, OpKind.GROUPED_MM, OpKind.GLU, OpKind.GELU, OpKind.RELU, OpKind.SILU):
            mlp.add(child)
    last = max((i for i, n in enumerate(module.graph.nodes) if get_tag(n).layer is not None), default=-1)
    order = {n: i for i, n in enumerate(module.graph.nodes)}
    regions = {}
    for node, kind in kinds.items():
        child, tag = _block_child(node), get_tag(node)
        if kind in _NORMS:
            region = "norm"
        elif child is None:
            region = "head" if order[node] > last >= 0 else "embedding" if last >= 0 else "other"
        elif tag.module in router:
            region = "router"
        elif child in attention:
            region = "attention"
        elif tag.module == f"{tag.stack}.{tag.layer}" and kind is OpKind.ADD:
            region = "residual"
        else:
            region = "mlp" if child in mlp else "other"
        regions[node] = region
    return regions


def _feeds_product(node: Node, kinds: dict[Node, OpKind]) -> bool:
    return any(kinds.get(user) in (OpKind.MATMUL, OpKind.BMM) for user in composites.users(node))
