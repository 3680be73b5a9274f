"""Live models: what runs under torch.compile is the model, and what noise does there is what it does in a Program."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import TorchRuntimeError

import aqnfx
from aqnfx.errors import InputError, LiveError, PassError, SelectorError
from aqnfx.live.backend import Backend
from aqnfx.live.instrument import instrument
from tests.families import build, inputs

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt2", "opt", "phi3", "mixtral", "bert", "t5")
PIPELINE = "tag-layers,tag-ops,insert-noise{where=ops:all}"
# Dynamo looks at .grad of what a part of a broken graph gets.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
NOISE: dict[str, Any] = {"level": 0.1, "ops": "core", "seed": 5, "step": 3}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class Tiny(nn.Module):
    """Two blocks with a residual, small enough to know every site."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(Block(breaks) for _ in range(2))
        self.head = nn.Linear(4, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.up, self.down, self.breaks = nn.Linear(4, 8), nn.Linear(8, 4), breaks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.down(torch.relu(self.up(x)))
        if self.breaks:
            torch._dynamo.graph_break()
        return y + 1.0


def batch(rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_live_model_is_the_model_and_the_program(family: str) -> None:
    depth = {"t5": "num_layers", "gpt2": "n_layer"}.get(family, "num_hidden_layers")
    model, given = build(family, **{depth: 1 if family == "t5" else 2}), inputs(family, 2, 11)
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


@pytest.mark.slow
@pytest.mark.parametrize(("family", "cache"), [("llama", "dynamic"), ("gpt2", "static"), ("t5", "static")])
def test_greedy_generation_is_unchanged_and_noise_changes_it(family: str, cache: str) -> None:
    model, given = build(family), inputs(family, 2, 9, pad=0)
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


def test_controls_change_without_compiling_and_count_what_they_did() -> None:
    model, x = Tiny(), batch()
    clean = model(x)
    with instrument(model, inner="eager") as handle:
        assert torch.equal(model(x), clean)
        assert handle.stats()["layers.0.up:linear:0"] == {"forward": 0, "backward": 0}
        seen = len(handle.backend.graphs)
        with handle.noise(level=0.1, layers=[1], ops="linear", seed=3):
            first, second = model(x), model(x)
            assert not torch.equal(first, second)  # the stream goes on
        with handle.noise(level=0.1, layers=[1], ops="linear", channels=[0], seed=3, step=0):
            model(x)
        assert torch.equal(model(x), clean)
        hits = {site: n["forward"] for site, n in handle.stats().items() if n["forward"]}
        assert hits == {"layers.1.up:linear:0": 3, "layers.1.down:linear:0": 3}
        assert len(handle.backend.graphs) == seen
        handle.reset_stats()
        assert not any(n["forward"] for n in handle.stats().values())
    assert model._compiled_call_impl is None
    assert torch.equal(model(x), clean)


def test_phases_touch_what_they_name() -> None:
    model, x = Tiny(), batch()
    clean = model(x)
    before = gradients(model, clean.square().sum())
    with instrument(model, inner="eager") as handle:
        with handle.noise(level=0.2, ops="linear", phases="backward", seed=0):
            values = model(x)
            after = gradients(model, values.square().sum())
        assert torch.equal(values, clean)
        assert not equal(after, before)
        with handle.noise(level=0.2, modules="head", phases="forward", seed=0):
            noised = model(x)
        # Straight through: with the same gradient coming in, the head passes back what it passes without noise.
        direction = torch.ones_like(clean)
        found = gradients(model, (noised * direction).sum())
        assert equal(found, gradients(model, (model(x) * direction).sum()))
        assert {n["backward"] for n in handle.stats().values()} == {0, 1}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])  # the second keeps its inputs for the backward as they are
def test_the_backward_pass_has_the_noise_of_its_forward(inner: str) -> None:
    model, x = Tiny(), batch()
    with instrument(model, inner=inner) as handle:

        def run(after: bool) -> dict[str, torch.Tensor]:
            handle.load_state_dict({"seed": 1, "step": 7, "row_offset": 0})
            with handle.noise(level=0.2, ops="linear", phases="both"):
                loss = model(x).square().sum()
                if not after:
                    return gradients(model, loss)
                model(x)  # another step, before the gradient of the first is taken
            return gradients(model, loss)

        assert equal(run(False), run(True))


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
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


