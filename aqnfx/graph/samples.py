"""Which samples a value belongs to: the batch size of a graph, and how many samples share a value's first dimension."""

from __future__ import annotations

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
