"""partition-blocks: cut the graph at the boundaries of its layers, so that each part can run on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from aqnfx.errors import PassError
from aqnfx.graph.blocks import number_blocks
from aqnfx.graph.program import Program
from aqnfx.graph.tags import get_tag, update_tag
from aqnfx.passes.base import Pass


@dataclass(frozen=True, kw_only=True)
class PartitionBlocks(Pass):
    """Give every function node the number of its block: 0 before the first layer, then one block per layer in order of
    execution, one more after the last.

    No edge leads back: a node stands in its layer's block or in that of its latest input, whichever is later. So blocks
    can run one after the other, and :func:`aqnfx.graph.blocks.cut` makes a graph of each. What passes insert later
    stands in the block of the node that it follows. A model without layers is one block.
    """

    name: ClassVar[str] = "partition-blocks"
    needs: ClassVar[tuple[str, ...]] = ("tag-layers",)

    def run(self, program: Program) -> None:
        """Number the nodes; the order of the graph stays."""
        for node, block in number_blocks(program).items():
            update_tag(node, block=block)

    def ensures(self, program: Program) -> None:
        """No function node reads from a later block."""
        for node in program.graph.nodes:
            wrong = [n for n in node.all_input_nodes if _block(n) > _block(node)] if node.op == "call_function" else []
            if wrong:
                raise PassError(f"{self.name}: {node.name} in block {_block(node)} reads {wrong[0].name} of a later one")


def _block(node: Node) -> int:
    return get_tag(node).block or 0
