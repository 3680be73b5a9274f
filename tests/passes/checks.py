"""The contract of every pass, and a way to see every value of a program."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import aqnfx
from aqnfx.graph.program import Program
from aqnfx.graph.tags import get_tag
from aqnfx.graph.verify import verify
from aqnfx.passes.base import Pass


def check_pass(step: Pass, program: Program, *arguments: Any, **named: Any) -> Program:
    """Run ``step`` under the contract; return its result.

    The result verifies; the input program keeps its text, tags, buffers and outputs; a second run gives the same text;
    the step is recorded; its text form parses to itself; ``strip`` gives the text from before an insertion.
    """
    before, tags = program.fingerprint, program.render(tags=True)
    buffers = {name: value.clone() for name, value in program.module.named_buffers()}
    with torch.no_grad():
        output = torch.utils._pytree.tree_leaves(program(*arguments, **named))
    result = step(program)
    verify(result.module, after="check_pass")

    assert type(program)(**{f: getattr(program, f) for f in program.__dataclass_fields__}).fingerprint == before
    assert program.render(tags=True) == tags
    after = dict(program.module.named_buffers())
    assert after.keys() == buffers.keys()
    assert all(torch.equal(after[name].nan_to_num(), value.nan_to_num()) for name, value in buffers.items())
    with torch.no_grad():
        again = torch.utils._pytree.tree_leaves(program(*arguments, **named))
    assert all(torch.equal(a, b) for a, b in zip(output, again, strict=True))

    assert step(program).render(tags=True) == result.render(tags=True)
    assert result.history[:-1] == program.history
    last = result.history[-1]
    assert last.spec == step.spec()
    assert last.modified == (result.fingerprint != program.fingerprint)
    assert bool(last.op_diff) <= last.modified
    assert aqnfx.Pipeline.parse(step.spec()).passes == (step,)
    if any(get_tag(node).inserted_by for node in result.graph.nodes) and not result.ran("lower-ops"):
        stripped = aqnfx.Pipeline.parse("strip")(result)
        if not result.ran("decompose-attention"):
            assert stripped.fingerprint == program.original
        assert not any(name.startswith("aqnfx_") for name, _ in stripped.module.named_buffers())
    return result


class Values(torch.fx.Interpreter):
    """Runs a program's graph and keeps every value, by node name."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.values: dict[str, Any] = {}

    def run_node(self, node: torch.fx.Node) -> Any:
        value = super().run_node(node)
        self.values[node.name] = value.detach().clone() if isinstance(value, Tensor) else value
        return value


def values(program: Program, *arguments: Any, **named: Any) -> dict[str, Any]:
    """Return every node's value for one call."""
    interpreter = Values(program)
    with torch.no_grad():
        interpreter.run(*program.bind(*arguments, **named))
    return interpreter.values


def injected(program: Program, *arguments: Any, **named: Any) -> dict[str, Tensor]:
    """Return, by site, what its noise node added in one call."""
    found = values(program, *arguments, **named)
    return {
        str(get_tag(node).site): found[node.name] - found[node.args[0].name]
        for node in program.graph.nodes
        if node.target is torch.ops.aqnfx.noise.default
    }
