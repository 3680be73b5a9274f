"""The operators: their typed views are their schemas, one import registers all, and nobody else names them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.fx import Graph

from aqnfx.ops.noise import NoiseCall
from aqnfx.ops.score import ScoreCall
from aqnfx.ops.table import OPERATORS, Operator, is_counter, is_switched, level_of, operator_of, stands_for


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda o: o.call.target.name())
def test_a_view_is_its_schema(operator: Operator) -> None:
    arguments = operator.call.target._schema.arguments
    fields = dataclasses.fields(operator.call)
    assert [f.name for f in fields] == [a.name for a in arguments]
    for field, argument in zip(fields, arguments, strict=True):
        wanted = argument.default_value if argument.has_default_value() else dataclasses.MISSING
        assert field.default == wanted, f"{operator.call.__name__}.{field.name}"


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda o: o.call.target.name())
def test_traits_agree_with_the_schema(operator: Operator) -> None:
    schema = operator.call.target._schema
    names = [a.name for a in schema.arguments]
    assert operator.switched == ("level" in names and bool(schema.returns))
    assert operator.stands_for_input == bool(schema.returns)
    assert not (operator.counts and schema.returns)


def test_importing_the_package_registers_every_operator() -> None:
    """In a fresh interpreter: what a file of a graph needs before it can be loaded."""
    names = sorted(target.name() for target in OPERATORS)
    code = f"import torch, aqnfx.ops; print(all(torch._C._dispatch_has_kernel(n) for n in {names}))"
    code += "; import sys; print('torch._inductor.lowering' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", "False"]
    assert len(names) == 9


def _graph() -> tuple[Graph, list[torch.fx.Node]]:
    graph = Graph()
    x, level, key, run = (graph.placeholder(name) for name in ("x", "level", "key", "run"))
    noise = graph.call_function(NoiseCall.target, (x, level, key, run, None, None, 0, "uniform"), {"keep_zeros": True})
    relu = graph.call_function(torch.ops.aten.relu.default, (noise,))
    hits = graph.call_function(torch.ops.aqnfx.count.default, (level, run))
    fixed = graph.call_function(torch.ops.aqnfx.fake_quant.default, (relu, None, None, None, "int8"))
    return graph, [noise, relu, hits, fixed]


def test_views_and_traits_of_nodes() -> None:
    graph, (noise, relu, hits, fixed) = _graph()
    call = NoiseCall.of(noise)
    assert (call.kind, call.keep_zeros, call.phase, call.level.name) == ("uniform", True, 0, "level")
    assert NoiseCall.position("run") == 3
    assert stands_for(noise) is next(iter(graph.nodes))
    assert stands_for(relu) is None
    assert stands_for(hits) is None
    assert stands_for(fixed) is relu
    assert [is_switched(node) for node in (noise, relu, hits, fixed)] == [True, False, False, False]
    assert level_of(fixed) is None  # a format without controls is always on
    assert is_counter(hits)
    assert not is_counter(noise)
    assert operator_of(relu) is None
    with pytest.raises(ValueError, match=r"aqnfx\.score"):
        ScoreCall.of(noise)


def test_operators_are_named_in_their_own_package_alone(repo_root: Path) -> None:
    """A second list of operators, or an argument read by its position, begins with the name of one."""
    sources = [p for p in (*repo_root.glob("aqnfx/**/*.py"), *repo_root.glob("passes/*.py")) if p.parent.name != "ops"]
    found = {str(p.relative_to(repo_root)) for p in sources if "torch.ops.aqnfx." in p.read_text(encoding="utf-8")}
    assert found == {"aqnfx/graph/blocks.py"}  # the keys of rows, which blocks share