def test_a_resumed_run_continues_the_stream() -> None:
    x = batch()

    def losses(handle: Any, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        return found

    def start() -> tuple[nn.Module, Any, torch.optim.Optimizer]:
        model = Tiny()
        handle = instrument(model, inner="eager")
        handle.set_noise(level=0.1, ops="linear", phases="both", seed=4)
        return model, handle, torch.optim.Adam(model.parameters(), lr=0.01)

    model, handle, optimizer = start()
    whole = losses(handle, model, optimizer, 8)
    model, handle, optimizer = start()
    assert losses(handle, model, optimizer, 4) == whole[:4]
    saved = copy.deepcopy((model.state_dict(), handle.state_dict(), optimizer.state_dict()))
    model, handle, optimizer = start()
    model.load_state_dict(saved[0])
    handle.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    assert losses(handle, model, optimizer, 4) == whole[4:]


def test_models_of_two_threads_do_not_disturb_each_other() -> None:
    x, found = batch(), {}
    models = [Tiny(), Tiny()]
    clean = models[0](x)
    handles = [instrument(model, inner="eager") for model in models]
    for model in models:
        model(x)

    def drive(number: int) -> None:
        for step in range(20):
            with handles[number].noise(level=0.1 * (number + 1), ops="linear", seed=number, step=step):
                found[number, step] = models[number](x)

    threads = [threading.Thread(target=drive, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        for step in range(20):
            with handles[number].noise(level=0.1 * (number + 1), ops="linear", seed=number, step=step):
                assert torch.equal(models[number](x), found[number, step])
        assert torch.equal(models[number](x), clean)
        handles[number].remove()


def test_many_models_of_a_class_can_be_instrumented_one_after_the_other() -> None:
    x = batch()
    for _ in range(12):  # more than Dynamo compiles of one piece of code
        model = Tiny()
        with instrument(model, inner="eager") as handle:
            model(x)
            assert len(handle.backend.graphs) == 1


def test_a_model_that_is_dropped_is_gone() -> None:
    model = Tiny()
    handle = instrument(model, inner="eager")
    model(batch())
    reference = weakref.ref(model)
    del model
    gc.collect()
    torch._dynamo.reset()
    gc.collect()
    assert reference() is None
    assert handle.report().unreached == ()


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


def test_errors_are_one_line_and_leave_the_model_as_it_was() -> None:
    model, x = Tiny(), batch()
    clean = model(x)
    handle = instrument(model, inner="eager")
    with pytest.raises(LiveError, match="it is already"):
        instrument(model)
    with pytest.raises(LiveError, match="its part 1 is already"):
        instrument(nn.Sequential(nn.Identity(), model))
    with pytest.raises(SelectorError, match=r"layers:7 is out of range; the model has layers 0-1"), handle.noise(layers=[7]):
        pass
    with pytest.raises(SelectorError, match="unknown operator kind"), handle.noise(ops="linaer"):
        pass
    with pytest.raises(InputError, match="finite"), handle.noise(level=float("nan")):
        pass
    with pytest.raises(SelectorError, match="selects none"), handle.noise(level=0.1, ops="conv"):
        model(x)  # found out when the graphs are there
    with pytest.raises(SelectorError, match="selects none"), handle.noise(level=0.1, ops="conv"):
        pass
    with pytest.raises(InputError, match="has channels 0-3"), handle.noise(modules="layers.0.down", channels=[9]):
        pass
    with pytest.raises(InputError, match="integers seed, step, row_offset"):
        handle.load_state_dict({"seed": 1})
    assert torch.equal(model(x), clean)
    handle.remove()
    handle.remove()
    for use in (handle.stats, handle.state_dict, lambda: handle.set_noise(level=0.1)):
        with pytest.raises(LiveError, match="was removed"):
            use()
    with pytest.raises(InputError, match="inner backend 'tvm'"):
        instrument(model, inner="tvm")
    with pytest.raises(PassError, match="works on traced programs"):
        instrument(model, pipeline="insert-capture")
    assert torch.equal(model(x), clean)


def test_what_dynamo_cannot_capture_is_refused() -> None:
    class Disabled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        @torch.compiler.disable
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    model = Disabled()
    instrument(model, inner="eager")
    with pytest.raises(LiveError, match="no graph of Disabled was captured"):
        model(batch())
    assert model(batch()).shape == (5, 4)

    broken = Tiny(breaks=True)
    instrument(broken, inner="eager", fullgraph=True)
    with pytest.raises(LiveError, match="Dynamo cannot capture Tiny"):
        broken(batch())
    assert broken(batch()).shape == (5, 3)

    # The model's own errors are its own.
    model = Tiny()
    instrument(model, inner="eager")
    with pytest.raises(TorchRuntimeError):
        model(torch.zeros(2, 9))
    assert model(batch()).shape == (5, 3)
