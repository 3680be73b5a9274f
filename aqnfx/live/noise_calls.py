"""Nodes of noise, and which of them can have their draws made together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from aqnfx.numerics.noise import NoiseKind

TOGETHER = 1 << 20
"""Elements that are drawn for several sites in one kernel, 4 MiB at the number of samples that a graph was captured with: what is
larger, or may become longer, is drawn where it is used and never stored."""


@dataclass(frozen=True, slots=True)
class NoiseCall:
    """The arguments of a noise node; see :func:`aqnfx.numerics.noise.noise_reference`."""

    x: Node
    level: Node
    key: Node
    run: Node
    channels: Node | None
    cols: Node | None
    batch: Any
    kind: str
    channel_dim: int = -1
    phase: int = 0
    keep_zeros: bool = False
    compiled: bool = False

    @classmethod
    def of(cls, node: Node) -> NoiseCall:
        """Read them from a node."""
        arguments: Any = node.args
        return cls(*arguments)

    @property
    def shares(self) -> tuple[str, ...]:
        """What sites have alike whose draws are made together."""
        value = self.x.meta["val"]
        drawn = {NoiseKind.UNIFORM: "uniform", NoiseKind.BIAS: "none"}.get(NoiseKind(self.kind), "normal")
        width = "" if self.cols is None else str(self.cols.meta["val"].shape)
        return (str(tuple(value.shape)), str(value.device), str(self.batch), self.run.name, width, drawn, str(self.phase))

    @property
    def bounded(self) -> bool:
        """Whether nothing but the number of samples is open about the size of the value."""
        batch = str(self.batch.meta["val"] if isinstance(self.batch, Node) else self.batch)
        return all(isinstance(size, int) or str(size) == batch for size in self.x.meta["val"].shape)

    @property
    def in_one_place(self) -> bool:
        """Whether the value and its controls are on one device: the operator fetches what is not."""
        nodes = (self.x, self.level, self.key, self.run, self.channels, self.cols)
        return len({node.meta["val"].device for node in nodes if node is not None}) == 1


def groups(nodes: Sequence[Node]) -> Iterator[list[Node]]:
    """Yield the nodes whose draws are made together, in the order of the first of each."""
    open_groups: dict[tuple[str, ...], list[Node]] = {}
    made: list[list[Node]] = []
    for node in nodes:
        call = NoiseCall.of(node)
        group = open_groups.get(call.shares)
        full = group is None or (len(group) + 1) * _elements(call.x) > TOGETHER
        if group is None or full or call.kind == NoiseKind.BIAS or call.key.op != "placeholder" or not call.bounded:
            group = open_groups[call.shares] = []
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
