"""Legality rules of a Program's graph, run after every pass; an error shows the neighbourhood of the offending node."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.fx import GraphModule, Node

from aqnfx.errors import VerificationError
from aqnfx.graph.functional import is_in_place
from aqnfx.graph.operands import role_of
from aqnfx.graph.opkinds import op_kind
from aqnfx.graph.render import target_name
from aqnfx.graph.sites import Role
from aqnfx.graph.tags import constant, get_tag, is_float, is_ours, module_stack, site_of, tensor_value
from aqnfx.ops.table import is_switched, stands_for

Finding = tuple[Node, str]
Rule = Callable[[GraphModule], Iterator[Finding]]


def _attributes_exist(module: GraphModule) -> Iterator[Finding]:
    for node in module.graph.nodes:
        if node.op == "get_attr":
            try:
                constant(module, node)
            except AttributeError:
                yield node, f"reads {node.target!r}, which the module does not have"


def _only_functions(module: GraphModule) -> Iterator[Finding]:
    for node in module.graph.nodes:
        if node.op in ("call_module", "call_method"):
            yield node, f"is a {node.op}; a normalised graph has functions only"


def _values_known(module: GraphModule) -> Iterator[Finding]:
    for node in module.graph.nodes:
        if node.op == "call_function" and node.users and "val" not in node.meta:
            yield node, "has users and no known value (meta['val'])"


def _inserted_keep_shape(module: GraphModule) -> Iterator[Finding]:
    for node in module.graph.nodes:
        value = stands_for(node)
        if get_tag(node).inserted_by is None or value is None:
            continue
        before, after = tensor_value(value), tensor_value(node)
        if before is None or after is None or before.dtype != after.dtype or before.dim() != after.dim():
            yield node, "does not keep shape and dtype of the value that it replaces"


def _inserted_not_bypassed(module: GraphModule) -> Iterator[Finding]:
    for node in module.graph.nodes:
        value = stands_for(node)
        if value is None or role_of(str(get_tag(node).site)) is not Role.OUTPUT:
            continue  # an operand is one reader's: the others read on
        others = [u for u in value.users if u is not node and get_tag(u).inserted_by is None]
        if others:
            yield node, f"is bypassed: {others[0].name} still uses {value.name} directly"


def _inserted_have_provenance(module: GraphModule) -> Iterator[Finding]:
    for node in module.graph.nodes:
        if node.op != "call_function" or get_tag(node).inserted_by:
            continue
        if is_ours(node):
            yield node, "is an aqnfx operation without the pass that inserted it"


def _one_noise_per_site(module: GraphModule) -> Iterator[Finding]:
    seen: set[str | None] = set()
    for node in module.graph.nodes:
        if is_switched(node):
            site = get_tag(node).site
            if site in seen:
                yield node, f"is the second perturbation at {site}"
            seen.add(site)


def _site_ids_unique(module: GraphModule) -> Iterator[Finding]:
    seen: dict[str, Node] = {}
    for node in module.graph.nodes:
        site = site_of(node)
        if site is not None:
            if site.id in seen:
                yield node, f"has the same site id as {seen[site.id].name}: {site.id}"
            seen[site.id] = node


def _inserted_keep_module(module: GraphModule) -> Iterator[Finding]:
    for node in module.graph.nodes:
        if node.op != "call_function" or get_tag(node).inserted_by is None or not node.args:
            continue
        source = node.args[0]
        if not isinstance(source, Node) or source.op != "call_function" or tensor_value(source) is None:
            continue  # sizes are shared by the whole graph
        if not is_ours(node) or role_of(str(get_tag(node).site)) is not Role.OUTPUT:
            continue  # what stands on an operand belongs to the operation that reads it; lowered nodes read anything
        if module_stack(source) != module_stack(node):
            yield node, "does not carry the module stack of the node that it follows"


def _functional(module: GraphModule) -> Iterator[Finding]:
    for node in module.graph.nodes:
        # Caches are written in place; values that a pass may touch never are.
        inserted = get_tag(node).inserted_by is not None
        if is_in_place(node) and not inserted and op_kind(node.target) is not None and is_float(node):
            yield node, f"changes its input in place ({target_name(node)})"


RULES: dict[str, Rule] = {
    "attributes-exist": _attributes_exist,
    "only-functions": _only_functions,
    "values-known": _values_known,
    "functional": _functional,
    "noise-keeps-shape": _inserted_keep_shape,
    "noise-not-bypassed": _inserted_not_bypassed,
    "aqnfx-ops-have-provenance": _inserted_have_provenance,
    "one-noise-per-site": _one_noise_per_site,
    "site-ids-unique": _site_ids_unique,
    "inserted-keep-module": _inserted_keep_module,
}


def neighbourhood(node: Node, *, reach: int = 2) -> str:
    """Return the lines around ``node`` in execution order, the node itself marked."""
    nodes = list(node.graph.nodes)
    at = nodes.index(node)
    lines = []
    for other in nodes[max(0, at - reach) : at + reach + 1]:
        lines.append(f"{'-->' if other is node else '   '} {other.format_node() or other.name}")
    return "\n".join(lines)


def verify(module: GraphModule, *, after: str) -> None:
    """Check every rule; raises :class:`VerificationError` naming the rule, the pass ``after`` and the first node."""
    for name, rule in RULES.items():
        for node, problem in rule(module):
            raise VerificationError(f"{after}: rule {name}: node {node.name} {problem}\n{neighbourhood(node)}")
    try:
        module.graph.lint()  # last: its message has no neighbourhood, so what a rule finds is better told by the rule
    except (RuntimeError, ValueError) as error:
        raise VerificationError(f"{after}: the graph is malformed: {error}") from error
