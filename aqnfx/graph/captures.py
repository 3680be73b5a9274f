"""The accumulators of capture nodes: which buffers belong to which site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from aqnfx.errors import PassError
from aqnfx.graph.tags import constant, get_tag
from aqnfx.numerics.capture import clear

CAPTURE = torch.ops.aqnfx.capture.default
CAPTURE_GRADIENT = torch.ops.aqnfx.capture_gradient.default
CAPTURING = (CAPTURE, CAPTURE_GRADIENT)
"""The operators of capture nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureBuffers:
    """Accumulators of a graph, see :func:`aqnfx.numerics.capture.accumulate` for their content.

    ``sites``: site id -> (``channels`` fp64 (5, C), ``totals`` fp64 (2,)), in execution order. ``masked``: the sites at
    which padded positions do not count. ``perturbation``: the declared one, "" for none. ``gradients``: site id ->
    fp64 (3,), see :func:`aqnfx.numerics.capture.accumulate_gradient`.
    """

    sites: Mapping[str, tuple[Tensor, Tensor]]
    masked: frozenset[str]
    perturbation: str
    gradients: Mapping[str, Tensor]

    @classmethod
    def of(cls, module: GraphModule) -> CaptureBuffers:
        """Collect the accumulators of ``module``; raises :class:`PassError` before ``insert-capture`` ran."""
        found: dict[object, dict[str, Any]] = {target: {} for target in CAPTURING}
        for node in module.graph.nodes:
            if node.target in found:
                found[node.target][str(get_tag(node).site)] = node
        nodes, gradients = found[CAPTURE], found[CAPTURE_GRADIENT]
        if not nodes and not gradients:
            raise PassError("the program has no capture nodes; run the pass insert-capture first")
        return cls(
            sites={site: (constant(module, n.args[2]), constant(module, n.args[3])) for site, n in nodes.items()},
            masked=frozenset(site for site, n in (nodes | gradients).items() if n.args[1] is not None),
            perturbation=str(next(iter(nodes.values())).args[4]) if nodes else "",
            gradients={site: constant(module, n.args[2]) for site, n in gradients.items()},
        )

    def reset(self) -> None:
        """Forget what was counted."""
        for channels, totals in self.sites.values():
            clear(channels, totals)
        for tensor in self.gradients.values():
            tensor.zero_()
