"""The static structure of a traced model: what each site costs, and where it stands in the flow of values."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import networkx as nx
from torch.fx import Node

from aqnfx.errors import InputError, nearest
from aqnfx.graph.coupling import CouplingGroup, coupling_groups
from aqnfx.graph.dataflow import Dataflow, dataflow, residual_adds
from aqnfx.graph.flops import Sizes, input_shapes, node_flops
from aqnfx.graph.operands import role_of, value_key
from aqnfx.graph.opkinds import OpKind
from aqnfx.graph.program import Program
from aqnfx.graph.sites import Role
from aqnfx.graph.tags import attribute

BALANCE = 295.0
"""FLOP per byte of an NVIDIA H100 SXM: 989 TFLOP/s of dense bf16 and 3.35 TB/s of memory, from its data sheet."""

_SOURCE, _SINK = "<inputs>", "<output>"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteStructure:
    """One site of role output, and the operation that computes it.

    - ``flops``: of products, see :func:`aqnfx.graph.flops.node_flops`. ``bytes_read``: every value and parameter that the
      operation reads, once (of a table of embeddings the rows that are looked up); ``bytes_written``: its result.
    - ``parameters``, ``parameter_bytes``: of the parameters ``parameter_names`` that the operation reads; those that several
      operations read count at each.
    - ``intensity``: flops / bytes; ``bound``: ``"compute"`` where that is at least the balance of the machine, else
      ``"memory"``.
    - ``depth``: the number of sites before it on the longest path from the inputs. ``fan_out``: sites that read its value.
    - ``residual``: ``"stream"`` (an addition to the residual stream, or a value that goes around a branch), ``"read"`` (reads
      the stream into a branch), ``"inside"`` of a branch, ``"write"`` (its value is added to the stream) or ``"outside"``;
      ``merges_at``: the addition where its branch ends.
    - ``dominator``: the last site before it that every path from the model's inputs crosses; ``post_dominator``: the first one
      after it that every path to the output crosses; None where there is no such site. ``single_path``: every path from
      the inputs to the output crosses this site. Paths are those of values: positions and masks start none.
    - ``reaches_output``: whether there is a path to the output. ``group``: the name of the coupling group of its weight.
    """

    id: str
    module: str
    op: str
    layer: str | None
    region: str
    flops: int
    bytes_read: int
    bytes_written: int
    parameters: int
    parameter_bytes: int
    parameter_names: tuple[str, ...]
    intensity: float
    bound: str
    depth: int
    fan_out: int
    residual: str
    merges_at: str | None
    dominator: str | None
    post_dominator: str | None
    single_path: bool
    reaches_output: bool
    group: str | None


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The structure of a model: its sites in execution order, its coupling groups, and totals that count nothing twice.

    ``inputs`` are the shapes that FLOPs and bytes are for, ``balance`` the FLOP per byte of the machine. ``parameters`` and
    ``parameter_bytes`` count every parameter that an operation reads once. ``edges`` are (site, reader) pairs.
    """

    inputs: Mapping[str, tuple[int, ...]]
    balance: float
    sites: tuple[SiteStructure, ...]
    groups: tuple[CouplingGroup, ...]
    edges: tuple[tuple[str, str], ...]
    flops: int
    bytes_moved: int
    parameters: int
    parameter_bytes: int

    @functools.cached_property
    def _by_id(self) -> dict[str, SiteStructure]:
        return {site.id: site for site in self.sites}

    def site(self, site: str) -> SiteStructure:
        """Return the record of a site; of an operand that of the operation that reads it. :class:`InputError` without."""
        role = role_of(site)
        name = site if role is Role.OUTPUT else site.removesuffix(f":{role}")
        if name not in self._by_id:
            raise InputError(f"the model has no site {site!r}{nearest(name, self._by_id)}")
        return self._by_id[name]

    def dominators(self, site: str) -> tuple[str, ...]:
        """Return the sites that every path from the inputs to ``site`` crosses, in order, without the site itself."""
        return tuple(reversed(self._chain(site, "dominator")))

    def post_dominators(self, site: str) -> tuple[str, ...]:
        """Return the sites that every path from ``site`` to the output crosses, in order, without the site itself."""
        return tuple(self._chain(site, "post_dominator"))

    def _chain(self, site: str, which: str) -> list[str]:
        found: list[str] = []
        following = getattr(self.site(site), which)
        while following is not None:
            found.append(following)
            following = getattr(self.site(following), which)
        return found

    def graph(self) -> nx.DiGraph[str]:
        """Return the sites and what reads them as a new networkx graph; nodes carry the fields of their records."""
        graph: nx.DiGraph[str] = nx.DiGraph()
        for site in self.sites:
            graph.add_node(site.id, **{key: value for key, value in asdict(site).items() if key != "id"})
        graph.add_edges_from(self.edges)
        return graph

    def to_record(self) -> dict[str, Any]:
        """Return the structure as plain JSON values."""
        return {
            "inputs": {name: list(shape) for name, shape in self.inputs.items()}, "balance": self.balance,
            "totals": {
                "flops": self.flops, "bytes_moved": self.bytes_moved, "parameters": self.parameters,
                "parameter_bytes": self.parameter_bytes, "sites": len(self.sites),
            },
            "sites": [asdict(site) | {"parameter_names": list(site.parameter_names)} for site in self.sites],
            "groups": [{"name": g.name, "reason": g.reason, "sites": list(g.sites)} for g in self.groups],
            "edges": [list(edge) for edge in self.edges],
        }  # fmt: skip


