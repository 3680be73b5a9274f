"""The accumulators of ``aqnfx::scan`` nodes: which buffers belong to which site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from aqnfx.errors import PassError
from aqnfx.graph.tags import constant, get_tag
from aqnfx.numerics.scan import new_buffers

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

    def reset(self) -> None:
        """Forget what was counted."""
        for site in self.sites.values():
            for name, fresh in new_buffers(len(self.formats), site["magnitude"].shape[0]).items():
                site[name].copy_(fresh)
