"""The switch-board: old names, old meaning, process-wide, and safe from several threads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from aqnfx import noisy_ops
from aqnfx.errors import InputError, LiveError, SelectorError
from aqnfx.live.board import Board
from aqnfx.live.instrument import instrument
from tests.live.small import Tiny, batch, gradients


@pytest.fixture(autouse=True)
def _fresh_board() -> Iterator[None]:
    board, noisy_ops._board = noisy_ops._board, Board()
    yield
    for model in list(noisy_ops._board.handles):
        noisy_ops.unregister_layer_hooks(model)
    noisy_ops._board = board


def hits() -> dict[int | str, dict[str, int]]:
    found = noisy_ops.get_layer_injection_stats()
    noisy_ops.reset_layer_injection_stats()
    return found


def test_a_script_of_the_old_switch_board() -> None:
    model, x = Tiny(), batch()
    clean = model(x)
    assert noisy_ops.register_layer_hooks(model) == 2
    assert noisy_ops.register_layer_hooks(model, layer_pattern=".layers.") == 2
    assert torch.equal(model(x), clean)
    noisy_ops.enable_noisy_ops(error_scale=0.05)
    noised = model(x)
    assert not torch.equal(noised, clean)
    gradients(model, noised.square().sum())
    assert hits() == {
        0: {"forward": 2, "backward": 2}, 1: {"forward": 2, "backward": 2}, "unknown": {"forward": 1, "backward": 1}
    }
    noisy_ops.set_selective_layers([1])
    assert noisy_ops.get_selective_layers() == {1}
    noisy_ops.set_noise_phases(forward=False, backward=True)
    assert noisy_ops.get_noise_phases() == {"forward_enabled": False, "backward_enabled": True}
    gradients(model, model(x).square().sum())
    assert hits() == {1: {"forward": 0, "backward": 2}}
    noisy_ops.set_noise_phases(forward=True, backward=False)
    noisy_ops.set_layer_window(0, 1)
    for call in (noisy_ops.set_selective_operators, noisy_ops.set_selective_ops, noisy_ops.set_selective_op_types):
        call(["linear"])
        assert noisy_ops.get_selective_operators() == {"linear"}
        model(x)
        assert hits() == {layer: {"forward": 2, "backward": 0} for layer in (0, 1)}
        call(["matmul"])  # products with weights are products
        model(x)
        assert hits() == {layer: {"forward": 2, "backward": 0} for layer in (0, 1)}
        call(None)
    noisy_ops.set_selective_layers([])
    assert torch.equal(model(x), clean)
    noisy_ops.set_selective_layers(None)
    noisy_ops.disable_noisy_ops()
    assert torch.equal(model(x), clean)
    assert not hits()


def test_contexts_give_back_what_was_switched() -> None:
    model, x = Tiny(), batch()
    clean = model(x)
    noisy_ops.register_layer_hooks(model)
    with noisy_ops.noisy_ops_context(error_scale=0.1):
        first = model(x)
        with noisy_ops.noisy_ops_context(error_scale=0.0):
            assert torch.equal(model(x), clean)
        assert not torch.equal(model(x), clean)
    assert not torch.equal(first, clean)
    assert not noisy_ops.is_enabled()
    assert torch.equal(model(x), clean)


def test_scales_channels_and_types() -> None:
    model, x = Tiny().requires_grad_(False), batch()
    clean = model(x)
    noisy_ops.register_layer_hooks(model)
    noisy_ops.enable_noisy_ops(0.1)
    noisy_ops.set_selective_operators(["linear"])
    noisy_ops.set_per_layer_scales({0: 0.0, 1: 0.0})
    noisy_ops.set_per_operator_scales({"linear": 0.5})
    handle = noisy_ops._board.handles[model]
    model(x)
    levels = {site: handle.controls.levels(site)[0] for site in handle.sites}
    assert levels["head:linear:0"] == pytest.approx(0.05)
    assert levels["layers.0.up:linear:0"] == 0.0
    noisy_ops.set_per_layer_scales(None)
    noisy_ops.set_per_operator_scales(None)
    noisy_ops.set_per_layer_scales({0: 0.0, 1: 0.0})
    noisy_ops.set_selective_channels([1])
    changed = (model(x) != clean).any(0)
    assert changed.tolist() == [False, True, False]
    noisy_ops.set_selective_channels(None)
    noisy_ops.set_noise_seed(3)
    noisy_ops.enable_noisy_ops(0.1, "bias")
    assert torch.allclose(model(x), clean + 0.1 * clean.abs(), rtol=1e-5)


def test_phases_are_counted_apart() -> None:
    model, x = Tiny(), batch()
    noisy_ops.register_layer_hooks(model)
    noisy_ops.print_injection_summary()
    noisy_ops.enable_noisy_ops(0.1)
    noisy_ops.set_phase("rollout")
    with torch.no_grad():
        model(x)
    noisy_ops.set_phase("actor_forward")
    loss = model(x).square().sum()
    noisy_ops.set_phase("actor_backward")
    gradients(model, loss)
    assert noisy_ops.get_phase() == "actor_backward"
    stats = noisy_ops.get_injection_stats()
    assert stats["counts"] == {
        "rollout_forward": 5, "rollout_backward": 0, "actor_forward": 5, "actor_backward": 5, "unknown_forward": 0,
        "unknown_backward": 0,
    }  # fmt: skip
    assert (stats["total_forward"], stats["total_backward"], stats["enabled"]) == (10, 5, True)
    noisy_ops.reset_injection_stats()
    assert noisy_ops.get_injection_stats()["total_forward"] == 0


def test_the_summary_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    noisy_ops.enable_noisy_ops(0.1)
    noisy_ops.print_injection_summary()
    assert "no model is registered" in capsys.readouterr().out
    model = Tiny()
    noisy_ops.register_layer_hooks(model)
    model(batch())
    noisy_ops.print_injection_summary()
    assert "unknown: forward 5, backward 0" in capsys.readouterr().out


def test_wrong_values_change_nothing() -> None:
    model, x = Tiny(), batch()
    noisy_ops.register_layer_hooks(model)
    noisy_ops.enable_noisy_ops(0.1)
    model(x)
    before = noisy_ops._board.switches
    for call, message in (
        (lambda: noisy_ops.set_selective_layers([9]), "out of range; the model has layers 0-1"),
        (lambda: noisy_ops.set_selective_layers([-1]), "layer -1 is not a number from 0 on"),
        (lambda: noisy_ops.set_layer_window(1, 0), "is empty"),
        (lambda: noisy_ops.set_selective_operators(["softmax"]), "selects none"),
        (lambda: noisy_ops.set_selective_operators(["sofmax"]), "did you mean 'softmax'"),
        (lambda: noisy_ops.set_selective_channels([99]), "has channels"),
        (lambda: noisy_ops.enable_noisy_ops(-1.0), "not negative"),
        (lambda: noisy_ops.enable_noisy_ops(0.1, "gaussian"), "unknown error_type"),
        (lambda: noisy_ops.set_per_layer_scales({0: float("nan")}), "not negative"),
        (lambda: noisy_ops.set_noise_seed("x"), "seed 'x' is not a whole number"),  # type: ignore[arg-type]
        (lambda: noisy_ops.enable_noisy_ops(1e39), "in fp32"),
        (lambda: noisy_ops.noisy_ops_context(1e-46).__enter__(), "in fp32"),
        (lambda: noisy_ops.set_phase("later"), "unknown phase"),  # type: ignore[arg-type]
    ):
        with pytest.raises((InputError, SelectorError), match=message):
            call()
        assert noisy_ops._board.switches is before
    other = Tiny()
    with pytest.raises(InputError, match=r"its layers are in layers"):
        noisy_ops.register_layer_hooks(other, layer_pattern=".h.")
    instrument(other, inner="eager").remove()  # nothing was left behind


def test_a_model_that_cannot_be_captured_is_forgotten() -> None:
    class Disabled(Tiny):
        @torch.compiler.disable
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x)

    model = Disabled()
    noisy_ops.register_layer_hooks(model)
    with pytest.raises(LiveError, match="no graph of Disabled was captured"):
        model(batch())
    noisy_ops.enable_noisy_ops(0.1)  # the others can still be switched
    assert noisy_ops.get_injection_stats()["models"] == 0
    assert model(batch()).shape == (5, 3)


def test_blocks_of_threads_that_overlap_leave_nothing_on() -> None:
    model, x = Tiny(), batch()
    noisy_ops.register_layer_hooks(model)
    clean = model(x)
    inside, leave = threading.Event(), threading.Event()
    noisy: list[bool] = []

    def other() -> None:
        with noisy_ops.noisy_ops_context(error_scale=0.2):
            inside.set()
            leave.wait(60)
            noisy.append(not torch.equal(model(x), clean))

    thread = threading.Thread(target=other)
    with noisy_ops.noisy_ops_context(error_scale=0.1):
        thread.start()
        inside.wait(60)
    assert noisy_ops.is_enabled()  # the other's block goes on
    assert noisy_ops._board.switches.error_scale == 0.2
    leave.set()
    thread.join()
    assert noisy == [True]
    assert not noisy_ops.is_enabled()
    assert torch.equal(model(x), clean)


def test_a_block_ends_what_is_switched_in_it_and_keeps_the_rest() -> None:
    noisy_ops.enable_noisy_ops(0.3)
    with noisy_ops.noisy_ops_context(0.1):
        noisy_ops.set_selective_layers([1])
        noisy_ops.disable_noisy_ops()
        assert not noisy_ops.is_enabled()
    assert noisy_ops.is_enabled()
    assert noisy_ops._board.switches.error_scale == 0.3
    assert noisy_ops.get_selective_layers() == {1}


def test_noise_follows_the_generator_of_torch_unless_a_seed_is_set() -> None:
    model, x = Tiny().requires_grad_(False), batch()
    clean = model(x)
    noisy_ops.register_layer_hooks(model)
    before = torch.get_rng_state()
    assert torch.equal(model(x), clean)
    assert torch.equal(torch.get_rng_state(), before)  # what is off draws nothing
    noisy_ops.enable_noisy_ops(0.1)
    noisy_ops.set_selective_layers([1])
    torch.manual_seed(7)
    first, second = model(x), model(x)
    state = torch.get_rng_state()
    third = model(x)
    torch.manual_seed(7)
    assert torch.equal(model(x), first)
    torch.set_rng_state(state)
    assert torch.equal(model(x), third)
    torch.manual_seed(8)
    assert len({value.numpy().tobytes() for value in (clean, first, second, third, model(x))}) == 5
    torch.manual_seed(7)
    noisy_ops.enable_noisy_ops(0.1, "bias")
    noisy_ops.enable_noisy_ops(0.1)  # another kind is another instrumentation: the stream is torch's as before
    assert torch.equal(model(x), first)
    noisy_ops.set_noise_seed(3)
    state = torch.get_rng_state()
    own = [model(x), model(x)]
    assert torch.equal(torch.get_rng_state(), state)
    noisy_ops.set_noise_seed(3)
    torch.manual_seed(1)
    assert [torch.equal(model(x), value) for value in own] == [True, True]
    noisy_ops.set_noise_seed(None)
    torch.manual_seed(7)
    assert torch.equal(model(x), first)


def test_threads_may_switch() -> None:
    models = [Tiny(), Tiny()]
    for model in models:
        noisy_ops.register_layer_hooks(model)
    errors: list[BaseException] = []

    def switch(number: int) -> None:
        try:
            for step in range(30):
                noisy_ops.enable_noisy_ops(0.01 * (step + 1))
                noisy_ops.set_selective_layers([step % 2])
                models[number](batch())
                noisy_ops.get_layer_injection_stats()
        except BaseException as error:
            errors.append(error)

    for model in models:
        model(batch())
    threads = [threading.Thread(target=switch, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sum(n["forward"] for n in hits().values()) > 0


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ENABLED": "1", "SCALE": "0.01", "LAYERS": "0,2-3", "OPS": "linear, softmax", "BACKWARD_ONLY": "yes", "SEED": "7"},
         "True 0.01 [0, 2, 3] ['linear', 'softmax'] False True 7"),
        ({}, "False 1e-05 None None True True None"),
        ({"SCALE": "much", "ENABLED": "1"}, "AQNFX_NOISE_SCALE=much is not a number"),
        ({"LAYRES": "1"}, "unknown environment variable AQNFX_NOISE_LAYRES; did you mean 'LAYERS'?"),
        ({"FORWARD_ONLY": "1", "BACKWARD_ONLY": "1"}, "exclude each other"),
        ({"LAYERS": "a-b"}, "is not a list like 0,3-5"),
        ({"LAYERS": "0,5-2"}, "AQNFX_NOISE_LAYERS=0,5-2 has the empty range 5-2; write 2-5"),
        ({"ENABLED": "1", "SCALE": "1e39"}, "error_scale 1e+39 is inf in fp32"),
        ({"ENABLED": "perhaps"}, "is neither yes nor no"),
    ],
)  # fmt: skip
def test_the_environment_says_what_is_switched(variables: dict[str, str], expected: str) -> None:
    given = {f"AQNFX_NOISE_{key}": value for key, value in variables.items()}
    if expected.split()[0] not in ("True", "False"):
        with pytest.raises(InputError, match=re.escape(expected)):
            noisy_ops._from_environment(given)
        assert not noisy_ops.is_enabled()
        return
    noisy_ops._from_environment(given)
    board, s = noisy_ops._board, noisy_ops._board.switches
    layers, operators = s.layers and sorted(s.layers), s.operators and sorted(s.operators)
    assert f"{s.enabled} {s.error_scale} {layers} {operators} {s.forward} {s.backward} {board.seed}" == expected


def test_the_environment_is_read_at_import() -> None:
    code = "from aqnfx import noisy_ops; print(noisy_ops.get_injection_stats()['error_scale'], noisy_ops.is_enabled())"
    environment = {**os.environ, "AQNFX_NOISE_ENABLED": "1", "AQNFX_NOISE_SCALE": "0.25"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["0.25", "True"]
