"""The accumulators of ``aqnfx::score`` nodes: which row belongs to which site, and how to run and read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from aqnfx.errors import PassError
from aqnfx.graph.tags import constant, get_tag
from aqnfx.ops.score import ScoreCall
from aqnfx.ops.score_weight import ScoreWeightCall

SCORING = (ScoreCall.target, ScoreWeightCall.target)
"""The operators of score nodes."""


def is_parameter_row(name: str) -> bool:
    """Return whether a row is that of a whole parameter (``NAME:weight``) and not of a site (``MODULE:OP:N…``)."""
    return name.endswith(":weight") and name.count(":") == 1


def _call(node: Node) -> ScoreCall | ScoreWeightCall:
    return ScoreCall.of(node) if node.target is ScoreCall.target else ScoreWeightCall.of(node)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreBuffers:
    """Accumulators of a graph, see :func:`aqnfx.ops.score.accumulate` for their shapes.

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
        calls = [(str(get_tag(n).site), _call(n)) for n in module.graph.nodes if n.target in SCORING]
        if not calls:
            raise PassError("the program has no score nodes; run the pass insert-score first")
        first = calls[0][1]
        return cls(
            rows={site: call.index for site, call in calls},
            kind=next((call.kind for site, call in calls if not is_parameter_row(site)), first.kind),
            perturbations=max((tuple(call.perturbations) for _, call in calls), key=len),
            run=constant(module, first.run), hits=constant(module, first.hits), sequences=constant(module, first.sequences),
            sketch=None if first.sketch is None else constant(module, first.sketch),
            elements=next((constant(module, call.elements) for _, call in calls if call.elements is not None), None),
            channels={site: constant(module, call.channels) for site, call in calls if call.channels is not None},
            shared=frozenset(site for site, call in calls if call.batch == 0),
        )  # fmt: skip

    def reset(self) -> None:
        """Set every accumulator to 0."""
        for tensor in (self.hits, self.sequences, self.sketch, self.elements, *self.channels.values()):
            if tensor is not None:
                tensor.zero_()

    def set_run(self, *, draw: int, row_offset: int) -> None:
        """Say which draw the next backward pass belongs to, and the number of its first sample."""
        self.run[1], self.run[2] = draw, row_offset
