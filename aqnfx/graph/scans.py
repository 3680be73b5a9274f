"""The accumulators of ``aqnfx::scan`` nodes: which buffers belong to which site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule

from aqnfx.errors import PassError
from aqnfx.graph.tags import constant, get_tag
from aqnfx.ops.scan import ScanCall, new_buffers


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanBuffers:
    """Accumulators of a graph by site, see :func:`aqnfx.ops.scan.new_buffers`, and the names of the formats."""

    sites: Mapping[str, Mapping[str, Tensor]]
    formats: tuple[str, ...]

    @classmethod
    def of(cls, module: GraphModule) -> ScanBuffers:
        """Collect the accumulators of ``module``; raises :class:`PassError` before ``insert-scan`` ran."""
        calls = {str(get_tag(n).site): ScanCall.of(n) for n in module.graph.nodes if n.target is ScanCall.target}
        if not calls:
            raise PassError("the program has no scan nodes; run the pass insert-scan first")
        sites = {
            site: {name: constant(module, node) for name, node in call.accumulators.items()} for site, call in calls.items()
        }
        return cls(sites=sites, formats=tuple(next(iter(calls.values())).formats.split("|")))

    def reset(self) -> None:
        """Forget what was counted."""
        for site in self.sites.values():
            for name, fresh in new_buffers(len(self.formats), site["magnitude"].shape[0]).items():
                site[name].copy_(fresh)
