"""The accumulators of ``aqnfx::scan`` nodes: which buffers belong to which site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

import aqnfx.numerics.scan  # noqa: F401  (registers the operator)
from aqnfx.errors import PassError
from aqnfx.graph.tags import constant, get_tag

SCAN = torch.ops.aqnfx.scan.default


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanBuffers:
    """Accumulators of a graph by site, see :func:`aqnfx.numerics.scan.new_buffers`, and the names of the formats."""

    sites: Mapping[str, Mapping[str, Tensor]]
    formats: tuple[str, ...]

    @classmethod
    def of(cls, module: GraphModule) -> ScanBuffers:
        """Collect the accumulators of ``module``; raises :class:`PassError` before ``insert-scan`` ran."""
        nodes = [node for node in module.graph.nodes if node.target is SCAN]
        if not nodes:
            raise PassError("the program has no scan nodes; run the pass insert-scan first")
        names = ("sums", "moments", "extremes", "magnitude")
        sites = {
            str(get_tag(node).site): {name: constant(module, arg) for name, arg in zip(names, node.args[2:6], strict=True)}
            for node in nodes
        }
        return cls(sites=sites, formats=tuple(str(nodes[0].args[6]).split("|")))
