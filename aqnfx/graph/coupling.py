"""Coupling groups: weights that a runtime stores or multiplies together, and that should have one format.

They are found from what reads what, never from names.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from aqnfx.graph.operands import Place, origin, value_key
from aqnfx.graph.opkinds import OpKind, base_name
from aqnfx.graph.program import Program
from aqnfx.graph.sites import Role
from aqnfx.graph.tags import constant, get_tag

SHARED, TIED, EXPERTS = "shared input", "tied weight", "experts of one router"
REASONS = (TIED, EXPERTS, SHARED)
"""Why weights are coupled, the strongest reason first: it names a group that has several."""

_LINEAR_LIKE = frozenset({OpKind.LINEAR, OpKind.MATMUL, OpKind.BMM, OpKind.GROUPED_MM})
_ATTENTION = frozenset({OpKind.SDPA, OpKind.MATMUL, OpKind.BMM})


@dataclass(frozen=True, slots=True, kw_only=True)
class CouplingGroup:
    """Weights that belong together: at least two site ids of role weight, in execution order.

    ``reason`` is one of ``"shared input"``, ``"tied weight"`` and ``"experts of one router"``; ``name`` is short text for
    reports, such as ``model.layers.0.self_attn.{q_proj,k_proj,v_proj}``. Raises ``ValueError`` for less than two sites and
    for another reason.
    """

    sites: tuple[str, ...]
    reason: str
    name: str

    def __post_init__(self) -> None:
        if len(set(self.sites)) < 2 or len(set(self.sites)) < len(self.sites):
            raise ValueError(f"a coupling group has at least two different sites, found {self.sites}")
        if self.reason not in REASONS:
            raise ValueError(f"reason {self.reason!r} is not one of {', '.join(REASONS)}")


def coupling_groups(program: Program) -> tuple[CouplingGroup, ...]:
    """Return the groups of weights that runtimes fuse or store once, disjoint, in execution order of their first sites.

    - *tied weight*: operations that read the same parameter, slices of it included.
    - *experts of one router*: products between a router's input and its choice (top-k), or that the choice steers.
    - *shared input*: products of one layer that read the same value and either meet in one attention (query, key and
      value) or feed the same following products (gate and up). A router, and an MLP that runs beside attention on the
      same norm, do neither.

    Groups that overlap are one group under the stronger reason, in that order. A weight that is fused in the checkpoint
    is one site and makes no group. ``program`` must have been tagged by ``tag-layers,tag-ops``; else there are no sites.
    """
    weights = [place for place in program.places.values() if place.site.role is Role.WEIGHT]
    order = {place.site.id: index for index, place in enumerate(weights)}
    found = [(TIED, group) for group in _tied(program, weights)]
    experts = list(_experts(program.graph, weights))
    found += [(EXPERTS, group) for group in experts]
    routed = {site for group in experts for site in group}  # of many experts every two would be compared in vain
    choosers = _choosers(program.graph, {place.node for place in weights})
    products = {
        place.node: place
        for place in weights
        if place.site.op in _LINEAR_LIKE and place.site.id not in routed and place.node not in choosers
    }
    found += [(SHARED, group) for group in _shared(products, {place.node for place in weights if place.position})]
    modules = {place.site.id: place.site.module for place in weights}
    groups = []
    for sites, reason in _merged(found):
        ordered = tuple(sorted(sites, key=order.__getitem__))
        groups.append(CouplingGroup(sites=ordered, reason=reason, name=_name([modules[s] for s in ordered])))
    return tuple(sorted(groups, key=lambda group: order[group.sites[0]]))


def _tied(program: Program, weights: Iterable[Place]) -> Iterator[set[str]]:
    readers: dict[int, set[str]] = collections.defaultdict(set)
    for place in weights:
        source = origin(place.value)
        if source.op == "get_attr":
            readers[id(constant(program.module, source))].add(place.site.id)
    yield from readers.values()


def _choices(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "call_function" and base_name(node.target) == "topk"]




def _choosers(graph: Graph, readers: set[Node]) -> set[Node]:
    """The products whose values only decide a choice: a router's, and an indexer's that picks what attention looks at."""
    choices = set(_choices(graph))
    behind: set[Node] = set()
    ahead = list(choices)
    while ahead:
        for node in ahead.pop().all_input_nodes:
            if node not in behind and node.op == "call_function":
                behind.add(node)
                if node not in readers:
                    ahead.append(node)
    return {node for node in behind & readers if not _reaches_past(node, choices, readers)}


def _reaches_past(start: Node, choices: set[Node], readers: set[Node]) -> bool:
    """Whether a value gets to another product with a weight, or to the output, on a path without a choice."""
    seen, ahead = {start}, [start]
    while ahead:
        for user in ahead.pop().users:
            if user in readers or user.op == "output":
                return True
            if user not in seen and user not in choices:
                seen.add(user)
                ahead.append(user)
    return False


def _experts(graph: Graph, weights: Iterable[Place]) -> Iterator[set[str]]:
    """The products of each router's experts; routers that choose in several steps are one."""
    products: dict[Node, list[str]] = collections.defaultdict(list)
    for place in weights:
        if place.site.op in _LINEAR_LIKE:
            products[place.node].append(place.site.id)
    seen: set[Node] = set()
    for choice in _choices(graph):
        if choice in seen:
            continue
        steered, mixed = _steered(graph, choice)
        seen |= steered
        inputs = {value_key(p.args[0])[0] for p in _first_products(choice) if p.args and isinstance(p.args[0], Node)}
        inside = steered | {node for value in mixed for node in _between(value, inputs)}
        group = {site for node, sites in products.items() if node in inside for site in sites}
        yield group - {site for node in _first_products(choice) for site in products.get(node, [])}


