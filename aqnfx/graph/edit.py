"""The only code that inserts and erases nodes; inserted nodes carry their neighbour's metadata and their provenance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from aqnfx.graph.operands import Place
from aqnfx.graph.tags import Tag, get_tag, update_tag

BUFFER_PREFIX = "aqnfx_"


def output_node(graph: Graph) -> Node:
    """Return the node that says what the graph returns: its last."""
    found: Node = next(node for node in reversed(graph.nodes) if node.op == "output")
    return found


def copy_graph(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    """Return a copy of a whole graph with the metadata of its nodes, and old -> new nodes but for the output."""
    made, mapping = Graph(), dict[Node, Node]()
    returned = made.graph_copy(graph, mapping)
    made.output(returned).meta = dict(output_node(graph).meta)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
        if hasattr(old, "_dynamo_source"):  # where Dynamo takes the value of an input from
            new._dynamo_source = old._dynamo_source
    return made, mapping


def _carry(new: Node, anchor: Node, *, inserted_by: str, site: str | None) -> None:
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in anchor.meta:
            new.meta[key] = anchor.meta[key]
    tag: Tag = get_tag(anchor)
    update_tag(
        new, module=tag.module, layer=tag.layer, stack=tag.stack, region=tag.region, inserted_by=inserted_by, site=site,
        block=tag.block,
    )  # fmt: skip


def control_buffer(
    module: GraphModule, name: str, value: torch.Tensor, *, inserted_by: str, site: str | None, part: str | None = None
) -> Node:
    """Register ``value`` as the buffer ``aqnfx_<name>`` (once) and return the ``get_attr`` node that reads it.

    The node stands before all inputs, where the parameters are; an existing one of the same name is returned as it is.
    """
    target = BUFFER_PREFIX + name
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target == target:
            return node  # type: ignore[no-any-return]
        if node.op == "placeholder":
            break
    module.register_buffer(target, value, persistent=False)
    first = next(iter(module.graph.nodes))
    with module.graph.inserting_before(first):
        node = module.graph.get_attr(target)
    node.meta["val"] = value
    update_tag(node, inserted_by=inserted_by, site=site, part=part)
    return node


def insert_after(
    anchor: Node, target: Callable[..., Any], args: tuple[Any, ...], *, inserted_by: str, site: str, reroute: bool
) -> Node:
    """Insert a call of ``target`` right after ``anchor``; with ``reroute`` all other users of ``anchor`` use it instead.

    A rerouted call takes the place of the anchor's value, so it carries the same fake tensor.
    """
    graph = anchor.graph
    with graph.inserting_after(anchor):
        node = graph.call_function(target, args)
    _carry(node, anchor, inserted_by=inserted_by, site=site)
    if reroute:
        node.meta["val"] = anchor.meta["val"]
        for user in list(anchor.users):
            if user is not node:
                user.replace_input_with(anchor, node)
    return node


def insert_at(
    place: Place, target: Callable[..., Any], args: tuple[Any, ...], *, inserted_by: str, reroute: bool
) -> Node:
    """Insert a call of ``target`` on the value of a site; ``args`` follow the value as arguments.

    With ``reroute`` the call takes the value's place: for all users of an output, for the one reader of an operand.
    """
    site, value = place.site.id, place.value
    if place.position is None:
        return insert_after(value, target, (value, *args), inserted_by=inserted_by, site=site, reroute=reroute)
    with place.node.graph.inserting_before(place.node):
        node = place.node.graph.call_function(target, (value, *args))
    _carry(node, place.node, inserted_by=inserted_by, site=site)
    if reroute:
        node.meta["val"] = value.meta["val"]
        place.node.update_arg(place.position, node)
    return node


def erase_inserted(module: GraphModule) -> int:
    """Erase every inserted node, giving its users the value it was rerouted from; return how many were erased."""
    graph = module.graph
    erased = 0
    for node in reversed(list(graph.nodes)):
        if get_tag(node).inserted_by is None:
            continue
        if node.users:  # the value whose place it took is its first argument: that is how it was inserted
            node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
        erased += 1
        if node.op == "get_attr":
            delattr(module, str(node.target))
    return erased


def inline(call: Node, body: Graph, operands: Sequence[Any]) -> Any:
    """Copy ``body`` before ``call`` with its inputs bound to ``operands``; return what its output node returns.

    The copies take the tag of ``call``, and its module stack where they have none.
    """
    mapping: dict[Node, Any] = {}
    inputs = iter(operands)
    with call.graph.inserting_before(call):
        for node in body.nodes:
            if node.op == "placeholder":
                mapping[node] = next(inputs)
            elif node.op == "output":
                return torch.fx.node.map_arg(node.args[0], lambda n: mapping[n])
            else:
                new = call.graph.node_copy(node, lambda n: mapping[n])
                mapping[node] = new
                if not new.meta.get("nn_module_stack"):
                    new.meta["nn_module_stack"] = call.meta.get("nn_module_stack", {})
                tag = get_tag(call)
                update_tag(
                    new, module=tag.module, layer=tag.layer, stack=tag.stack, region=tag.region,
                    inserted_by=tag.inserted_by, site=tag.site, block=tag.block,
                )  # fmt: skip
    raise ValueError("the graph to inline has no output node")
