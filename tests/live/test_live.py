"""Live models: what runs under torch.compile is the model, and what noise does there is what it does in a Program."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import aqnfx
from aqnfx.live.backend import Backend
from aqnfx.live.instrument import instrument
from tests.families import build, depth, inputs
from tests.live.small import Block, Tiny, batch, equal, gradients

VECTORS = (pytest.mark.slow, pytest.mark.vectors)
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt2", "opt", "phi3", "mixtral", "bert", "t5")
PIPELINE = "tag-layers,tag-ops,insert-noise{where=ops:all}"
# Dynamo looks at .grad of what a part of a broken graph gets.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
NOISE: dict[str, Any] = {"level": 0.1, "ops": "core", "seed": 5, "step": 3}


@pytest.mark.parametrize("family", ["llama", *(pytest.param(name, marks=VECTORS) for name in FAMILIES[1:])])
def test_a_live_model_is_the_model_and_the_program(family: str) -> None:
    model, given = build(family, **depth(family, 1 if family == "t5" else 2)), inputs(family, 2, 11)
    labels = {"labels": given.get("decoder_input_ids", given["input_ids"])}
    plain = model(**given, **labels)
    before = gradients(model, plain.loss)
    handle = instrument(model, inner="eager")
    live = model(**given, **labels)
    assert torch.equal(live.logits, plain.logits)
    assert equal(gradients(model, live.loss), before)
    # Attention of torch rounds otherwise where gradients are wanted and a bias is given, as t5 does.
    with torch.set_grad_enabled(family != "t5"), handle.noise(**NOISE):
        noised = model(**given, **({} if family == "t5" else labels)).logits
    sites = set(handle.sites)
    assert not handle.report().unreached
    handle.remove()
    program = aqnfx.Pipeline.parse(PIPELINE)(aqnfx.trace(model))
    # The loss is of the call with labels; Programs are traced without.
    assert {site for site in sites ^ set(program.controls.sites) if not site.startswith(".:other")} == set()
    with torch.no_grad(), program.noise(**NOISE):
        assert torch.equal(noised, program(**given).logits)
    assert not torch.equal(noised, plain.logits)


@pytest.mark.parametrize(
    ("family", "cache"),
    [
        ("llama", "dynamic"),
        pytest.param("gpt2", "static", marks=VECTORS),
        pytest.param("t5", "static", marks=VECTORS),
    ],
)
def test_greedy_generation_is_unchanged_and_noise_changes_it(family: str, cache: str) -> None:
    model, given = build(family, **depth(family, 1 if family == "llama" else 3)), inputs(family, 2, 9, pad=0)
    given.pop("decoder_input_ids", None)
    given["attention_mask"][0, :3] = 0  # left padding
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    if cache == "static":
        options["cache_implementation"] = "static"
    model.compile(backend="eager")
    plain = model.generate(**given, **options)  # type: ignore[operator]
    model._compiled_call_impl = None
    with instrument(model, inner="eager") as handle:
        assert torch.equal(model.generate(**given, **options), plain)  # type: ignore[operator]
        graphs = len(handle.backend.graphs)
        with handle.noise(level=0.5, ops="core", seed=1, step=0):
            noised = model.generate(**given, **options)  # type: ignore[operator]
        with handle.noise(level=0.5, ops="core", seed=1, step=0):
            assert torch.equal(model.generate(**given, **options), noised)  # type: ignore[operator]
        assert not torch.equal(noised, plain)
        assert torch.equal(model.generate(**given, **options), plain)  # type: ignore[operator]
        assert len(handle.backend.graphs) == graphs  # controls do not compile


@pytest.mark.slow
@pytest.mark.vectors
def test_generate_calls_an_encoder_past_the_model_with_the_noise_of_the_model() -> None:
    model, given = build("t5", num_layers=1), inputs("t5", 2, 9, pad=0)
    noise: dict[str, Any] = {"level": 0.5, "where": "layers:encoder.block:0,ops:all", "seed": 1, "step": 0}
    asked, options = given.pop("decoder_input_ids"), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    plain = model.generate(**given, **options)  # type: ignore[operator]
    encoder = model.get_encoder()  # type: ignore[operator]
    with instrument(model, inner="eager") as handle:
        assert torch.equal(model.generate(**given, **options), plain)  # type: ignore[operator]
        with handle.noise(**noise):
            model.generate(**given, **options)  # type: ignore[operator]
        assert {site for site, n in handle.stats().items() if n["forward"]} == {
            site.id for site in handle.sites.values() if (site.stack, site.layer) == ("encoder.block", 0)
        }
        with handle.noise(**noise):
            alone = encoder(**given).last_hidden_state
        with handle.noise(**noise):
            within = model(**given, decoder_input_ids=asked).encoder_last_hidden_state
        assert torch.equal(alone, within)
        with pytest.raises(aqnfx.AqnfxError, match="T5Stack cannot be instrumented: it is already"):
            instrument(encoder)
    assert encoder._compiled_call_impl is None
    with instrument(encoder, inner="eager") as again:  # the handle gave both back
        assert again.layers == (("block", 0),)


@pytest.mark.slow
@pytest.mark.vectors
def test_an_encoder_that_stays_python_is_reported() -> None:
    model, given = build("t5", num_layers=1), inputs("t5", 2, 9, pad=0)
    given.pop("decoder_input_ids")
    encoder = model.get_encoder()  # type: ignore[operator]
    encoder.forward = torch.compiler.disable(encoder.forward)
    with instrument(model, inner="eager") as handle:
        model.generate(**given, max_new_tokens=2, do_sample=False)  # type: ignore[operator]
        assert not handle.removed
        assert any(name.startswith("encoder.block.0.") for name in handle.report().unreached)
        assert any(site.startswith("decoder.block.0.") for site in handle.sites)


@pytest.mark.parametrize("inner", ["eager", pytest.param("aot_eager", marks=VECTORS)])
def test_gradient_checkpointing_recomputes_the_same_noise(inner: str) -> None:
    given = inputs("llama", 2, 8, pad=0)
    found = []
    for checkpointed in (False, True):
        torch._dynamo.reset()
        model = build("llama", num_hidden_layers=1).train()
        if checkpointed:
            with warnings.catch_warnings():  # transformers gave it another name in 5.20
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        with instrument(model, inner=inner) as handle:
            with handle.noise(level=0.1, ops="core", phases="both", seed=2, step=0):
                loss = model(**given, labels=given["input_ids"], use_cache=False).loss
            # Computed again when other controls hold.
            found.append((loss.detach(), gradients(model, loss), set(handle.sites)))
    assert torch.equal(found[0][0], found[1][0])
    assert equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


def test_parts_that_a_graph_break_separates_keep_their_names() -> None:
    whole, broken, x = Tiny().requires_grad_(False), Tiny(breaks=True).requires_grad_(False), batch()
    noise = {**NOISE, "ops": "all", "layers": [0, 1]}
    with instrument(whole, inner="eager") as first, first.noise(**noise):
        expected = whole(x)
        names = set(first.sites)
    with instrument(broken, inner="eager") as second:
        with second.noise(**noise):
            found = broken(x)
        report = second.report()
        # Dynamo leaves a loop that a break is in to Python, and with it what follows in the same function.
        assert report.unreached == ("head",)
        assert set(second.sites) == names - {"head:linear:0"}
        assert torch.equal(found, expected)
        assert report.graphs > report.fragments > 1  # the second block runs the code of the first
        assert report.breaks
        with second.noise(level=0.1, layers=[1], ops="add"):
            broken(x)
        hits = {site for site, n in second.stats().items() if n["forward"] > 1}
        assert hits == {"layers.1:add:0", "layers.1:add:1"}
    torch._dynamo.reset()
    again = Tiny(breaks=True).requires_grad_(False)
    with instrument(again, inner="eager") as third:
        assert not third.report().breaks  # those of the model before are not its own
        again(x)
        assert third.report().breaks == report.breaks  # though they have the same reason


class Outer(nn.Module):
    """A block around blocks that break: what follows them has no weights, and is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Around() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Block(breaks=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * 2.0


def test_a_part_without_weights_belongs_to_the_module_whose_code_it_is() -> None:
    model, x = Outer().requires_grad_(False), batch()
    with instrument(model, inner="eager") as handle:
        model(x)
        assert {"layers.0:mul:0", "layers.1:mul:0", "layers.0.inner:add:1", "layers.1.inner:add:1"} <= set(handle.sites)
        with handle.noise(level=0.1, layers=[1], ops="mul"):
            model(x)
        assert {site for site, n in handle.stats().items() if n["forward"]} == {"layers.1:mul:0"}


def test_code_that_python_keeps_is_reported() -> None:
    model, x = Tiny(), batch()
    model.head.forward = torch.compiler.disable(model.head.forward)  # type: ignore[method-assign]
    with instrument(model, inner="eager") as handle:
        model(x)
        assert handle.report().unreached == ("head",)
        assert "not reached: head" in str(handle.report())


def test_weights_that_were_replaced_keep_their_names() -> None:
    model, x = Tiny(), batch()
    with instrument(model, inner="eager") as handle:
        model(x)
        names = set(handle.sites)
        for module in (model.head, model.layers[0].up):
            module.weight = nn.Parameter(module.weight.detach().to(torch.float64).to(torch.float32) * 2)  # type: ignore[union-attr]
        torch._dynamo.reset()
        model(x)
        assert set(handle.sites) == names


def test_autocast_and_accumulated_gradients() -> None:
    model, x = Tiny(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        clean = model(x)
    with instrument(model, inner="eager") as handle:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model(x), clean)
            with handle.noise(level=0.1, ops="linear", phases="both", seed=0, step=0):
                noised = model(x)
        assert noised.dtype == clean.dtype == torch.bfloat16
        assert not torch.equal(noised, clean)

        def accumulated() -> dict[str, torch.Tensor]:
            model.zero_grad()
            with handle.noise(level=0.1, ops="linear", phases="both", seed=0, step=0):
                for part in (x[:2], x[2:4]):
                    model(part).square().sum().backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        first = accumulated()
        assert equal(first, accumulated())
        model.zero_grad()
        with handle.noise(level=0.1, ops="linear", phases="both", seed=0, step=0):
            losses = [model(part).square().sum() for part in (x[:2], x[2:4])]
            sum(losses).backward()  # type: ignore[union-attr]
        again = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert all(torch.allclose(again[name], first[name], rtol=1e-4, atol=1e-4) for name in first)


def test_a_backend_without_a_model_names_what_dynamo_names() -> None:
    model, x = Tiny(), batch()
    backend = Backend(inner="eager")
    compiled = torch.compile(model, backend=backend)
    clean = model(x)
    assert torch.equal(compiled(x), clean)
    backend.controls.replace(backend.controls.make(level=0.1, ops="linear"))
    assert not torch.equal(compiled(x), clean)
    assert {"layers.0.up:linear:0", "head:linear:0"} <= set(backend.controls.sites)


def test_the_backend_goes_by_its_name() -> None:
    model, x = Tiny(), batch()
    clean = model(x)
    assert torch.equal(torch.compile(model, backend="aqnfx", options={"inner": "eager"})(x), clean)
    torch._dynamo.reset()
    noisy = torch.compile(
        model, backend="aqnfx", options={"inner": "eager", "pipeline": "insert-noise{level=0.1}"}
    )(x)
    assert not torch.equal(noisy, clean)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no option 'levl'"):
        torch.compile(model, backend="aqnfx", options={"levl": 1})(x)


@pytest.mark.slow
@pytest.mark.vectors
def test_inductor_agrees_to_rounding() -> None:
    model, x = Tiny(), batch()
    clean = model(x)
    with instrument(model) as handle:
        assert torch.allclose(model(x), clean, rtol=1e-5, atol=1e-6)
        with handle.noise(level=0.1, ops="linear", seed=3, step=0, phases="both"):
            noised = model(x)
            found = gradients(model, noised.square().sum())
    with instrument(model, inner="eager") as handle, handle.noise(level=0.1, ops="linear", seed=3, step=0, phases="both"):
        expected = model(x)
        assert torch.allclose(noised, expected, rtol=1e-5, atol=1e-5)
        wanted = gradients(model, expected.square().sum())
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-4), name


