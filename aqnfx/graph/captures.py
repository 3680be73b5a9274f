"""The accumulators of capture nodes: which buffers belong to which site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule

from aqnfx.errors import PassError
from aqnfx.graph.tags import constant, get_tag
from aqnfx.ops.capture import CaptureCall, clear
from aqnfx.ops.capture_gradient import CaptureGradientCall

CAPTURING = (CaptureCall.target, CaptureGradientCall.target)
"""The operators of capture nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureBuffers:
    """Accumulators of a graph, see :func:`aqnfx.ops.capture.accumulate` for their content.

    ``sites``: site id -> (``channels`` fp64 (5, C), ``totals`` fp64 (2,)), in execution order. ``masked``: the sites at
    which padded positions do not count. ``perturbation``: the declared one, "" for none. ``gradients``: site id ->
    fp64 (3,), see :func:`aqnfx.ops.capture_gradient.accumulate_gradient`.
    """

    sites: Mapping[str, tuple[Tensor, Tensor]]
    masked: frozenset[str]
    perturbation: str
    gradients: Mapping[str, Tensor]

    @classmethod
    def of(cls, module: GraphModule) -> CaptureBuffers:
        """Collect the accumulators of ``module``; raises :class:`PassError` before ``insert-capture`` ran."""
        values: dict[str, CaptureCall] = {}
        gradients: dict[str, CaptureGradientCall] = {}
        for node in module.graph.nodes:
            if node.target is CaptureCall.target:
                values[str(get_tag(node).site)] = CaptureCall.of(node)
            elif node.target is CaptureGradientCall.target:
                gradients[str(get_tag(node).site)] = CaptureGradientCall.of(node)
        if not values and not gradients:
            raise PassError("the program has no capture nodes; run the pass insert-capture first")
        masks = [(site, call.mask) for site, call in values.items()]
        masks += [(site, call.mask) for site, call in gradients.items() if site not in values]
        return cls(
            sites={site: (constant(module, c.channels), constant(module, c.totals)) for site, c in values.items()},
            masked=frozenset(site for site, mask in masks if mask is not None),
            perturbation=next(iter(values.values())).perturbation if values else "",
            gradients={site: constant(module, call.gradients) for site, call in gradients.items()},
        )

    def reset(self) -> None:
        """Forget what was counted."""
        for channels, totals in self.sites.values():
            clear(channels, totals)
        for tensor in self.gradients.values():
            tensor.zero_()
