"""Which samples a value belongs to: the batch size of a graph, and how many samples share a value's first dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from aqnfx.graph.edit import insert_after
from aqnfx.graph.tags import static_size


def batch_size(graph: Graph, *, inserted_by: str) -> Node | int:
    """Return the node that holds the number of samples: the first dimension of the first input."""
    first = next(n for n in graph.nodes if n.op == "placeholder")
    size = static_size(first.meta["val"].shape[0]) if first.meta["val"].dim() else 1
    if isinstance(size, int):
        return size
    for node in graph.nodes:
        if node.target is torch.ops.aten.sym_size.int and node.args == (first, 0):
            return node  # type: ignore[no-any-return]
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    node = insert_after(
        last, torch.ops.aten.sym_size.int, (first, 0), inserted_by=inserted_by, site="", reroute=False
    )
    node.meta["val"] = size
    return node


def sample_count(value: torch.Tensor, batch: Node | int) -> Node | int:
    """Return how many samples share the first dimension: the batch size where it divides it, else 0 (no samples)."""
    if value.dim() == 0:
        return 0
    size, rows = batch.meta["val"] if isinstance(batch, Node) else batch, static_size(value.shape[0])
    if isinstance(rows, int):
        return batch if isinstance(size, int) and size > 0 and rows % size == 0 else 0
    if isinstance(size, int):
        return 0
    quotient = rows.node.expr / size.node.expr
    return batch if quotient.is_integer else 0


def attention_mask(graph: Graph, names: Sequence[str]) -> tuple[Node | None, list[torch.Size]]:
    """Return the input ``attention_mask``, if there is one of two dimensions, and the sizes of what it describes.

    ``names`` are those of the graph's inputs.

    These are the sizes of ``input_ids`` too: a model that only broadcasts its mask leaves the two batches unrelated.
    """
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    named = dict(zip(names, inputs, strict=True))
    shapes = [n.meta["val"].shape for name in ("attention_mask", "input_ids") if (n := named.get(name)) is not None]
    found = [shape for shape in shapes if len(shape) == 2]
    node = named.get("attention_mask")
    return (node, found) if node is not None and node.meta["val"].dim() == 2 else (None, [])


def covers(positions: torch.Size, value: torch.Tensor) -> bool:
    """Return whether ``value`` begins with the sizes (batch, sequence), or with their product where it has two."""
    batch, sequence = positions
    if value.dim() >= 2 and _same(value.shape[0], batch) and _same(value.shape[1], sequence):
        return True
    return value.dim() == 2 and _same(value.shape[0], batch * sequence)


def _same(size: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """Return whether two sizes are equal for every input: no guard is added, as a comparison of symbols would."""
    first, second = static_size(size), static_size(other)
    if isinstance(first, int) or isinstance(second, int):
        return isinstance(first, int) and isinstance(second, int) and first == second
    return bool(first.node.expr == second.node.expr)
