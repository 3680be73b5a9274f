"""Canonical text of a graph, its fingerprint, and the difference in operation counts between two graphs."""

from __future__ import annotations

import collections
import hashlib
from typing import Any

import torch
from torch.fx import Graph, Node

from aqnfx.graph.tags import get_tag


def target_name(node: Node) -> str:
    """Return a readable name of what a node calls or reads: ``aten.linear``, ``aqnfx.noise``, a parameter name."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        text = str(target)
        return text.removesuffix(".default")
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _argument(value: Any, names: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_argument(v, names) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_argument(v, names)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({_argument(value.start, names)}, {_argument(value.stop, names)}, {_argument(value.step, names)})"
    return repr(value)


def render(graph: Graph, *, tags: bool = False) -> str:
    """Return one line per node, numbered in execution order; parameters and inputs appear by name where they are used.

    With ``tags`` each line ends in the site or composite that the node belongs to. Node names do not appear, so equal
    graphs give equal text whatever they were called.
    """
    names: dict[Node, str] = {}
    lines = []
    for node in graph.nodes:
        if node.op == "get_attr":
            names[node] = f"@{node.target}"
            continue
        if node.op == "placeholder":
            names[node] = f"%{node.target}"
            lines.append(f"input %{node.target}")
            continue
        arguments = [_argument(a, names) for a in node.args]
        arguments += [f"{k}={_argument(v, names)}" for k, v in node.kwargs.items()]
        if node.op == "output":
            lines.append(f"return {', '.join(arguments)}")
            continue
        names[node] = f"%{len(lines)}"
        line = f"{names[node]} = {target_name(node)}({', '.join(arguments)})"
        tag = get_tag(node)
        if tags and (tag.op or tag.part_of or tag.inserted_by):
            mark = f"{tag.module}:{tag.op}:{tag.ordinal}" if tag.op else f"part of {tag.part_of}"
            line += f"  # {f'{tag.inserted_by} at {tag.site}' if tag.inserted_by else mark}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def fingerprint(graph: Graph) -> str:
    """Return the SHA-256 of the canonical text: equal for graphs that compute the same in the same order."""
    return hashlib.sha256(render(graph).encode()).hexdigest()


def op_counts(graph: Graph) -> collections.Counter[str]:
    """Return how often each function is called."""
    return collections.Counter(target_name(n) for n in graph.nodes if n.op == "call_function")


def op_diff(before: Graph, after: Graph) -> dict[str, int]:
    """Return the change in the number of calls per function, without zeros."""
    old, new = op_counts(before), op_counts(after)
    return {name: new[name] - old[name] for name in sorted(old | new) if new[name] != old[name]}