def _steered(graph: Graph, choice: Node) -> tuple[set[Node], list[Node]]:
    """What depends on a choice before it is added to anything else, and the values that are multiplied with it."""
    layer, found, mixed = _layer(choice), {choice}, []
    fixed = {node for node in graph.nodes if node.op == "get_attr"}
    started = False
    for node in graph.nodes:
        started = started or node is choice
        if node.op == "call_function" and all(n in fixed for n in node.all_input_nodes):
            fixed.add(node)  # computed from parameters alone
        if not started or node.op != "call_function" or not any(n in found for n in node.all_input_nodes):
            continue
        others = [n for n in node.all_input_nodes if n not in found and n not in fixed]
        tag = get_tag(node)
        if tag.layer is not None and _layer(node) != layer:
            continue
        if tag.op is OpKind.ADD and others:
            continue  # the residual stream, or a shared expert
        if tag.op in (OpKind.MUL, OpKind.MATMUL, OpKind.BMM):
            mixed += others
        found.add(node)
    return found, mixed


def _first_products(choice: Node) -> list[Node]:
    """The products that a choice is computed from: the router's."""
    found: list[Node] = []
    ahead, seen = [choice], {choice}
    while ahead:
        for node in ahead.pop().all_input_nodes:
            if node in seen or node.op != "call_function":
                continue
            seen.add(node)
            (found if get_tag(node).op in _LINEAR_LIKE else ahead).append(node)
    return found


def _between(value: Node, stops: set[Node]) -> set[Node]:
    """The nodes that ``value`` is computed from, back to ``stops``; none where a path misses all of them."""
    found, ahead = {value}, [value]
    if value in stops:
        return set()
    while ahead:
        for node in ahead.pop().all_input_nodes:
            if node.op == "placeholder" and get_tag(node).inserted_by is None:
                return set()
            if node not in stops and node not in found and node.op == "call_function":
                found.add(node)
                ahead.append(node)
    return found


def _shared(products: dict[Node, Place], readers: set[Node]) -> Iterator[set[str]]:
    by_input: dict[Any, list[Node]] = collections.defaultdict(list)
    for node, place in products.items():
        position = 1 if base_name(node.target) in ("addmm", "baddbmm") else 0
        value = node.args[position]
        if place.position != position and isinstance(value, Node):
            by_input[_layer(node), value_key(value)].append(node)
    order = {node: index for index, node in enumerate(next(iter(products)).graph.nodes)} if products else {}
    for nodes in by_input.values():
        ahead = {node: _ahead(node, readers, order) for node in nodes} if len(nodes) > 1 else {}
        for index, one in enumerate(nodes):
            for other in nodes[index + 1 :]:
                if _fuse(ahead[one], ahead[other]):
                    yield {products[one].site.id, products[other].site.id}


@dataclass(frozen=True, slots=True)
class _Ahead:
    """What follows a product in its layer: all nodes in the order of the graph, and the first products of each path."""

    nodes: dict[Node, None]
    products: frozenset[Node]


def _ahead(start: Node, readers: set[Node], order: dict[Node, int]) -> _Ahead:
    layer = _layer(start)
    nodes: set[Node] = set()
    first: set[Node] = set()
    front = [(start, True)]
    before: set[Node] = set()  # reached without passing another product with a weight
    while front:
        node, direct = front.pop()
        for user in node.users:
            if user.op != "call_function" or (get_tag(user).layer is not None and _layer(user) != layer):
                continue
            if direct and user in readers:
                first.add(user)
            on = direct and user not in readers
            if user not in nodes or (on and user not in before):
                nodes.add(user)
                if on:
                    before.add(user)
                front.append((user, on))
    return _Ahead(dict.fromkeys(sorted(nodes, key=order.__getitem__)), frozenset(first))


def _fuse(one: _Ahead, other: _Ahead) -> bool:
    """Whether two products of one input feed the same products, or meet first in an attention."""
    if one.products and one.products == other.products:
        return True
    meeting = next((node for node in one.nodes if node in other.nodes), None)
    return meeting is not None and get_tag(meeting).op in _ATTENTION


def _layer(node: Node) -> tuple[str | None, int | None]:
    tag = get_tag(node)
    return tag.stack, tag.layer


def _merged(found: Iterable[tuple[str, set[str]]]) -> list[tuple[set[str], str]]:
    """Join what overlaps, and leave out what is alone."""
    groups: list[tuple[set[str], str]] = []
    for reason, sites in found:
        if len(sites) < 2:
            continue
        touching = [group for group in groups if group[0] & sites]
        reasons = [reason, *(r for _, r in touching)]
        joined = sites.union(*(s for s, _ in touching))
        groups = [group for group in groups if group not in touching]
        groups.append((joined, min(reasons, key=REASONS.index)))
    return groups


def _name(modules: list[str]) -> str:
    """``a.b.{c,d}`` for the modules a.b.c and a.b.d; one name where they are one."""
    unique = list(dict.fromkeys(modules))
    if len(unique) == 1:
        return unique[0]
    split = [module.split(".") for module in unique]
    common = 0
    while all(len(parts) > common + 1 for parts in split) and len({parts[common] for parts in split}) == 1:
        common += 1
    return ".".join([*split[0][:common], "{" + ",".join(".".join(parts[common:]) for parts in split) + "}"])
