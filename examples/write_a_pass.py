"""A pass of one's own: what does it cost to run SiLU as hard swish, as some accelerators do?

    python examples/write_a_pass.py [--quick]

docs/passes.md explains the pass line by line.
"""

import argparse
from dataclasses import dataclass
from typing import ClassVar

import torch

import aqnfx
from aqnfx.errors import PassError
from aqnfx.graph.opkinds import OpKind
from aqnfx.graph.program import Program
from aqnfx.passes.base import Pass, select_or_raise


@dataclass(frozen=True, kw_only=True)
class SwapSilu(Pass):
    """Compute the SiLU at the selected sites as hard swish, x * relu6(x + 3) / 6."""

    name: ClassVar[str] = "swap-silu"
    needs: ClassVar[tuple[str, ...]] = ("tag-layers", "tag-ops")
    where: str = "ops:silu"
    allow_empty: bool = False

    def run(self, program: Program) -> None:
        """Change what the selected nodes call; their sites keep kind and id."""
        nodes = program.site_nodes()
        for site in select_or_raise(self.name, self.where, program, allow_empty=self.allow_empty):
            if site.op is not OpKind.SILU:
                raise PassError(f"{self.name}: {self.where!r} also selects {site.id}; add ops:silu to it")
            node = nodes[site.id]
            node.target = torch.ops.aten.hardswish.default
            node.args = (node.args[0],)  # and no keyword arguments: SiLU and hard swish both take the value alone
            node.kwargs = {}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two cuts instead of one per layer")
    arguments = parser.parse_args()
    tagged = aqnfx.Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace("tinygsm"))
    ids = torch.arange(4, 36).reshape(2, 16)
    clean = tagged(input_ids=ids).logits.log_softmax(-1)
    last = max(index for _, index in tagged.layers)
    print("layers  KL (nats/token)  pass")
    for layer in (0, last) if arguments.quick else range(last + 1):
        swapped = SwapSilu(where=f"ops:silu,layers:{layer}")(tagged)
        assert swapped.history[-1].modified
        other = swapped(input_ids=ids).logits.log_softmax(-1)
        kl = (clean.exp() * (clean - other)).sum(-1).mean()
        print(f"{layer:6}  {float(kl):15.5f}  {swapped.history[-1].spec} {dict(swapped.history[-1].op_diff)}")


if __name__ == "__main__":
    main()
