"""Programs: canonical text, fingerprints, argument binding, forks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import aqnfx
from aqnfx.errors import InputError, PassError, SelectorError
from aqnfx.graph.frontend import model_digest
from tests.families import build, inputs
from tests.graph.small import Stack, Tiny, generator, seeded, stack, traced

GOLDEN = """\
input %x
%1 = aten.linear(%x, @up.weight, @up.bias)
%2 = aten.pow.Tensor_Scalar(%1, 2)
%3 = aten.mean.dim(%2, [-1], True)
%4 = aten.add.Tensor(%3, 1e-06)
%5 = aten.rsqrt(%4)
%6 = aten.mul.Tensor(%1, %5)
%7 = aten.mul.Tensor(%6, @norm.weight)
%8 = aten.linear(%7, @down.weight)
return [%8]
"""

GOLDEN_TAGS = """\
input %x
%1 = aten.linear(%x, @up.weight, @up.bias)  # up:linear:0
%2 = aten.pow.Tensor_Scalar(%1, 2)  # part of rms_norm
%3 = aten.mean.dim(%2, [-1], True)  # part of rms_norm
%4 = aten.add.Tensor(%3, 1e-06)  # part of rms_norm
%5 = aten.rsqrt(%4)  # part of rms_norm
%6 = aten.mul.Tensor(%1, %5)  # part of rms_norm
%7 = aten.mul.Tensor(%6, @norm.weight)  # norm:rms_norm:0
%8 = aten.linear(%7, @down.weight)  # down:linear:0
return [%8]
"""


def test_render():
    program = traced(Tiny(), 3, 4)
    assert program.render() == GOLDEN
    assert program.render(tags=True) == GOLDEN_TAGS


def test_fingerprint_survives_retracing_and_names():
    program, again = traced(Tiny(), 3, 4), traced(Tiny(), 5, 4, tags=False)
    assert program.fingerprint == again.fingerprint == program.original
    fork = again.fork()
    for node in fork.graph.nodes:
        node.name = f"renamed_{node.name}"
    assert fork.render() == GOLDEN
    assert traced(Stack(2), 3, 7, 8).fingerprint != traced(Stack(3), 3, 7, 8).fingerprint


def test_site_ids_survive_retracing_at_another_shape():
    one, other = stack(), traced(Stack(3), 2, 9, 8)
    assert [site.id for site in one.sites] == [site.id for site in other.sites]


@pytest.fixture(scope="module")
def llama():
    return aqnfx.trace(build("llama"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": 1}, "unknown argument 'labels'; the program was traced with input_ids, attention_mask"),
        ({"input_ids": None}, "argument 'input_ids' is missing"),
        ({"input_ids": torch.zeros(2, 9, dtype=torch.int32)}, r"input 'input_ids' has shape \[2, 9\] and dtype torch.int32"),
        ({"input_ids": torch.zeros(9, dtype=torch.int64)}, r"has shape \[9\].*traced as \[s"),
        ({"input_ids": [1, 2]}, "input 'input_ids' must be a tensor, found list|traced"),
        ({"attention_mask": torch.ones(2, 8, dtype=torch.int64)}, "is 9 in input 'input_ids' and 8 here"),
        ({"use_cache": True}, "use_cache=True was asked; the program was traced with use_cache=False"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)  # fmt: skip
def test_bind_errors(llama, change, message):
    with pytest.raises(InputError, match=message):
        llama(**{**inputs("llama", 2, 9), **change})


def test_bind_refuses_another_fixed_size():
    program = stack()
    with pytest.raises(InputError, match=r"input 'x' has shape \[3, 9, 8\].*dimension 1 is fixed at 7"):
        program(torch.randn(3, 9, 8))
    with pytest.raises(InputError, match="2 positional arguments given; the program takes x"):
        program(torch.randn(3, 7, 8), torch.randn(3))


def test_calls_by_position_and_without_mask(llama):
    arguments = inputs("llama", 2, 9, pad=0)
    with torch.no_grad():
        expected = llama(**arguments).logits
        assert torch.equal(llama(*arguments.values()).logits, expected)
        assert torch.equal(llama(arguments["input_ids"]).logits, expected)
        assert torch.equal(llama(input_ids=arguments["input_ids"], use_cache=False).logits, expected)


def test_result_has_the_class_of_the_model(llama):
    from transformers.modeling_outputs import CausalLMOutputWithPast

    assert isinstance(llama(**inputs("llama", 1, 5)), CausalLMOutputWithPast)


def test_fork_shares_weights_and_not_controls():
    noisy = aqnfx.Pipeline.parse("insert-noise")(stack())
    fork = noisy.fork()
    theirs = dict(fork.module.named_parameters())
    mine = dict(noisy.module.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in mine)
    site = next(iter(noisy.controls.sites))
    fork.controls.set_level(site, 0.5)
    fork.controls.set_run(seed=9)
    fork.controls.set_channels(site, [0])
    assert noisy.controls.sites[site].level.tolist() == [0.0, 0.0]
    assert bool(noisy.controls.sites[site].channels.all())
    assert noisy.controls.run.tolist() == [0, 0, 0]
    x = torch.randn(3, 7, 8, generator=generator())
    before = noisy(x)
    fork(x)
    assert noisy.controls.hits()[site] == 0
    assert fork.controls.hits()[site] == 1
    assert torch.equal(noisy(x), before)


def test_fork_keeps_metadata_apart():
    program = stack()
    fork = program.fork()
    for node in fork.graph.nodes:
        node.meta["mark"] = 1
    assert not any("mark" in node.meta for node in program.graph.nodes)
    assert [s.id for s in fork.sites] == [s.id for s in program.sites]


def test_controls_need_noise_nodes():
    with pytest.raises(PassError, match="run the pass insert-noise first"):
        _ = stack().controls


def test_noise_restores_the_controls_also_after_an_error():
    noisy = aqnfx.Pipeline.parse("insert-noise{level=0.25 seed=3}")(stack())
    before = noisy.controls.state()

    def failing() -> None:
        with noisy.noise(layers=[1], level=0.5, seed=8, step=2, row_offset=4, phases="both", channels=[1]):
            raise KeyError("stop")

    with pytest.raises(KeyError):
        failing()
    assert all(torch.equal(a, b) for a, b in zip(before, noisy.controls.state(), strict=True))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"layers": [7]}, SelectorError, "layers:7 is out of range; the model has layers 0-2"),
        ({"ops": "linaer"}, SelectorError, "did you mean 'linear'"),
        ({"ops": "silu"}, SelectorError, "ops:silu selects none of the 23 sites with controls$"),
        ({"level": -1.0}, InputError, "noise level -1.0 must be finite and not negative"),
        ({"level": float("nan")}, InputError, "noise level nan"),
        ({"level": 1e39}, InputError, "is inf in fp32"),
        ({"level": 0.1, "seed": "x"}, InputError, "seed 'x' is not a whole number"),
        ({"level": 0.1, "phases": "sideways"}, InputError, "phases 'sideways' is not one of"),
        ({"level": 0.1, "channels": [99]}, InputError, "channels .* given; .* has channels 0-"),
        ({"level": 0.1, "channels": torch.ones(3, dtype=torch.bool)}, InputError, r"channel mask of shape \[3\]"),
    ],
    ids=str,
)
def test_noise_refuses(settings, error, message):
    noisy = aqnfx.Pipeline.parse("insert-noise")(stack())
    before = noisy.controls.state()
    with pytest.raises(error, match=message), noisy.noise(**settings):
        pass
    assert all(torch.equal(a, b) for a, b in zip(before, noisy.controls.state(), strict=True))


@pytest.mark.parametrize("empty", [{"layers": []}, {"ops": []}, {"sites": ()}, {"modules": []}, {"where": ""}], ids=str)
def test_an_empty_selection_is_none(empty):
    noisy = aqnfx.Pipeline.parse("insert-noise{level=0.25}")(stack())
    with noisy.noise(level=0.5, **empty):
        assert not any(control.level.any() for control in noisy.controls.sites.values())
    assert all(control.level.any() for control in noisy.controls.sites.values())


def test_model_digest_depends_on_names_and_bytes():
    program, other = traced(Tiny(), 3, 4), traced(Tiny(), 5, 4)
    assert model_digest(program) == model_digest(other)
    assert model_digest(aqnfx.Pipeline.parse("insert-noise")(program)) == model_digest(program)
    changed = seeded(Tiny())
    with torch.no_grad():
        changed.up.bias[0] += 1e-7
    assert model_digest(aqnfx.trace(changed, ((torch.randn(3, 4),), {}))) != model_digest(program)


def test_layer_labels():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Stack(2), Stack(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first.blocks[1](self.first.blocks[0](x)))

    assert stack().layer_label("blocks", 2) == "2"
    assert stack().layer_label(None, None) is None
    two = traced(Two(), 3, 7, 8)
    assert two.layers == (("first.blocks", 0), ("first.blocks", 1), ("second.blocks", 0), ("second.blocks", 1))
    assert two.layer_label("second.blocks", 1) == "second.blocks:1"
