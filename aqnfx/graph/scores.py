"""The accumulators of ``aqnfx::score`` nodes: which row belongs to which site, and how to run and read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import aqnfx.numerics.score
import aqnfx.numerics.score_weight  # noqa: F401  (both register the operators)
from aqnfx.errors import PassError
from aqnfx.graph.tags import constant, get_tag

SCORING = (torch.ops.aqnfx.score.default, torch.ops.aqnfx.score_weight.default)
"""The operators of score nodes; their first eleven arguments are the same, and the sixteenth."""
_ELEMENTS = 15


def is_parameter_row(name: str) -> bool:
    """Return whether a row is that of a whole parameter (``NAME:weight``) and not of a site (``MODULE:OP:N…``)."""
    return name.endswith(":weight") and name.count(":") == 1


def _has_elements(node: Node) -> bool:
    return len(node.args) > _ELEMENTS and node.args[_ELEMENTS] is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreBuffers:
    """Accumulators of a graph, see :func:`aqnfx.numerics.score.accumulate` for their shapes.

    ``rows`` gives the row of each site and, as ``NAME:weight``, of each parameter; ``channels`` those that have them.
    ``shared``: the sites and parameters whose values belong to no sample; a batch's sum stands at its first sample.
    """

    rows: Mapping[str, int]
    kind: str
    perturbations: tuple[str, ...]
    run: Tensor
    hits: Tensor
    sequences: Tensor
    sketch: Tensor | None
    elements: Tensor | None
    channels: Mapping[str, Tensor]
    shared: frozenset[str]

    @classmethod
    def of(cls, module: GraphModule) -> ScoreBuffers:
        """Collect the accumulators of ``module``; raises :class:`PassError` before ``insert-score`` ran."""
        nodes = [n for n in module.graph.nodes if n.target in SCORING]
        if not nodes:
            raise PassError("the program has no score nodes; run the pass insert-score first")
        sites = [str(get_tag(n).site) for n in nodes]
        first = nodes[0].args
        return cls(
            rows={site: int(n.args[7]) for site, n in zip(sites, nodes, strict=True)},
            kind=str(next((n.args[9] for n in nodes if not is_parameter_row(str(get_tag(n).site))), first[9])),
            perturbations=max((tuple(n.args[10]) for n in nodes), key=len),
            run=constant(module, first[2]), hits=constant(module, first[3]), sequences=constant(module, first[4]),
            sketch=None if first[6] is None else constant(module, first[6]),
            elements=next((constant(module, n.args[_ELEMENTS]) for n in nodes if _has_elements(n)), None),
            channels={s: constant(module, n.args[5]) for s, n in zip(sites, nodes, strict=True) if n.args[5] is not None},
            shared=frozenset(s for s, n in zip(sites, nodes, strict=True) if n.args[8] == 0),
        )  # fmt: skip

    def reset(self) -> None:
        """Set every accumulator to 0."""
        for tensor in (self.hits, self.sequences, self.sketch, self.elements, *self.channels.values()):
            if tensor is not None:
                tensor.zero_()

    def set_run(self, *, draw: int, row_offset: int) -> None:
        """Say which draw the next backward pass belongs to, and the number of its first sample."""
        self.run[1], self.run[2] = draw, row_offset
