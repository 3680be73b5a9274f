"""Tracing leaves the caller's model as it was."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aqnfx
from aqnfx.errors import TraceError
from aqnfx.graph.untouched import as_it_runs


class Memo:
    """An object of no framework that keeps a tensor."""

    def __init__(self) -> None:
        self.value: Tensor | None = None


class Remembers(nn.Module):
    """Stores what it computes wherever a forward can: attributes, a buffer, a dict, a list, another object."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.linear, self.drop, self.fails = nn.Linear(4, 4), nn.Dropout(0.5), fails
        self.register_buffer("scale", torch.ones(4), persistent=False)
        self.cache: dict[str, Any] = {"kept": 1}
        self.list: list[Any] = []
        self.memo = Memo()

    def forward(self, x: Tensor) -> Tensor:
        found = self.drop(self.linear(x)) * self.scale
        self.last, self.memo.value, self.cache["last"] = found, found, found
        self.list.append(found)
        self.scale = self.scale * 1.0
        if self.fails and bool((found > 0).all()):
            return found
        return found


@pytest.mark.filterwarnings("ignore:The tensor attribute")
@pytest.mark.parametrize("fails", [False, True])
def test_attributes_modes_and_containers_are_as_they_were(fails):
    model = Remembers(fails).train()
    model.linear.eval()  # a mode of its own, as frozen parts have
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    scale, weight = model.scale, model.linear.weight
    if fails:
        with pytest.raises(TraceError):
            aqnfx.trace(model, inputs=((torch.ones(3, 4),), {}))
    else:
        aqnfx.trace(model, inputs=((torch.ones(3, 4),), {}))
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(vars(module)[key] is value for key, value in before[name].items())
    assert model.scale is scale
    assert model.linear.weight is weight
    assert model.cache == {"kept": 1}
    assert model.list == []
    assert model.memo.value is None
    assert [m.training for m in (model, model.linear, model.drop)] == [True, False, True]


class HiddenAlias(nn.Module):
    """Changes in place what dropout, out of training, hands through: export loses that both are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 4), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        changed = self.drop(hidden)
        changed[:, :2] += 1
        return hidden * 2 + changed


def test_a_trace_that_lost_an_alias_is_refused():
    with pytest.raises(TraceError, match="changes tensors in place"):
        aqnfx.trace(HiddenAlias().eval(), inputs=((torch.ones(3, 4),), {}))


def test_gated_delta_rules_are_traced_as_they_run(monkeypatch):
    """A file that asks whether it is exported gets another answer only where it holds a gated delta rule."""
    for name, held in (("delta_rule", {"torch_chunk_gated_delta_rule": None}), ("other", {})):
        space = ModuleType(name)
        vars(space).update({"is_torchdynamo_exporting": lambda: True, **held})
        monkeypatch.setitem(sys.modules, name, space)
    model = nn.Sequential(*(type("Part", (nn.Module,), {"__module__": name})() for name in ("delta_rule", "other")))
    answers = [vars(sys.modules[name])["is_torchdynamo_exporting"] for name in ("delta_rule", "other")]
    with pytest.raises(ValueError), as_it_runs(model):  # noqa: PT011, PT012
        assert sys.modules["delta_rule"].is_torchdynamo_exporting() is False
        assert sys.modules["other"].is_torchdynamo_exporting() is True
        raise ValueError
    assert [vars(sys.modules[name])["is_torchdynamo_exporting"] for name in ("delta_rule", "other")] == answers
