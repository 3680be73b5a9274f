"""insert-accumulation: products as hardware computes them whose running sums have few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from aqnfx.errors import PassError
from aqnfx.graph.controls import add_switch, count_after
from aqnfx.graph.edit import insert_after
from aqnfx.graph.operands import Place
from aqnfx.graph.opkinds import base_name
from aqnfx.graph.program import Program
from aqnfx.graph.sites import Site
from aqnfx.ops.accumulate import ACCUMULATORS, AccumulateCall
from aqnfx.passes.base import Pass, select_or_raise

_PRODUCTS = {"linear": True, "addmm": False, "baddbmm": False, "matmul": False, "mm": False, "bmm": False}
"""The operations that can be computed anew from their operands, and whether their weight is (out, in)."""


@dataclass(frozen=True, kw_only=True)
class InsertAccumulation(Pass):
    """Put one ``aqnfx::accumulate`` node behind every product that ``where`` selects: linear, matmul, bmm.

    The running sum of each dot product is rounded to ``element`` ("bf16" or "fp16") after every ``every`` terms. The
    node computes the product anew; a compiler drops the original. ``controls`` gives every site a level that
    ``Program.noise`` sets, a factor on the error, 1 to begin with. ``allow_empty`` permits a selection without sites.
    """

    name: ClassVar[str] = "insert-accumulation"
    needs: ClassVar[tuple[str, ...]] = ("tag-layers", "tag-ops")
    not_after: ClassVar[tuple[str, ...]] = ("lower-ops",)
    where: str = "ops:linear"
    element: str = "bf16"
    every: int = 32
    controls: bool = False
    allow_empty: bool = False

    def requires(self, program: Program) -> None:
        """Check the options before anything is copied."""
        if self.element not in ACCUMULATORS:
            raise PassError(f"{self.name}: element {self.element!r} is not one of {', '.join(ACCUMULATORS)}")
        if self.every < 1:
            raise PassError(f"{self.name}: every {self.every} must be 1 or more elements")

    def run(self, program: Program) -> None:
        """Insert the nodes and register their levels."""
        chosen = select_or_raise(self.name, self.where, program, allow_empty=self.allow_empty)
        operands: dict[Node, list[Place]] = {}
        for place in program.places.values():
            if place.position is not None:
                operands.setdefault(place.node, []).append(place)
        for site in chosen:
            node = program.places[site.id].node
            x, weight = _operands(self.name, site, node, operands.get(node, []))
            bias = _bias(self.name, site, node)
            switch = add_switch(program.module, site.id, torch.ones(2), inserted_by=self.name) if self.controls else None
            transposed = _PRODUCTS[str(base_name(node.target))]
            args = (node, switch and switch[0], x, weight, bias, self.element, self.every, transposed)
            new = insert_after(node, AccumulateCall.target, args, inserted_by=self.name, site=site.id, reroute=True)
            if switch:
                count_after(new, site.id, switch, inserted_by=self.name)


def _operands(name: str, site: Site, node: Node, found: list[Place]) -> tuple[Node, Node]:
    if base_name(node.target) not in _PRODUCTS or len(found) != 2:
        raise PassError(f"{name}: {site.id} is no product of two tensors; select outputs of linear, matmul or bmm")
    return found[0].value, found[1].value


def _bias(name: str, site: Site, node: Node) -> Node | None:
    """Return what is added to a product; raises :class:`PassError` for one that is scaled as well."""
    kind = base_name(node.target)
    if any(value != 1 for option, value in node.kwargs.items() if option != "bias"):
        raise PassError(f"{name}: {site.id} scales its product ({', '.join(node.kwargs)}), which is not supported")
    if kind in ("addmm", "baddbmm"):
        found = node.args[0]
    else:
        found = node.args[2] if kind == "linear" and len(node.args) > 2 else node.kwargs.get("bias")
    return found if isinstance(found, Node) else None
