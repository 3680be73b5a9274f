"""tag-layers: find the repeated blocks of a model by structure and tag every node with its layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from aqnfx.graph.program import Program
from aqnfx.graph.tags import module_stack, update_tag
from aqnfx.passes.base import Pass

_REPEATED_CALL = re.compile(r"@\d+")  # torch.export appends @n to the name of a module that runs more than once


def find_stacks(names: Iterable[str]) -> frozenset[str]:
    """Return the containers whose numbered children are blocks: the outermost ``P`` with children ``P.<i>`` that all
    run modules of their own.

    ``names`` are the names of all modules that ran. A numbered child that runs no module inside (a Linear in a
    Sequential) is not a block.
    """
    known = set(names)
    parents = {name.rsplit(".", i)[0] for name in known for i in range(1, name.count(".") + 1)}
    children: dict[str, set[str]] = {}
    for name in known | parents:
        container, _, last = name.rpartition(".")
        if last.isdigit():
            children.setdefault(container, set()).add(name)
    found = [c for c, members in children.items() if members <= parents]
    return frozenset(c for c in found if not any(c.startswith(other + ".") for other in found if other != c))


def layer_of(module: str, layers: Iterable[tuple[str, int]]) -> tuple[str | None, int | None]:
    """Return (stack, index) of the layer among ``layers`` that ``module`` is or lies in, (None, None) outside of all."""
    for stack, index in layers:
        if module == f"{stack}.{index}" or module.startswith(f"{stack}.{index}."):
            return stack, index
    return None, None


@dataclass(frozen=True, kw_only=True)
class TagLayers(Pass):
    """Tag every node with its innermost module, its block list (stack) and the index of its block (layer).

    ``stacks``: the block lists, separated by ``|``, where they are known; else they are found from the modules that ran.
    """

    name: ClassVar[str] = "tag-layers"
    stacks: str = ""

    def run(self, program: Program) -> None:
        """Read the module stack of every function node; nodes outside of all blocks get ``layer=None``."""
        modules = {}
        for node in program.graph.nodes:
            if node.op == "call_function":
                stack = [_REPEATED_CALL.sub("", name) for name, _ in module_stack(node)]
                modules[node] = stack
        ran = (name for stack in modules.values() for name in stack if name)
        stacks = frozenset(self.stacks.split("|")) if self.stacks else find_stacks(ran)
        for node, stack in modules.items():
            layer, container = None, None
            for name in stack:
                # A nested name such as layer.0.norm may run under a block that never appears itself.
                for candidate in stacks:
                    rest = name.removeprefix(candidate + ".")
                    if rest != name and rest.split(".")[0].isdigit():
                        layer, container = int(rest.split(".")[0]), candidate
            update_tag(node, module=(stack[-1] if stack else "") or ".", layer=layer, stack=container)
