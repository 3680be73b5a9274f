"""lower-ops: expand aqnfx operations into plain ATen, for compilers that should fuse them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from aqnfx.errors import PassError
from aqnfx.graph.expand import Traces, expand
from aqnfx.graph.program import Program
from aqnfx.graph.tags import get_tag, static_size, tensor_value
from aqnfx.numerics.accumulation import accumulate_reference
from aqnfx.numerics.fake_quant import fake_quant_reference
from aqnfx.numerics.noise import noise_reference
from aqnfx.numerics.ops import count_reference
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
            if node.target is torch.ops.aqnfx.noise.default:
                node.args = node.args[:11]  # all but "compiled", which says how and not what
                expand(program.module, node, noise_reference, traces)
                lowered += 1
            elif node.target is torch.ops.aqnfx.fake_quant.default:
                expand(program.module, node, fake_quant_reference, traces)
                lowered += 1
            elif node.target is torch.ops.aqnfx.accumulate.default:
                self._check_length(node)
                expand(program.module, node, accumulate_reference, traces)
                lowered += 1
            elif node.target is torch.ops.aqnfx.count.default:
                expand(program.module, node, count_reference, traces)
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
