"""Exports that tests share are those that they would make themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import aqnfx
from tests.exports import Exports, Unknown, describe
from tests.families import build


@pytest.fixture
def exports(shared_exports: Exports, monkeypatch: pytest.MonkeyPatch) -> Exports:
    """An empty memory."""
    found = Exports(shared_exports.original)
    monkeypatch.setattr(torch.export, "export", found)
    return found


@pytest.mark.parametrize(("family", "one"), [("gpt2", {"n_layer": 1}), ("falcon", {"num_hidden_layers": 1})])
def test_a_later_model_has_the_recorded_graph_and_its_own_weights(exports: Exports, family: str, one: dict[str, int]) -> None:
    exports.fresh = True
    alone = aqnfx.trace(build(family, **one))
    exports.fresh = False
    first, other = build(family, **one), build(family, **one)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    before, after = aqnfx.trace(first), aqnfx.trace(other)
    assert len(exports.records) == 1
    assert alone.fingerprint == before.fingerprint == after.fingerprint
    assert str(alone.graph) == str(after.graph)
    assert {id(p) for p in after.module.parameters()} == {id(p) for p in other.parameters()}
    pointers = {t.data_ptr() for t in after.module.buffers()}
    assert not pointers & {t.data_ptr() for t in [*before.module.buffers(), *first.buffers()]}
    ids = torch.arange(4, 20).reshape(2, 8)
    with torch.no_grad():
        assert torch.equal(alone(input_ids=ids).logits, before(input_ids=ids).logits)
        expected = other(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        assert torch.equal(after(input_ids=ids).logits, expected)


class Other(nn.Linear):
    """A module that is not transformers' own."""


def attribute(model: nn.Module) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5


def hook(model: nn.Module) -> None:
    model.model.norm.register_forward_hook(lambda _module, _args, output: output * 2)


def method(model: nn.Module) -> None:
    model.model.norm.forward = lambda x: x


def module(model: nn.Module) -> None:
    model.lm_head = Other(32, 99)


def tied(model: nn.Module) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def wide(model: nn.Module) -> None:
    model.to(torch.float64)


def described(model: nn.Module, length: int = 7, **options: object) -> tuple[object, ...] | None:
    """Return what a recorded export is found by, or None where a model is always exported."""
    try:
        return describe(model, (), {"input_ids": torch.ones(2, length, dtype=torch.int64)}, options)
    except Unknown:
        return None


def test_a_changed_model_is_exported_anew() -> None:
    base = described(build("llama"))
    assert base is not None
    assert base == described(build("llama"))
    for change in (attribute, tied, wide, module):
        model = build("llama")
        change(model)
        assert described(model) not in (base, None), change
    for change in (hook, method):
        model = build("llama")
        change(model)
        assert described(model) is None, change
    others = [
        described(build("llama"), 8), described(build("llama"), strict=False), described(build("llama").train()),
        described(build("llama", num_hidden_layers=2)), described(build("llama", rope_theta=5.0)), described(build("qwen2")),
    ]  # fmt: skip
    assert not {None, base} & set(others)
    assert len(set(others)) == len(others)
    assert described(nn.Linear(2, 2)) is None
