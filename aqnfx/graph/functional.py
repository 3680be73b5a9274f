"""Operations that change a tensor in place, as operations that return a new one."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

_FRESH = frozenset({torch.ops.aten.linear.default, torch.ops.aten.matmul.default})
"""Composite operations that never return their input."""
_ALIASING = frozenset({torch.ops.aten._unsafe_view.default})
"""Operations whose result shares memory with an argument although their schema does not say so."""


def is_in_place(node: Node) -> bool:
    """Return whether a node is an operation that writes into an argument."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_mutable(graph: Graph) -> bool:
    """Return whether any operation of the graph, or of the regions in it, changes a tensor in place."""
    return any(is_in_place(node) for part in (graph, *_regions(graph)) for node in part.nodes)


def make_functional(graph: Graph) -> bool:
    """Put the functional operation in place of every one that changes a value in place; return whether all could be.

    It can where nothing but the result of the operation shows the change (:func:`changes_unseen`), and where both results have
    the same dtype, shape and strides; not within regions (``torch.no_grad``). Otherwise the graph is left as it was.
    """
    if any(is_in_place(node) for region in _regions(graph) for node in region.nodes):
        return False
    found: dict[Node, torch._ops.OpOverload] = {}
    for node in graph.nodes:
        if not is_in_place(node):
            continue
        target = functional_of(node.target)
        unseen = target is not None and changes_unseen(node, found.keys())
        if target is None or not unseen or _layout(value_of(target, node)) != _layout(node.meta["val"]):
            return False
        found[node] = target
    for node, target in found.items():
        node.target = target
    return True


def functional_of(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """Return the operation of ATen that gives as a new value what ``target`` writes into its first argument; None for none."""
    space, _, name = target._schema.name.partition("::")
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None) if space == "aten" else None
    if packet is None or name == "set_" or _written(target) != [0]:  # set_ makes a tensor the same as another
        return None
    for overload in packet.overloads():
        found = getattr(packet, overload)
        if not found._schema.is_mutable and _arguments(found) == _arguments(target):
            return found  # type: ignore[no-any-return]
    return None


def _arguments(target: torch._ops.OpOverload) -> list[tuple[str, bool]]:
    return [(str(argument.type), argument.kwarg_only) for argument in target._schema.arguments]


def _written(target: torch._ops.OpOverload) -> list[int]:
    """Return the numbers of the arguments that ``target`` writes into."""
    given = enumerate(target._schema.arguments)
    return [number for number, argument in given if argument.alias_info is not None and argument.alias_info.is_write]


def value_of(target: torch._ops.OpOverload, node: Node) -> Any:
    """Return the fake value of ``target`` for the arguments of ``node``."""
    return target(*map_arg(node.args, _known), **map_arg(node.kwargs, _known))


def changes_unseen(node: Node, fresh: Container[Node] = ()) -> bool:
    """Return whether what ``node`` changes in place is a value of the graph that only the result of ``node`` shows.

    ``fresh``: operations in place whose results will be values of their own.
    """
    changed = node.args[0]
    if not isinstance(changed, Node) or changed.op != "call_function":
        return False
    source: Any = changed.args[0] if changed.target is operator.getitem else changed
    if not isinstance(source, Node) or not isinstance(source.target, torch._ops.OpOverload):
        return False
    if _may_alias(source) and source not in fresh:
        return False
    readers = [user for user in changed.users if user is not node]
    return not any(_may_alias(user) for user in readers) and all(user < node for user in readers)


def same_results(one: nn.Module, other: nn.Module, inputs: Any) -> bool:
    """Return whether two modules return the same bits for ``inputs``, (args, kwargs), None for none to try.

    Both are run, with the same random numbers; what they write into inputs and buffers is undone.
    """
    if inputs is None:
        return True
    found = []
    for module in (one, other):
        with torch.random.fork_rng(), torch.no_grad(), kept_values(module):
            torch.manual_seed(0)
            args, kwargs = pytree.tree_map_only(Tensor, torch.clone, inputs)
            found.append(pytree.tree_leaves(module(*args, **kwargs)))
    return len(found[0]) == len(found[1]) and all(map(_same_bits, *found))


@contextmanager
def kept_values(module: nn.Module) -> Iterator[None]:
    """Give the buffers of ``module`` their values back on the way out."""
    kept = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def _same_bits(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other)
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(_bits(one), _bits(other))


def _bits(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def _regions(graph: Graph) -> Iterator[Graph]:
    owner = graph.owning_module
    if owner is not None:
        yield from (part.graph for part in owner.modules() if isinstance(part, GraphModule) and part is not owner)


def _may_alias(node: Node) -> bool:
    """Return whether a result may share memory with an argument: schemas say so, but not those of composite operations."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return isinstance(target, torch._ops.HigherOrderOperator)  # a region may read a part of it
    if target in _ALIASING or any(r.alias_info is not None for r in target._schema.returns):
        return True
    return target not in _FRESH and target.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)


def _known(node: Node) -> Any:
    return node.meta["val"]


def _layout(value: Any) -> Any:
    """Return dtype, shape and strides as text: comparing symbolic sizes would add guards."""
    return (value.dtype, str(tuple(value.shape)), str(value.stride())) if isinstance(value, Tensor) else None
