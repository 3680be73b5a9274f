"""lower-ops: expand aqnfx operations into plain ATen, for compilers that should fuse them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from aqnfx.errors import PassError
from aqnfx.graph.controls import ACCUMULATE, NOISE, PLAIN
from aqnfx.graph.expand import Traces, expand
from aqnfx.graph.program import Program
from aqnfx.graph.tags import get_tag, static_size, tensor_value
from aqnfx.numerics.noise import noise_reference
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
            if node.target is NOISE:
                node.args = node.args[:11]  # all but "compiled", which says how and not what
                expand(program.module, node, noise_reference, traces)
            elif node.target in PLAIN:
                if node.target is ACCUMULATE:
                    self._check_length(node)
                expand(program.module, node, PLAIN[node.target], traces)
            else:
                continue
            lowered += 1
        if not lowered:
            raise PassError("lower-ops found no aqnfx operations; run insert-noise or insert-fake-quant first")

    def _check_length(self, node: Node) -> None:
        """Refuse a sum of open length: as plain operations it would have one step per group, so a fixed number of them."""
        value = tensor_value(node.args[2]) if isinstance(node.args[2], Node) else None
        if value is None or not isinstance(static_size(value.shape[-1]), int):
            raise PassError(
                f"{self.name}: the product at {get_tag(node).site} sums over a dimension of open length, which cannot be written "
                "out in steps; leave it out of insert-accumulation, or run without lower-ops"
            )
