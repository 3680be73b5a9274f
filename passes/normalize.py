"""normalize: bring a graph to the form that the other passes work on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aqnfx.graph.normalize import normalize_graph
from aqnfx.graph.program import Program
from aqnfx.passes.base import Pass


@dataclass(frozen=True, kw_only=True)
class Normalize(Pass):
    """Remove guards and assertions, open gradient-mode regions; what ``trace`` does already, so idempotent."""

    name: ClassVar[str] = "normalize"

    def run(self, program: Program) -> None:
        """See :func:`aqnfx.graph.normalize.normalize_graph`."""
        normalize_graph(program.module)
