"""The handle of a live model: controls, phases, counters, the stream of noise, and errors."""

from __future__ import annotations

import copy
import gc
import re
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import TorchRuntimeError

from aqnfx.errors import InputError, LiveError, PassError, SelectorError
from aqnfx.live.instrument import instrument
from tests.live.small import Tiny, batch, equal, gradients


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


def test_an_empty_selection_is_none() -> None:
    model, x = Tiny(), batch()
    clean = model(x)
    with instrument(model, inner="eager") as handle:
        for known in (False, True):  # before and after the first graph
            several: list[dict[str, Any]] = [{"layers": []}, {"ops": ()}, {"sites": []}, {"modules": set()}, {"where": ""}]
            for empty in [*several, {"layers": [], "ops": "linear"}]:
                with handle.noise(level=0.1, **empty):
                    assert torch.equal(model(x), clean), (known, empty)
            handle.set_noise(level=0.1, sites=[])
            assert torch.equal(model(x), clean)
            handle.set_noise(level=0.0)
        assert not any(n["forward"] for n in handle.stats().values())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"level": 1e39}, "noise level 1e+39 is inf in fp32"),
        ({"level": 1e-46}, "noise level 1e-46 is 0 in fp32"),
        ({"level": "much"}, "noise level 'much' is not a number"),
        ({"level": 0.1, "scale": lambda _: float("nan")}, "must be finite and not negative"),
        ({"level": 0.1, "scale": lambda site: -1.0 if site.layer == 1 else 1.0}, "scaled by -1.0, -1.0 must be"),
        ({"level": 1e30, "scale": lambda _: 1e30}, "scaled by 1e+30, 1.0000000000000001e+60 is inf in fp32"),
        ({"level": 0.1, "seed": "x"}, "seed 'x' is not a whole number"),
        ({"level": 0.1, "step": 0.5}, "step 0.5 is not a whole number"),
        ({"level": 0.1, "row_offset": [1]}, "row_offset [1] is not a whole number"),
    ],
    ids=[f"bad{number}" for number in range(9)],  # a function has another text in every process
)  # fmt: skip
def test_values_that_do_not_exist_change_nothing(bad: dict[str, Any], message: str) -> None:
    model, x = Tiny(), batch()
    with instrument(model, inner="eager") as handle:
        model(x)
        handle.set_noise(level=0.05, ops="linear", seed=3, step=0)
        expected = model(x)
        handle.set_noise(level=0.05, ops="linear", seed=3, step=0)
        before = {name: tensor.clone() for name, tensor in handle.controls.tensors.items()}
        uses = [lambda: handle.set_noise(**bad)]
        if "scale" not in bad:
            uses.append(lambda: handle.noise(**bad).__enter__())
        for use in uses:
            with pytest.raises(InputError, match=re.escape(message)):
                use()
        assert all(torch.equal(handle.controls.tensors[name], value) for name, value in before.items())
        assert torch.equal(model(x), expected)


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


@pytest.mark.slow
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
