"""Recognise operations that are built from several nodes: RMSNorm, rotary embedding, gated units, tanh-GELU.

Structure comes first; where it is not recognised, the class name of the module. A composite is tagged at the node that
produces its result, its inner nodes as parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from aqnfx.graph.opkinds import MOVES, OpKind, base_name
from aqnfx.graph.tags import is_float, module_stack


@dataclass(frozen=True, slots=True, kw_only=True)
class Composite:
    """One recognised composite: its kind, the node with the result, and the nodes inside."""

    kind: OpKind
    result: Node
    parts: frozenset[Node]


def is_move(node: Node) -> bool:
    """Return whether the node only moves, selects or casts."""
    return node.op == "call_function" and base_name(node.target) in MOVES


def _name(node: object) -> str | None:
    return base_name(node.target) if isinstance(node, Node) and node.op == "call_function" else None


def source(node: Node) -> Node:
    """Return the node that ``node`` is a view, selection or cast of."""
    while is_move(node) and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _operands(node: Node) -> list[Node]:
    return [a for a in node.args if isinstance(a, Node)]


def users(node: Node) -> Iterator[Node]:
    """Users of ``node``, each once, looking through moves: many paths of moves may lead to one."""
    seen: set[Node] = set()
    ahead = [iter(node.users)]
    while ahead:
        user = next(ahead[-1], None)
        if user is None:
            ahead.pop()
        elif user not in seen:
            seen.add(user)
            if is_move(user):
                ahead.append(iter(user.users))
            elif user.op == "call_function":
                yield user


def _inverse_root(node: Node) -> Node | None:
    """Return the argument of 1/sqrt(x), or None: rsqrt, pow(x, -0.5), reciprocal(sqrt)."""
    name = _name(node)
    if name == "rsqrt" or (name == "pow" and node.args[1] == -0.5):
        return node.args[0]  # type: ignore[return-value]
    if name == "reciprocal" and _name(node.args[0]) == "sqrt":
        return node.args[0].args[0]  # type: ignore[union-attr,return-value]
    return None


def _mean_of_square(node: Node, inside: set[Node]) -> Node | None:
    """Return x where ``node`` is mean(x²), optionally plus a constant; collects the nodes on the way."""
    if _name(node) == "add" and len(_operands(node)) == 1:
        inside.add(node)
        node = _operands(node)[0]
    if _name(node) != "mean":
        return None
    inside.add(node)
    square = node.args[0]
    if not isinstance(square, Node):
        return None
    name, args = _name(square), square.args
    if not ((name == "pow" and args[1] == 2) or name == "square" or (name == "mul" and args[0] is args[1])):
        return None
    inside.add(square)
    return args[0] if isinstance(args[0], Node) else None


def _is_parameter(node: Node, inside: set[Node] | None = None) -> bool:
    """Return whether the node is a parameter, possibly cast or shifted by a constant (Gemma's 1 + weight)."""
    node = source(node)
    if _name(node) == "add" and len(_operands(node)) == 1:
        if inside is not None:
            inside.add(node)
        node = source(_operands(node)[0])
    return node.op == "get_attr"


def rms_norms(graph: Graph) -> Iterator[Composite]:
    """x · rsqrt(mean(x²) + eps), with or without a weight (Zhang and Sennrich, 2019)."""
    for node in graph.nodes:
        argument = _inverse_root(node)
        if argument is None:
            continue
        inside = {node}
        if _mean_of_square(argument, inside) is None:
            continue
        product = next((u for u in users(node) if _name(u) == "mul"), None)
        if product is None:
            continue
        result = product
        for user in users(product):
            others = [a for a in _operands(user) if source(a) is not product]
            weight: set[Node] = set()
            if _name(user) == "mul" and len(others) == 1 and _is_parameter(others[0], weight):
                inside |= {product} | weight
                result = user
                break
        yield Composite(kind=OpKind.RMS_NORM, result=result, parts=frozenset(inside))


def rotaries(graph: Graph) -> Iterator[Composite]:
    """x·cos + rotate(x)·sin, where rotate negates half of x (Su et al., 2021)."""
    for node in graph.nodes:
        if _name(node) not in ("cat", "stack", "concat") or not isinstance(node.args[0], (list, tuple)):
            continue
        negated = [n for n in node.args[0] if isinstance(n, Node) and _name(source(n)) == "neg"]
        if not negated:
            continue
        for product in users(node):
            if _name(product) != "mul":
                continue
            for total in users(product):
                others = [source(a) for a in _operands(total) if source(a) is not product]
                if _name(total) == "add" and len(others) == 1 and _name(others[0]) == "mul":
                    parts = frozenset({product, others[0], *(source(n) for n in negated)})
                    yield Composite(kind=OpKind.ROTARY, result=total, parts=parts)


def tanh_gelus(graph: Graph) -> Iterator[Composite]:
    """0.5·x·(1 + tanh(…)), the tanh form of GELU (Hendrycks and Gimpel, 2016)."""
    for node in graph.nodes:
        if _name(node) != "tanh":
            continue
        for shifted in users(node):
            if _name(shifted) != "add" or len(_operands(shifted)) != 1:
                continue
            for product in users(shifted):
                if _name(product) == "mul":
                    parts = {node, shifted}
                    half = [source(a) for a in _operands(product) if source(a) is not shifted]
                    parts |= {h for h in half if _name(h) == "mul" and len(_operands(h)) == 1}
                    inner = source(_operands(node)[0])  # what tanh is taken of, back to the input
                    base = source(_operands(half[0])[0]) if half and _operands(half[0]) else None
                    parts |= _between(inner, base)
                    yield Composite(kind=OpKind.GELU, result=product, parts=frozenset(parts))


def _between(node: Node, stop: Node | None, limit: int = 8) -> set[Node]:
    if stop is None or node is stop or limit == 0 or _name(node) not in ("mul", "add", "pow"):
        return set()
    found = {node}
    for operand in _operands(node):
        found |= _between(source(operand), stop, limit - 1)
    return found


def gated_units(graph: Graph, kinds: dict[Node, OpKind]) -> Iterator[Composite]:
    """act(gate) · up with act SiLU or GELU (Shazeer, 2020); the activation stays a site of its own."""
    for node in graph.nodes:
        operands = _operands(node)
        if _name(node) != "mul" or len(operands) != 2:
            continue
        sources = [source(a) for a in operands]
        gates = [s for s in sources if kinds.get(s) in (OpKind.SILU, OpKind.GELU)]
        others = [s for s in sources if s not in gates]
        if len(gates) == 1 and len(others) == 1 and not _is_parameter(others[0]):
            yield Composite(kind=OpKind.GLU, result=node, parts=frozenset())


_CLASSES: tuple[tuple[re.Pattern[str], OpKind], ...] = (
    (re.compile(r"RMSNorm|T5LayerNorm"), OpKind.RMS_NORM),
    (re.compile(r"LayerNorm$"), OpKind.LAYER_NORM),
    (re.compile(r"G(ELU|elu)"), OpKind.GELU),
    (re.compile(r"(SiLU|Silu|Swish)"), OpKind.SILU),
)


def by_class(graph: Graph, known: dict[Node, OpKind]) -> Iterator[Composite]:
    """Modules whose class name says what they are and in which no node of that kind was recognised."""
    groups: dict[str, tuple[OpKind, list[Node]]] = {}
    for node in graph.nodes:
        stack = module_stack(node)
        if not stack or node.op != "call_function" or is_move(node) or not is_float(node):
            continue
        name, cls = stack[-1]
        kind = next((k for pattern, k in _CLASSES if pattern.search(cls.rsplit(".", 1)[-1])), None)
        if kind is not None:
            groups.setdefault(name, (kind, []))[1].append(node)
    for kind, nodes in groups.values():
        if not any(known.get(n) == kind for n in nodes):
            yield Composite(kind=kind, result=nodes[-1], parts=frozenset(nodes[:-1]))


def linear_products(graph: Graph) -> Iterator[Node]:
    """matmul / mm whose second operand is a (transposed) parameter: a linear layer written out."""
    for node in graph.nodes:
        operands = _operands(node)
        if _name(node) in ("matmul", "mm") and len(operands) == 2 and source(operands[1]).op == "get_attr":
            yield node


def depends_on_data(graph: Graph, parameters: frozenset[Node]) -> frozenset[Node]:
    """Return the nodes that depend on a parameter or on a floating-point input, so not on positions and masks alone."""
    found: set[Node] = set(parameters)
    for node in graph.nodes:
        value = node.meta.get("val")
        if (node.op == "placeholder" and isinstance(value, torch.Tensor) and value.is_floating_point()) or any(
            n in found for n in node.all_input_nodes
        ):
            found.add(node)
    return frozenset(found)
