"""The one module that reads and writes aqnfx's metadata on FX nodes (``node.meta["aqnfx"]``)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from aqnfx.graph.opkinds import OpKind
from aqnfx.graph.sites import Site
from aqnfx.graph.wrappers import is_adapter, own_name

_KEY = "aqnfx"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """What the passes know about a node.

    ``module`` is the innermost module's name, ``layer`` / ``stack`` the block it belongs to. ``op`` is set on nodes
    that are a site of that kind; ``part_of`` on inner nodes of a recognised composite. ``inserted_by`` names the pass
    that put the node there and ``site`` the id of the site that it serves; ``part`` says which control of that site a
    buffer is. ``block`` is the number of the part of the graph that the node runs in, None before ``partition-blocks``
    ran.
    """

    module: str = ""
    layer: int | None = None
    stack: str | None = None
    op: OpKind | None = None
    ordinal: int = 0
    region: str = "other"
    part_of: OpKind | None = None
    inserted_by: str | None = None
    site: str | None = None
    part: str | None = None
    block: int | None = None


_EMPTY = Tag()


def get_tag(node: Node) -> Tag:
    """Return the node's tag, empty where no pass has written one."""
    tag: Tag = node.meta.get(_KEY, _EMPTY)
    return tag


def update_tag(node: Node, **changes: Any) -> None:
    """Write ``changes`` (fields of :class:`Tag`) to the node's tag."""
    node.meta[_KEY] = dataclasses.replace(get_tag(node), **changes)


def clear_tag(node: Node) -> None:
    """Remove the node's tag."""
    node.meta.pop(_KEY, None)


def module_stack(node: Node) -> list[tuple[str, str]]:
    """Return (module name, class name) pairs from the outermost to the innermost module that ran the node."""
    stack = node.meta.get("nn_module_stack") or {}
    pairs = []
    for value in stack.values():
        name, cls = value
        if name.startswith("_empty_nn_module_stack"):
            continue
        pairs.append((name, cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"))
    adapted = any(is_adapter(kind) for _, kind in pairs)
    return [(own_name(name, adapted=adapted), kind) for name, kind in pairs]


def is_ours(node: Node) -> bool:
    """Return whether the node is one of the project's operators, which stand for their first argument or only read it."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aqnfx"


def tensor_value(node: Node) -> torch.Tensor | None:
    """Return the node's fake tensor, or None where it does not produce exactly one tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def static_size(size: int | torch.SymInt) -> int | torch.SymInt:
    """Return the integer for a size that is fixed, also where tracing left it as a symbol bound to one; else the symbol."""
    known = size if isinstance(size, int) else size.node.maybe_as_int()
    return size if known is None else int(known)


def size_text(size: int | torch.SymInt) -> int | str:
    """Return a size as records hold it: the integer where it is fixed, else the name of its symbol."""
    known = static_size(size)
    return known if isinstance(known, int) else str(known)


def is_float(node: Node) -> bool:
    """Return whether the node produces one floating-point tensor."""
    value = tensor_value(node)
    return value is not None and value.is_floating_point()


def constant(module: GraphModule, node: Node) -> Any:
    """Return the parameter or buffer that a ``get_attr`` node reads."""
    return attribute(module, str(node.target))


def attribute(module: GraphModule, name: str) -> Any:
    """Return the parameter or buffer of the (dotted) ``name``."""
    owner: Any = module
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner


def site_of(node: Node) -> Site | None:
    """Return the site that stands for the node's output, or None where the node is not a site."""
    tag = get_tag(node)
    value = tensor_value(node)
    if tag.op is None or tag.part_of is not None or tag.inserted_by is not None or value is None:
        return None
    return Site(
        module=tag.module, op=tag.op, ordinal=tag.ordinal, layer=tag.layer, stack=tag.stack, region=tag.region,
        shape=tuple(map(size_text, value.shape)),
        dtype=str(value.dtype).removeprefix("torch."),
    )  # fmt: skip


def site_nodes(graph: Graph) -> dict[str, Node]:
    """Return the nodes that are sites, by site id, in execution order."""
    return {site.id: node for node in graph.nodes if (site := site_of(node)) is not None}