def structure(
    program: Program, *, batch: int | None = None, tokens: int | None = None, balance: float = BALANCE
) -> Structure:
    """Return the static structure of a Program that ``tag-layers,tag-ops`` have tagged; nothing is run.

    FLOPs and bytes are those of one forward pass of ``batch`` samples of ``tokens`` positions; what is not given is as in
    the inputs that the model was traced with. ``balance`` in FLOP per byte is what tells compute-bound operations from
    memory-bound ones. Raises :class:`InputError` for a program without sites, numbers below 1, a balance that is not
    positive, and sizes that the trace has fixed otherwise.
    """
    check_options(batch=batch, tokens=tokens, balance=balance)
    if not program.sites:
        raise InputError("the program has no sites; run the passes tag-layers,tag-ops first")
    shapes = input_shapes(program, batch, tokens)
    sizes = Sizes(program, shapes)
    flow = dataflow(program)
    groups = coupling_groups(program)
    coupled = {site: group.name for group in groups for site in group.sites}
    places = _residual_places(flow)
    paths = _Paths(flow)
    depths = _depths(flow)
    records = []
    for site, about in flow.sites.items():
        node = flow.nodes[site]
        flops, read, written = node_flops(node, sizes), _bytes_read(flow, site, sizes), sizes.nbytes(node)
        tensors = [attribute(program.module, name) for name in flow.parameters[site]]
        intensity = flops / (read + written) if read + written else 0.0
        residual, merges_at = places.get(site, ("outside", None))
        records.append(SiteStructure(
            id=site, module=about.module, op=str(about.op), layer=program.layer_label(about.stack, about.layer),
            region=about.region, flops=flops, bytes_read=read, bytes_written=written,
            parameters=sum(t.numel() for t in tensors), parameter_bytes=sum(t.nbytes for t in tensors),
            parameter_names=flow.parameters[site], intensity=intensity, bound="compute" if intensity >= balance else "memory",
            depth=depths[site], fan_out=flow.graph.out_degree(site), residual=residual, merges_at=merges_at,
            dominator=paths.before.get(site), post_dominator=paths.after.get(site), single_path=site in paths.single,
            reaches_output=site in paths.reaching, group=coupled.get(f"{site}:{Role.WEIGHT}"),
        ))  # fmt: skip
    names = {name for record in records for name in record.parameter_names}
    unique = {id(tensor): tensor for tensor in (attribute(program.module, name) for name in names)}.values()
    return Structure(
        inputs=shapes, balance=balance, sites=tuple(records), groups=groups, edges=tuple(flow.graph.edges),
        flops=sum(r.flops for r in records), bytes_moved=sum(r.bytes_read + r.bytes_written for r in records),
        parameters=sum(t.numel() for t in unique), parameter_bytes=sum(t.nbytes for t in unique),
    )  # fmt: skip


