"""Operands: the tensors that products read (inputs, weights, keys and values), as sites of their own.

A site of role output is the value that a node returns; an operand is an edge, from a value to one operation that reads it.
A perturbation there reaches that operation only: the other readers of a tied weight, or of the input that three projections
share, go on with the clean value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from aqnfx.graph.composites import is_move, users
from aqnfx.graph.opkinds import OpKind, base_name, channel_dim
from aqnfx.graph.sites import OPERANDS, Role, Site
from aqnfx.graph.tags import get_tag, is_float, is_ours, site_of, size_text, static_size, tensor_value
from aqnfx.ops.table import stands_for

PRODUCTS = frozenset({
    OpKind.LINEAR, OpKind.MATMUL, OpKind.BMM, OpKind.SDPA, OpKind.EMBEDDING, OpKind.CONV, OpKind.GROUPED_MM,
})  # fmt: skip
"""The kinds of operations whose operands are sites."""


# Moves that keep every value, in another shape or dtype; the other moves select, so what they return is another input.
_WHOLE = frozenset({
    "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "transpose", "permute", "t", "mT", "contiguous", "clone",
    "detach", "alias", "to", "_to_copy", "type_as", "float", "half", "bfloat16", "unsqueeze", "squeeze", "flatten",
    "unflatten", "dropout", "movedim", "swapaxes", "swapdims", "expand", "expand_as", "identity", "lift_fresh",
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Place:
    """Where a site is in a graph.

    For an output ``node`` returns the value; for an operand ``node`` reads it as its argument number ``position``. ``dim``
    is the dimension that the product sums over, along which rows and blocks of a format run; ``channel_dim`` that of the
    output channels of a weight and of the channels of anything else.
    """

    site: Site
    node: Node
    position: int | None = None
    dim: int = -1
    channel_dim: int = -1

    @property
    def value(self) -> Node:
        """The node that the value comes from, past what was inserted between."""
        if self.position is None:
            return self.node
        found = self.node.args[self.position]
        assert isinstance(found, Node)  # an operand is a node when it is found
        return found


def role_of(site: str) -> Role:
    """Return the role that a site id says."""
    last = site.rpartition(":")[2]
    return Role(last) if last in OPERANDS else Role.OUTPUT


def places(graph: Graph) -> dict[str, Place]:
    """Return every site of a tagged graph by its id, in execution order: an operation's operands stand before its output."""
    found: dict[str, Place] = {}
    for node in graph.nodes:
        site = site_of(node)
        if site is None:
            continue
        for place in _operands(node, site):
            found[place.site.id] = place
        value = tensor_value(node)
        dims = value.dim() if value is not None else 0
        found[site.id] = Place(site=site, node=node, channel_dim=channel_dim(site.op, dims))
    return found


def _operands(node: Node, site: Site) -> Iterator[Place]:
    for position, role, dim, channels in _roles(node, site.op):
        operand = node.args[position] if position < len(node.args) else None
        if not isinstance(operand, Node) or not is_float(operand):
            continue
        value = tensor_value(operand)
        assert value is not None  # a float tensor
        of = Site(
            module=site.module, op=site.op, role=role, ordinal=site.ordinal, layer=site.layer, stack=site.stack,
            region=site.region, shape=tuple(map(size_text, value.shape)), dtype=str(value.dtype).removeprefix("torch."),
        )  # fmt: skip
        yield Place(site=of, node=node, position=position, dim=dim, channel_dim=channels)


def _roles(node: Node, op: OpKind) -> tuple[tuple[int, Role, int, int], ...]:
    """Return (argument, role, dimension that is summed over, dimension of the channels) of the operands of a node."""
    name = base_name(node.target)
    if name == "linear":
        return (0, Role.INPUT, -1, -1), (1, Role.WEIGHT, -1, 0)
    if name in ("addmm", "baddbmm"):
        return (1, Role.INPUT, -1, -1), _second(node, 2)
    if name in ("matmul", "mm", "bmm"):
        return (0, Role.INPUT, -1, -1), _second(node, 1)
    if op is OpKind.SDPA and name == "scaled_dot_product_attention":
        return (0, Role.INPUT, -1, -1), (1, Role.KEY, -1, -1), (2, Role.VALUE, -1, -1)
    if name == "embedding":
        return ((0, Role.WEIGHT, -1, 0),)
    if op is OpKind.CONV and name is not None:
        # (in, out, …) where it is transposed, else (out, in, …)
        weight = (0, 1) if "transpose" in name or (name == "convolution" and node.args[6] is True) else (1, 0)
        return (0, Role.INPUT, 1, 1), (1, Role.WEIGHT, *weight)
    if op is OpKind.GROUPED_MM:
        return (0, Role.INPUT, -1, -1), _second(node, 1)
    return ()


