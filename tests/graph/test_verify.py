"""One broken graph per legality rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import aqnfx
from aqnfx.errors import VerificationError
from aqnfx.graph.program import Program
from aqnfx.graph.tags import get_tag, update_tag
from aqnfx.graph.verify import RULES, neighbourhood, verify
from tests.graph.small import stack

Break = Callable[[Program], None]
BREAKS: dict[str, Break] = {}


def breaks(rule: str) -> Callable[[Break], Break]:
    def add(function: Break) -> Break:
        assert rule not in BREAKS
        BREAKS[rule] = function
        return function

    return add


def calls(program: Program, target: object) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if node.target is target]


def noises(program: Program) -> list[torch.fx.Node]:
    return calls(program, torch.ops.aqnfx.noise.default)


@breaks("attributes-exist")
def _(program: Program) -> None:
    delattr(program.module.head, "weight")


@breaks("only-functions")
def _(program: Program) -> None:
    node = calls(program, torch.ops.aten.silu.default)[0]
    program.module.add_submodule("act", nn.SiLU())
    with program.graph.inserting_before(node):
        node.replace_all_uses_with(program.graph.call_module("act", node.args))


@breaks("values-known")
def _(program: Program) -> None:
    del calls(program, torch.ops.aten.silu.default)[0].meta["val"]


@breaks("functional")
def _(program: Program) -> None:
    node = calls(program, torch.ops.aten.silu.default)[0]
    node.target = torch.ops.aten.silu_.default


@breaks("noise-keeps-shape")
def _(program: Program) -> None:
    node = noises(program)[0]
    node.meta["val"] = node.meta["val"].to(torch.float64)


@breaks("noise-not-bypassed")
def _(program: Program) -> None:
    noise = noises(program)[0]
    user = next(n for n in noise.users if get_tag(n).inserted_by is None)
    user.replace_input_with(noise, noise.args[0])


@breaks("aqnfx-ops-have-provenance")
def _(program: Program) -> None:
    update_tag(noises(program)[0], inserted_by=None)


@breaks("one-noise-per-site")
def _(program: Program) -> None:
    first, second = noises(program)[:2]
    update_tag(second, site=get_tag(first).site)


@breaks("site-ids-unique")
def _(program: Program) -> None:
    first, second = calls(program, torch.ops.aten.silu.default)[:2]
    update_tag(second, module=get_tag(first).module)


@breaks("inserted-keep-module")
def _(program: Program) -> None:
    noises(program)[0].meta["nn_module_stack"] = {}


@pytest.fixture(scope="module")
def noisy() -> Program:
    return aqnfx.Pipeline.parse("insert-noise")(stack())


def test_every_rule_has_a_broken_graph():
    assert set(BREAKS) == set(RULES)


@pytest.mark.parametrize("rule", BREAKS)
def test_rule(noisy, rule):
    fork = noisy.fork()
    fork = torch_copy(fork)
    verify(fork.module, after="test")
    BREAKS[rule](fork)
    with pytest.raises(VerificationError, match=f"some-pass: rule {rule}: node") as caught:
        verify(fork.module, after="some-pass")
    assert "\n--> " in str(caught.value)  # the neighbourhood, with the node marked
    # Only this rule: the message points at the cause and not at a consequence.
    assert [name for name, check in RULES.items() if any(True for _ in check(fork.module))] == [rule]
    verify(noisy.module, after="test")


def torch_copy(program: Program) -> Program:
    """A fork whose submodules are its own, so that breaking them leaves the original whole."""
    import copy
    import dataclasses

    module = torch.fx.GraphModule(copy.deepcopy(dict(program.module.named_modules(remove_duplicate=False))[""]), program.graph)
    return dataclasses.replace(program, module=module)


def test_malformed_graph():
    fork = stack().fork()
    node = calls(fork, torch.ops.aten.silu.default)[0]
    node.args = (node.next,)  # used before it is defined
    with pytest.raises(VerificationError, match="some-pass: the graph is malformed"):
        verify(fork.module, after="some-pass")


def test_neighbourhood_marks_one_line(noisy):
    text = neighbourhood(noises(noisy)[0], reach=1)
    assert [line[:3] for line in text.splitlines()] == ["   ", "-->", "   "]
    assert "aqnfx.noise" in text.splitlines()[1]
