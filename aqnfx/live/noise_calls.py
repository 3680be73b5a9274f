"""Which nodes of noise can have their draws made together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.fx import Node

from aqnfx.numerics.noise import NoiseKind
from aqnfx.ops.noise import NoiseCall

TOGETHER = 1 << 20
"""Elements that are drawn for several sites in one kernel, 4 MiB at the number of samples that a graph was captured with: what is
larger, or may become longer, is drawn where it is used and never stored."""


def _shares(call: NoiseCall) -> tuple[str, ...]:
    """Return what sites have alike whose draws are made together."""
    value = call.x.meta["val"]
    drawn = {NoiseKind.UNIFORM: "uniform", NoiseKind.BIAS: "none"}.get(NoiseKind(call.kind), "normal")
    width = "" if call.cols is None else str(call.cols.meta["val"].shape)
    return (str(tuple(value.shape)), str(value.device), str(call.batch), call.run.name, width, drawn, str(call.phase))


def _bounded(call: NoiseCall) -> bool:
    """Return whether nothing but the number of samples is open about the size of the value."""
    batch = str(call.batch.meta["val"] if isinstance(call.batch, Node) else call.batch)
    return all(isinstance(size, int) or str(size) == batch for size in call.x.meta["val"].shape)


def in_one_place(call: NoiseCall) -> bool:
    """Return whether the value and its controls are on one device: the operator fetches what is not."""
    nodes = (call.x, call.level, call.key, call.run, call.channels, call.cols)
    return len({node.meta["val"].device for node in nodes if node is not None}) == 1


def groups(nodes: Sequence[Node]) -> Iterator[list[Node]]:
    """Yield the nodes whose draws are made together, in the order of the first of each."""
    open_groups: dict[tuple[str, ...], list[Node]] = {}
    made: list[list[Node]] = []
    for node in nodes:
        call = NoiseCall.of(node)
        shares = _shares(call)
        group = open_groups.get(shares)
        full = group is None or (len(group) + 1) * _elements(call.x) > TOGETHER
        if group is None or full or call.kind == NoiseKind.BIAS or call.key.op != "placeholder" or not _bounded(call):
            group = open_groups[shares] = []
            made.append(group)
        group.append(node)
    yield from made


def _elements(node: Node) -> int:
    """Return the number of elements at the sizes that the graph was captured with."""
    count = 1
    for size in node.meta["val"].shape:
        hint = size.node.hint if isinstance(size, torch.SymInt) else size
        count *= TOGETHER if hint is None else int(hint)
    return count
