"""lower-ops: expand aqnfx operations into plain ATen, for compilers that should fuse them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aqnfx.errors import PassError
from aqnfx.graph.expand import Traces, expand
from aqnfx.graph.program import Program
from aqnfx.graph.tags import get_tag
from aqnfx.ops.table import operator_of
from aqnfx.passes.base import Pass


@dataclass(frozen=True, kw_only=True)
class LowerOps(Pass):
    """Replace the operations that passes insert and switch by the plain operations that define them.

    The result is for inference: plain operations neither perturb a gradient nor let it pass through rounding. The
    control buffers stay, so levels, seeds and masks still change without compiling again.
    """

    name: ClassVar[str] = "lower-ops"

    def run(self, program: Program) -> None:
        """Expand every node; a program without any is an error, since the pass was asked for."""
        lowered, traces = 0, Traces()
        for node in list(program.graph.nodes):
            operator = operator_of(node)
            if operator is None or operator.reference is None:
                continue
            if obstacle := operator.may_lower(operator.call.of(node)):
                raise PassError(f"{self.name}: the product at {get_tag(node).site} {obstacle}")
            expand(program.module, node, operator.reference, traces)
            lowered += 1
        if not lowered:
            raise PassError("lower-ops found no aqnfx operations; run insert-noise or insert-fake-quant first")