def _second(node: Node, position: int) -> tuple[int, Role, int, int]:
    """Return the entry of :func:`_roles` for the second operand of a product, (…, summed over, output channels)."""
    operand = node.args[position] if position < len(node.args) else None
    if isinstance(operand, Node) and origin(operand).op == "get_attr":
        return position, Role.WEIGHT, -2, -1
    first = node.args[position - 1]
    # Keys and values are stored token by token, so their rows and channels are those that a fused attention reads:
    # keys stand here turned, and the product with the values sums over the tokens.
    if isinstance(first, Node) and get_tag(origin(first)).op is OpKind.SOFTMAX:
        return position, Role.VALUE, -1, -1
    if _reaches_softmax(node):
        return position, Role.KEY, -2, -2
    return position, Role.OTHER, -2, -1


def origin(node: Node) -> Node:
    """Return the node that ``node`` is a view, selection, cast or perturbed copy of."""
    while (before := one_back(node)) is not None:
        node = before
    return node


def one_back(node: Node) -> Node | None:
    """Return the node that ``node`` is directly a view, selection, cast or perturbed copy of, None where it computes."""
    if get_tag(node).inserted_by is not None:
        return _replaced(node)
    if is_move(node) and node.args and isinstance(node.args[0], Node):
        return node.args[0]
    return None


def value_key(node: Node) -> tuple[Node, tuple[Any, ...]]:
    """Return what two reads of the same value have in common: the node that computes it, and which part of it was taken."""
    parts: list[Any] = []
    while (before := one_back(node)) is not None:
        if is_move(node) and base_name(node.target) not in _WHOLE and not _is_whole_slice(node):
            parts.append((base_name(node.target), str(node.args[1:]), str(node.kwargs)))
        node = before
    return node, tuple(parts)


def _is_whole_slice(node: Node) -> bool:
    """``x[:]``, which traced models are full of."""
    start, end, step = (*node.args[2:5], *(None,) * 3)[:3]
    whole = (0, None), (torch.iinfo(torch.int64).max, None), (1, None)
    numbers = all(value is None or isinstance(value, int) for value in (start, end, step))
    return base_name(node.target) == "slice" and numbers and all(v in w for v, w in zip((start, end, step), whole, strict=True))


def read_as_returned(places: Mapping[str, Place]) -> dict[str, str]:
    """Return operand -> output, site ids, where a product reads a value as an operation returns it, along the same rows.

    A format stores such a value once: what is stored in it already does not change when it is read in it.
    """
    outputs = {place.node: place for place in places.values() if place.position is None}
    found = {}
    for site, place in places.items():
        output = None if place.position is None else outputs.get(origin(place.value))
        if output is None:
            continue
        read, returned = (tensor_value(node) for node in (place.value, output.node))
        assert read is not None  # operands and outputs are tensors
        assert returned is not None
        rows = all(v.dim() and d in (-1, v.dim() - 1) for d, v in ((place.dim, read), (output.dim, returned)))
        if rows and str(static_size(read.shape[-1])) == str(static_size(returned.shape[-1])):
            found[site] = output.site.id
    return found


def _replaced(node: Node) -> Node | None:
    """Return the value that an inserted node took the place of; ``lower-ops`` makes of one node many, all of its site."""
    if is_ours(node):
        return stands_for(node)
    site, seen, ahead = get_tag(node).site, {node}, [node]
    while ahead:
        for found in ahead.pop().all_input_nodes:
            tag = get_tag(found)
            if not is_float(found):
                continue  # sizes and counters
            if tag.inserted_by is None or (found.op == "call_function" and tag.site not in (None, site)):
                return found
            if found.op == "call_function" and tag.site == site and found not in seen:  # no control buffer, no batch size
                seen.add(found)
                ahead.append(found)
    return None


def _reaches_softmax(node: Node, steps: int = 6) -> bool:
    """Return whether a softmax reads the value after at most ``steps`` element-wise operations: scale, cap, mask."""
    seen, front = {node}, [node]
    for _ in range(steps + 1):
        readers = [user for one in front for user in _readers(one, seen)]
        if any(OpKind.SOFTMAX in (get_tag(user).op, get_tag(user).part_of) for user in readers):
            return True
        front = [user for user in readers if get_tag(user).op in (OpKind.ADD, OpKind.MUL, OpKind.OTHER)]
    return False


def _readers(node: Node, seen: set[Node]) -> Iterator[Node]:
    """Users of ``node`` that are not in ``seen``, looking through moves and through what was inserted."""
    for user in users(node):
        if user not in seen:
            seen.add(user)
            if get_tag(user).inserted_by is not None:
                yield from _readers(user, seen)
            else:
                yield user