MOST = 10**7
"""Largest batch, and most tokens, that can be meant."""


def check_options(*, batch: int | None, tokens: int | None, balance: float) -> None:
    """Raise :class:`InputError` for what :func:`structure` cannot take whatever the program is."""
    for name, value in (("batch", batch), ("tokens", tokens)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value} must be at least 1")
        if value is not None and value > MOST:
            raise InputError(f"{name} {str(value)[:40]} must be at most {MOST:,}")
    if not (balance > 0 and math.isfinite(balance)):
        raise InputError(f"the machine's balance {balance} must be a positive number of FLOP per byte")


def _bytes_read(flow: Dataflow, site: str, sizes: Sizes) -> int:
    """Bytes of what an operation reads: a view that repeats values counts them once, a look-up the rows that it returns."""
    kind, node = flow.sites[site].op, flow.nodes[site]
    total = 0
    for value in flow.values[site]:
        base = value_key(value)[0]
        size = sizes.nbytes(value)
        if base is not value and _one_tensor(base):
            size = min(size, sizes.nbytes(base))
        if base.op == "get_attr" and kind is OpKind.EMBEDDING:
            size = min(size, sizes.nbytes(node))
        if base.op == "get_attr" and kind is OpKind.GROUPED_MM:
            matrices, rows = sizes.shape(value)[0], math.prod(sizes.shape(node)[:-1])
            size = size * min(matrices, rows) // matrices  # no more experts than rows can be chosen
        total += size
    return total


def _one_tensor(node: Node) -> bool:
    return hasattr(node.meta.get("val"), "dtype")


class _Paths:
    """Dominators of the flow of values, from its first sites to the output."""

    def __init__(self, flow: Dataflow) -> None:
        data = [site for site, about in flow.sites.items() if about.region != "position"]
        graph: nx.DiGraph[str] = nx.DiGraph(flow.graph.subgraph(data))
        fed = _fed(flow)
        starts = [site for site in data if site in fed and not any(True for _ in graph.predecessors(site))]
        graph.add_edges_from((_SOURCE, site) for site in starts)
        graph.add_edges_from((site, _SINK) for site in flow.outputs if site in graph)
        reverse = graph.reverse(copy=False)
        before = nx.immediate_dominators(graph, _SOURCE)
        after = nx.immediate_dominators(reverse, _SINK) if _SINK in graph else {}
        self.reaching = set(after) - {_SOURCE}
        self.before = {site: other for site, other in before.items() if other not in (_SOURCE, site)}
        self.after = {site: other for site, other in after.items() if other not in (_SINK, site)}
        self.single = set()
        crossed = before.get(_SINK)
        while crossed not in (None, _SOURCE):
            self.single.add(crossed)
            crossed = before[crossed]


def _fed(flow: Dataflow) -> set[str]:
    """The sites that the model's inputs reach: what is computed from parameters alone is no beginning of a path."""
    fed: set[Node] = set()
    for node in next((node.graph.nodes for node in flow.nodes.values()), ()):
        if node.op == "placeholder" or any(before in fed for before in node.all_input_nodes):
            fed.add(node)
    return {site for site, node in flow.nodes.items() if node in fed}


def _depths(flow: Dataflow) -> dict[str, int]:
    depths: dict[str, int] = {}
    for site in flow.graph:  # execution order is a topological order
        depths[site] = 1 + max((depths[before] for before in flow.graph.predecessors(site)), default=-1)
    return depths


def _residual_places(flow: Dataflow) -> dict[str, tuple[str, str | None]]:
    """Site -> (place, the addition where its branch ends) for what is on a residual stream or in one of its branches."""
    adds = residual_adds(flow)
    stream = set(itertools.chain.from_iterable((add, skip) for add, (skip, _, _) in adds.items()))
    found: dict[str, tuple[str, str | None]] = {site: ("stream", None) for site in stream}
    for add, (skip, branch, writers) in adds.items():
        readers = set(flow.graph.successors(skip))
        for site in branch - stream:
            place = "write" if site in writers else "read" if site in readers else "inside"
            found.setdefault(site, (place, add))
    return found
