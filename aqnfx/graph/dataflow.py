"""Which site reads which: a traced graph reduced to its sites."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import nn
from torch.fx import Node

from aqnfx.graph.composites import is_move, users
from aqnfx.graph.edit import output_node
from aqnfx.graph.operands import value_key
from aqnfx.graph.opkinds import OpKind
from aqnfx.graph.program import Program
from aqnfx.graph.sites import Site
from aqnfx.graph.tags import constant, get_tag, site_of

_NO_PRODUCTS = frozenset({OpKind.ADD, OpKind.MUL, OpKind.OTHER})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dataflow:
    """The sites of a Program and what flows between them.

    ``graph`` has one node per site of role output, by id in execution order, and an edge from each to every site that reads
    its value: directly, through moves and inserted nodes, through choices (the indices of a top-k), but not through sizes.
    ``values`` are the nodes that a site reads from outside of itself, of each value the one nearest to it; ``parameters``
    the names of the parameters that it reads; ``outputs`` the sites that the model returns: of a language model the logits.
    """

    graph: nx.DiGraph[str]
    sites: dict[str, Site]
    nodes: dict[str, Node]
    values: dict[str, tuple[Node, ...]]
    parameters: dict[str, tuple[str, ...]]
    outputs: tuple[str, ...]


def dataflow(program: Program) -> Dataflow:
    """Return what flows between the sites of a tagged Program."""
    sites = {node: site for node in program.graph.nodes if (site := site_of(node)) is not None}
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(site.id for site in sites.values())
    names: dict[str, tuple[str, ...]] = {}
    sources: dict[Node, dict[str, None]] = {}
    parameters: dict[Node, dict[str, None]] = {}
    for node in program.graph.nodes:
        sources[node], parameters[node] = {}, {}
        if node.op == "get_attr" and isinstance(constant(program.module, node), nn.Parameter):
            parameters[node] = {str(node.target): None}
        if node.op != "call_function" or not _holds_tensors(node):
            continue
        read = _union(sources, node)
        taken = _union(parameters, node)
        if node in sites:
            name = sites[node].id
            graph.add_edges_from((source, name) for source in read)
            names[name] = tuple(taken)
            sources[node] = {name: None}
        else:
            sources[node], parameters[node] = read, taken
    owners = _owners(program, sites)
    values = {site.id: tuple(_external(node, owners)) for node, site in sites.items()}
    returned = {source: None for node in _returned(program) for source in sources[node]}
    return Dataflow(
        graph=graph, sites={s.id: s for s in sites.values()}, nodes={s.id: n for n, s in sites.items()}, values=values,
        parameters=names, outputs=tuple(returned),
    )  # fmt: skip


def _union(table: dict[Node, dict[str, None]], node: Node) -> dict[str, None]:
    return functools.reduce(lambda found, source: found | table[source], node.all_input_nodes, dict[str, None]())


def _holds_tensors(node: Node) -> bool:
    """Whether a node returns tensors: values flow through those, and not through sizes."""
    value = node.meta.get("val")
    return any(isinstance(v, torch.Tensor) for v in (value if isinstance(value, (tuple, list)) else (value,)))


def _owners(program: Program, sites: dict[Node, Site]) -> dict[Node, Node]:
    """The site that each node belongs to: itself, or the composite that it is a part of."""
    owners: dict[Node, Node] = {}
    for node in reversed(program.graph.nodes):
        kind = get_tag(node).part_of
        if node in sites:
            owners[node] = node
        elif kind is not None:
            for user in users(node):
                if user in owners and get_tag(owners[user]).op is kind:
                    owners[node] = owners[user]
                    break
    return owners


def _external(site: Node, owners: dict[Node, Node]) -> Iterator[Node]:
    """The values that a site and its parts read; of a value that is read whole its slices are left out."""
    found: dict[tuple[Node, object], Node] = {}
    ahead, seen = [site], {site}
    while ahead:
        for node in ahead.pop().all_input_nodes:
            if node in seen or not _holds_tensors(node):
                continue
            seen.add(node)
            if owners.get(node) is site or (is_move(node) and _joins(node, site, owners)):
                ahead.append(node)
            else:
                found.setdefault(value_key(node), node)
    whole = {base for base, parts in found if not parts}
    for (base, parts), node in found.items():
        if not parts or base not in whole:
            yield node


def _joins(node: Node, site: Node, owners: dict[Node, Node]) -> bool:
    """Whether a move takes up a value from inside of the site, as a rotation joins its halves."""
    seen, ahead = {node}, [node]
    while ahead:
        move = ahead.pop()
        if not is_move(move):
            continue
        for before in move.all_input_nodes:
            if owners.get(before) is site:
                return True
            if before not in seen:
                seen.add(before)
                ahead.append(before)
    return False


def _returned(program: Program) -> list[Node]:
    """The nodes of the logits, where the model returns such, else of everything that it returns."""
    returned: Any = output_node(program.graph).args[0]
    nodes = [node for node in returned if isinstance(node, Node)]
    if len(nodes) == 1 or len(nodes) != len(returned):
        return nodes
    logits = getattr(program.unflatten(nodes), "logits", None)
    return [logits] if isinstance(logits, Node) else nodes


def residual_adds(flow: Dataflow) -> dict[str, tuple[str, frozenset[str], tuple[str, ...]]]:
    """Return the additions x + f(x) of a residual stream: addition -> (x, the sites of f, those whose value f returns).

    ``x`` is the site that computes the value that goes around f. An addition counts where the other operand is computed from
    x and f holds a product with a weight. Where f adds up several branches, each returns a value.
    """
    order = {site: index for index, site in enumerate(flow.graph)}
    ids = {node: site for site, node in flow.nodes.items()}
    found = {}
    for add, site in flow.sites.items():
        if site.op is not OpKind.ADD or len(flow.values[add]) != 2:
            continue
        bases = [ids.get(value_key(node)[0]) for node in flow.values[add]]
        for skip, other in (bases, bases[::-1]):
            if skip is None or other is None or skip == other:
                continue
            branch = _branch(flow, skip, other, order)
            if any(flow.parameters[s] and flow.sites[s].op not in _NO_PRODUCTS for s in branch):
                found[add] = (skip, frozenset(branch), _writers(flow, other, branch))
    return found


def _branch(flow: Dataflow, skip: str, other: str, order: dict[str, int]) -> set[str]:
    """The sites on the paths from ``skip`` to ``other``, which is one of them; none where there is no path."""
    back, ahead = {other}, [other]
    while ahead:
        for site in flow.graph.predecessors(ahead.pop()):
            if site not in back and order[site] >= order[skip]:
                back.add(site)
                ahead.append(site)
    if skip not in back:
        return set()
    branch: set[str] = set(nx.descendants(flow.graph.subgraph(back), skip))
    return branch


def _writers(flow: Dataflow, other: str, branch: set[str]) -> tuple[str, ...]:
    if flow.sites[other].op is not OpKind.ADD:
        return (other,)
    return tuple(site for site in flow.graph.predecessors(other) if site in branch) or (other,)
