"""The accumulators of ``aqnfx::capture`` nodes: which buffers belong to which site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from aqnfx.errors import PassError
from aqnfx.graph.tags import constant, get_tag
from aqnfx.numerics.capture import clear


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureBuffers:
    """Accumulators of a graph, see :func:`aqnfx.numerics.capture.accumulate` for their content.

    ``sites``: site id -> (``channels`` fp64 (5, C), ``totals`` fp64 (2,)), in execution order. ``masked``: the sites at
    which padded positions do not count. ``perturbation``: the declared one, "" for none.
    """

    sites: Mapping[str, tuple[Tensor, Tensor]]
    masked: frozenset[str]
    perturbation: str

    @classmethod
    def of(cls, module: GraphModule) -> CaptureBuffers:
        """Collect the accumulators of ``module``; raises :class:`PassError` before ``insert-capture`` ran."""
        nodes = {
            str(get_tag(node).site): node
            for node in module.graph.nodes
            if node.target is torch.ops.aqnfx.capture.default
        }
        if not nodes:
            raise PassError("the program has no capture nodes; run the pass insert-capture first")
        return cls(
            sites={site: (constant(module, n.args[2]), constant(module, n.args[3])) for site, n in nodes.items()},
            masked=frozenset(site for site, n in nodes.items() if n.args[1] is not None),
            perturbation=str(next(iter(nodes.values())).args[4]),
        )

    def reset(self) -> None:
        """Forget what was counted."""
        for channels, totals in self.sites.values():
            clear(channels, totals)