class InPlace(nn.Module):
    """Changes a part of a value, or of what it is given, in place or as a new value."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.linear, self.in_place = Tiny().layers[0].up, in_place  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.linear(x)
        if self.in_place:
            y[:, :3].mul_(2.0).add_(y[:, 3:6])
            kept.mul_(0.5)
            return y, kept
        return torch.cat([y[:, :3] * 2.0 + y[:, 3:6], y[:, 3:]], dim=1), kept * 0.5


class InPlaceTrained(nn.Module):
    """Changes what its own gradient reads, by a weight and by the overloads whose names differ."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.linear, self.in_place = Tiny().layers[0].up, in_place  # type: ignore[union-attr]
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if self.in_place:
            nn.functional.silu(y[:, :4], inplace=True)
            y[:, 4:].mul_(self.scale)
            y[:, :2].pow_(2)
            return y
        left, right = nn.functional.silu(y[:, :4]), y[:, 4:] * self.scale
        return torch.cat([left[:, :2].pow(2), left[:, 2:], right], dim=1)


def test_gradients_flow_through_what_is_changed_in_place() -> None:
    found = []
    for in_place in (True, False):
        model = InPlaceTrained(in_place)
        with instrument(model, inner="eager") as handle, handle.noise(**{**NOISE, "ops": "all", "phases": "both"}):
            out = model(batch())
            found.append((out.detach(), gradients(model, out.square().sum()), set(handle.sites)))
    assert found[0][2] == found[1][2] > {".:silu:0", ".:mul:0", "linear:linear:0"}
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.allclose(found[0][1][name], value, rtol=1e-5) for name, value in found[1][1].items())


def test_a_value_that_is_changed_in_place_keeps_its_dtype() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4).to(torch.bfloat16)

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return self.linear(x).mul_(scale)

    model = Half()
    with instrument(model, inner="eager") as handle, handle.noise(**{**NOISE, "ops": "linear"}):
        assert model(batch().bfloat16(), torch.ones(4)).dtype == torch.bfloat16


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=VECTORS)])
def test_what_is_changed_in_place_is_noisy_where_it_stands(inner: str) -> None:
    x, found = batch(), []
    for in_place in (True, False):
        model, kept = InPlace(in_place).requires_grad_(False), torch.arange(6.0).reshape(2, 3)
        with instrument(model, inner=inner) as handle:
            model(x, kept.clone())
            with handle.noise(**{**NOISE, "ops": "all"}):
                y, changed = model(x, kept)
            assert {"linear:linear:0", ".:mul:0", ".:mul:1", ".:add:0"} <= set(handle.sites)
        assert (changed is kept) is in_place
        assert not torch.equal(changed, torch.arange(6.0).reshape(2, 3) * 0.5)
        found.append((y, changed))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) if inner == "eager" else torch.allclose(one, other, rtol=1e-5)
