"""Operations in place become functional ones where nobody else sees the change, and only there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import aqnfx
from aqnfx.graph import frontend
from aqnfx.graph.functional import changes_unseen, functional_of, is_mutable, make_functional
from tests.families import build, depth, inputs
from tests.graph.small import generator

pytestmark = pytest.mark.usefixtures("own_exports")  # graphs are compared that were made in two ways


class Written(nn.Module):
    """A linear layer, and what a test does with its result."""

    def __init__(self, then: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.then = nn.Linear(4, 4), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.up(x), x)


def chained(y: Tensor, x: Tensor) -> Tensor:
    return y.add_(x).mul_(2.0).clamp_(min=0.0)


def read_before(y: Tensor, x: Tensor) -> Tensor:
    total = y.sum(-1, keepdim=True)
    return y.div_(total)


def parted(y: Tensor, x: Tensor) -> Tensor:
    values, _ = torch.topk(y, 2, dim=-1)
    return values.add_(1.0)


def scattered(y: Tensor, x: Tensor) -> Tensor:
    out = torch.zeros_like(y)
    return out.index_put_((torch.tensor([1, 0]),), y[:2])


def read_later(y: Tensor, x: Tensor) -> Tensor:
    y.add_(x)  # the export has whoever reads y from here on read the result
    return y * 2.0


SEEN_BY_NOBODY = [chained, read_before, parted, scattered, read_later]


def an_input(y: Tensor, x: Tensor) -> Tensor:
    return x.add_(y)


def a_view(y: Tensor, x: Tensor) -> Tensor:
    y[:, :2].mul_(3.0)
    return y


def through_a_view(y: Tensor, x: Tensor) -> Tensor:
    row = y[0]
    return y.add_(1.0) + row


def not_dropped(y: Tensor, x: Tensor) -> Tensor:
    kept = nn.functional.dropout(y, 0.5, training=False)  # the same tensor, which its schema does not say
    kept.add_(1.0)
    return y + kept


def of_another_dtype(y: Tensor, x: Tensor) -> Tensor:
    low = torch.mul(y.to(torch.bfloat16), 1.0)
    return low.add_(x).float()


def of_other_strides(y: Tensor, x: Tensor) -> Tensor:
    wide = torch.empty_strided((3, 4), (1, 3)).fill_(0.0)
    return torch.mul(wide, 1.0).addmm_(y, x.t() @ x).t() + 1.0  # a new result would be row by row


def read_in_a_region(y: Tensor, x: Tensor) -> Tensor:
    fresh = torch.zeros_like(x)
    with torch.no_grad():
        row = fresh[0]
    fresh.add_(1.0)
    return y + row


def changed_in_a_region(y: Tensor, x: Tensor) -> Tensor:
    y = y * 1.0
    with torch.no_grad():
        y.mul_(2.0)
    return y + 1.0


def changed_in_both(y: Tensor, x: Tensor) -> Tensor:
    y.add_(1.0)
    with torch.no_grad():
        y.mul_(2.0)
    return y


def written_out(y: Tensor, x: Tensor) -> Tensor:
    most = torch.empty(())
    torch.max(x * 1.0, out=most)
    return y + most


def set_to_another(y: Tensor, x: Tensor) -> Tensor:
    same, other = torch.empty(3, 4), torch.mul(x, 1.0)
    same.set_(other)
    same.add_(1.0)
    return other + y


def unsafely_viewed(y: Tensor, x: Tensor) -> Tensor:
    flat = torch.ops.aten._unsafe_view(other := torch.mul(x, 1.0), [12])
    flat.add_(1.0)
    return other + y


TRACED = [
    a_view, through_a_view, of_another_dtype, of_other_strides, read_in_a_region, changed_in_a_region, changed_in_both,
    written_out, set_to_another, unsafely_viewed,
]  # fmt: skip
SEEN = [an_input, not_dropped, *TRACED]


def exported(then: Callable[[Tensor, Tensor], Tensor]) -> tuple[ExportedProgram, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 4, generator=generator())
    return torch.export.export(Written(then).eval(), (x.clone(),)), x


@pytest.mark.parametrize("then", SEEN_BY_NOBODY)
def test_what_nobody_else_sees_is_functional_without_a_second_export(
    then: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, x = exported(then)
    assert is_mutable(found.graph)
    monkeypatch.setattr(ExportedProgram, "run_decompositions", None)
    program = aqnfx.trace(found)
    assert not is_mutable(program.graph)
    assert is_mutable(found.graph)  # that of the caller stays
    assert torch.equal(program(x.clone()), found.module()(x.clone()))


@pytest.mark.parametrize("then", SEEN)
def test_what_others_see_is_not(then: Callable[[Tensor, Tensor], Tensor]) -> None:
    found, _ = exported(then)
    module = found.module(check_guards=False)
    before = [(node.name, node.target) for node in module.graph.nodes]
    assert is_mutable(module.graph)
    assert not make_functional(module.graph)
    assert [(node.name, node.target) for node in module.graph.nodes] == before


@pytest.mark.parametrize("then", TRACED)
def test_and_is_traced_all_the_same(then: Callable[[Tensor, Tensor], Tensor]) -> None:
    found, x = exported(then)
    program = aqnfx.trace(found)
    assert not is_mutable(program.graph)
    assert torch.equal(program(x.clone()), found.module()(x.clone()))


def test_what_reads_the_old_value_later_sees_the_change() -> None:
    found, _ = exported(read_later)
    module = found.module(check_guards=False)
    changing = next(node for node in module.graph.nodes if node.name == "add_")
    assert changes_unseen(changing)
    for user in list(changing.users):
        user.replace_input_with(changing, changing.args[0])
    assert not changes_unseen(changing)
    assert not make_functional(module.graph)


def test_the_functional_operation_is_the_overload_of_the_same_arguments() -> None:
    aten = torch.ops.aten
    pairs = {
        aten.add_.Tensor: aten.add.Tensor, aten.add_.Scalar: aten.add.Scalar, aten.clamp_.default: aten.clamp.default,
        aten.clamp_.Tensor: aten.clamp.Tensor, aten.div_.Tensor_mode: aten.div.Tensor_mode, aten.max.unary_out: None,
        aten.set_.source_Tensor: None, aten.resize_.default: aten.resize.default,
    }  # fmt: skip
    assert {target: functional_of(target) for target in pairs} == pairs


@pytest.mark.parametrize("family", ["falcon", "mixtral", "t5"])
def test_sites_are_those_of_a_second_export(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments = build(family, **depth(family, 1)), inputs(family, 2, 11)
    quick = aqnfx.Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(model))
    monkeypatch.setattr(frontend, "make_functional", lambda _graph: False)
    slow = aqnfx.Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(model))
    assert [site.id for site in quick.sites] == [site.id for site in slow.sites]
    with torch.no_grad():
        assert torch.equal(quick(**arguments).logits, slow(**arguments).logits)


@pytest.mark.slow
def test_gradients_of_a_program_are_those_of_the_model() -> None:
    """A second export would turn reshapes into views that only hold for the strides that values have without gradients."""
    model, arguments = build("t5", **depth("t5", 1)), inputs("t5", 2, 9)
    model(**arguments, use_cache=False).logits.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    program = aqnfx.trace(model)
    program(**arguments).logits.square().sum().backward()
    found = {name: p.grad for name, p in program.module.named_parameters() if p.grad is not None}
    assert len(found) > 20
    assert all(torch.equal(grad, expected[name]) for name, grad in found.items())
