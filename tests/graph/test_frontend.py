"""trace(): what it takes, and what it says when it cannot."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import aqnfx
from aqnfx.errors import InputError, ModelError, TraceError
from tests.families import build, inputs
from tests.graph.small import Block, Stack, Tiny, generator, seeded, traced

pytestmark = pytest.mark.usefixtures("own_exports")


def test_plain_module_by_position_and_by_name():
    model = seeded(Tiny())
    x = torch.randn(3, 4, generator=generator())
    for program in (aqnfx.trace(model, ((x,), {})), aqnfx.trace(model, ((), {"x": x}))):
        other = torch.randn(7, 4, generator=generator(2))
        assert torch.equal(program(other), model(other))
        assert torch.equal(program(x=other), model(other))
        assert program.source["class"] == "Tiny"


def test_training_mode_is_put_back():
    model = seeded(Stack()).train()
    aqnfx.trace(model, ((torch.randn(3, 7, 8),), {}))
    assert model.training


def test_nested_outputs_and_inputs():
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, pair: tuple[Tensor, Tensor], *, scale: float = 1.0) -> dict[str, object]:
            return {"sum": self.linear(pair[0]) + pair[1], "both": [pair[0] * scale, pair[1]]}

    model = seeded(Nested())
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    program = aqnfx.trace(model, (((a, b),), {"scale": 2.0}))
    out, expected = program((a, b), scale=2.0), model((a, b), scale=2.0)
    assert out.keys() == expected.keys()
    assert torch.equal(out["sum"], expected["sum"])
    assert torch.equal(out["both"][0], expected["both"][0])
    with pytest.raises(InputError, match=r"scale=3.0 was asked; the program was traced with scale=2.0"):
        program((a, b), scale=3.0)


def test_exported_program_and_pt2(tmp_path):
    model = seeded(Tiny())
    x = torch.randn(3, 4, generator=generator())
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    program = aqnfx.trace(exported)
    assert program.fingerprint == aqnfx.trace(model, ((x,), {})).fingerprint
    path = tmp_path / "tiny.pt2"
    torch.export.save(exported, path)
    with pytest.raises(InputError, match="can run code; pass allow_unsafe_pt2=True"):
        aqnfx.trace(path)
    loaded = aqnfx.trace(path, allow_unsafe_pt2=True)
    assert torch.equal(loaded(x), model(x))
    assert loaded.fingerprint == program.fingerprint
    with pytest.raises(ModelError, match=r"nothing.pt2 does not exist"):
        aqnfx.trace(tmp_path / "nothing.pt2", allow_unsafe_pt2=True)
    (tmp_path / "broken.pt2").write_bytes(b"not a zip")
    with pytest.raises(ModelError, match=r"cannot load .*broken\.pt2"):
        aqnfx.trace(tmp_path / "broken.pt2", allow_unsafe_pt2=True)


def test_directories(tmp_path):
    model = build("llama")
    good = tmp_path / "good"
    model.save_pretrained(good)
    program = aqnfx.trace(good)
    arguments = inputs("llama", 2, 9)
    with torch.no_grad():
        assert torch.equal(program(**arguments).logits, model(**arguments, use_cache=False).logits)
    assert program.source["name"] == "good"
    assert program.source["model_type"] == "llama"

    with pytest.raises(ModelError, match="does not exist"):
        aqnfx.trace(tmp_path / "missing")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        aqnfx.trace(empty)
    weights = good / "model.safetensors"
    with pytest.raises(ModelError, match=r"not a Hugging Face directory"):
        aqnfx.trace(weights)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot load model"):
        aqnfx.trace(good)
    weights.unlink()
    with pytest.raises(ModelError, match="cannot load model"):
        aqnfx.trace(good)
    (good / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ModelError, match="cannot load model"):
        aqnfx.trace(good)


def test_models_that_cannot_be_traced():
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(TraceError, match=r"cannot make example inputs for Tiny .* pass inputs="):
        aqnfx.trace(Tiny())
    with pytest.raises(TraceError, match=r"could not trace Branches: .*data-dependent Python"):
        aqnfx.trace(Branches(), ((torch.randn(2, 2),), {}))
    with pytest.raises(TraceError, match="sequence length 500 asked; the model takes at most 128 positions"):
        aqnfx.trace(build("llama"), sequence_length=500)


def test_regions_without_gradient_are_opened_and_autocast_is_refused():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                angle = torch.cos(x) * 2
            with torch.autocast("cpu", enabled=False):
                angle = angle + 1
            return self.linear(x) * angle

    class Auto(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return torch.matmul(x, x)

    model = seeded(Frozen())
    x = torch.randn(3, 4, generator=generator())
    program = aqnfx.trace(model, ((x,), {}))
    assert "wrap_with" not in program.render()
    assert torch.equal(program(x), model(x))
    with pytest.raises(TraceError, match="enables autocast"):
        aqnfx.trace(Auto(), ((torch.randn(4, 4),), {}))


def test_in_place_models_become_functional():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            y.mul_(2)
            y[:, 0] = 0
            return F.relu_(y)

    model = seeded(InPlace())
    program = traced(model, 3, 4)
    x = torch.randn(5, 4, generator=generator(3))
    assert torch.equal(program(x), model(x))
    noisy = aqnfx.Pipeline.parse('insert-noise{where="ops:all"}')(program)
    assert torch.equal(noisy(x), model(x))


# Layers by structure -------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


def test_layers_of_a_sequential_of_blocks():
    program = traced(Chain(inp=nn.Linear(8, 8), body=nn.Sequential(Block(), Block()), head=nn.Linear(8, 2)), 3, 7, 8)
    assert program.layers == (("body", 0), ("body", 1))
    outside = {site.module for site in program.sites if site.layer is None}
    assert outside == {"inp", "head"}


def test_layers_of_two_stacks():
    program = traced(Chain(encoder=nn.Sequential(Block(), Block()), decoder=nn.Sequential(Block(), Block())), 3, 7, 8)
    assert program.layers == (("encoder", 0), ("encoder", 1), ("decoder", 0), ("decoder", 1))


def test_layers_with_lists_inside_of_blocks():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ModuleList([Block(), Block()])
            self.mix = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(self.layer[1](self.layer[0](x)))

    program = traced(Chain(block=nn.Sequential(Outer(), Outer(), Outer())), 3, 7, 8)
    assert program.layers == (("block", 0), ("block", 1), ("block", 2))
    assert {site.layer for site in program.sites if ".mix." in site.module} == {0, 1, 2}


def test_a_sequential_of_plain_layers_is_no_stack():
    program = traced(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), 3, 8)
    assert program.layers == ()
    assert all(site.layer is None for site in program.sites)
    assert len(program.sites) == 3


def test_a_block_that_runs_twice_keeps_its_layer():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                for block in self.blocks:
                    x = block(x)
            return x

    program = traced(Shared(), 3, 7, 8)
    assert program.layers == (("blocks", 0), ("blocks", 1))
    linears = [site for site in program.sites if site.module == "blocks.1.qkv"]
    assert [site.ordinal for site in linears] == [0, 1]
