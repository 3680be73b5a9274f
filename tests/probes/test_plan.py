"""Which probes a plan has: labels, windows and steps, for models with one and with two stacks."""

from __future__ import annotations

import functools
from typing import Any

import pytest

import aqnfx
from aqnfx.errors import InputError, SelectorError
from aqnfx.graph.program import Program
from aqnfx.graph.selector import Selector
from aqnfx.probes.measurements import Probe
from aqnfx.probes.probe_sets import PROBE_KINDS, plan_probes
from tests.families import build


@functools.cache
def program(name: str, layers: int) -> Program:
    changes: dict[str, Any] = {"num_layers": layers, "num_decoder_layers": 2} if name == "t5" else {}
    model = build(name, **(changes or {"num_hidden_layers": layers}))
    return aqnfx.Pipeline.parse("tag-layers,decompose-attention,tag-ops")(aqnfx.trace(model))


def plan(found: Program, where: str = "ops:extended", **options: Any) -> list[Probe]:
    return list(plan_probes(found, Selector.parse(where), **options))


def keys(probes: list[Probe], kind: str) -> list[str]:
    return [p.key for p in probes if p.kind == kind]


def test_one_stack() -> None:
    found = program("llama", 4)
    probes = plan(found, kinds=PROBE_KINDS)
    assert keys(probes, "layer") == ["0", "1", "2", "3"]
    assert keys(probes, "window") == ["0-2", "1-3"]
    assert set(keys(probes, "operator")) == {"linear", "matmul", "softmax", "rms_norm", "silu"}
    assert keys(probes, "all") == ["all"]
    selected = [s.id for s in found.select("ops:extended")]
    assert keys(probes, "site") == selected
    everything = next(p for p in probes if p.kind == "all")
    assert list(everything.sites) == selected
    assert everything.layers == ()
    assert len(set(probes)) == len(probes)


def test_sites_of_probes_partition_the_selection() -> None:
    found = program("llama", 4)
    probes = plan(found, kinds=PROBE_KINDS)
    by_id = {s.id: s for s in found.sites}
    for probe in probes:
        assert probe.sites
        assert len(set(probe.sites)) == len(probe.sites)
        if probe.kind == "operator":
            assert {str(by_id[s].op) for s in probe.sites} == {probe.key}
            assert probe.layers == ()
        if probe.kind in ("layer", "window"):
            assert {str(by_id[s].layer) for s in probe.sites} == set(probe.layers)
    selected = {s.id for s in found.select("ops:extended")}
    assert {s for p in probes if p.kind == "operator" for s in p.sites} == selected
    assert {s for p in probes if p.kind == "layer" for s in p.sites} == {
        s for s in selected if by_id[s].layer is not None
    }
    window = next(p for p in probes if p.key == "1-3")
    assert set(window.sites) == {s for p in probes if p.kind == "layer" and p.key in "123" for s in p.sites}


@pytest.mark.parametrize(
    ("window", "step", "expected"),
    [
        (1, 1, ["0-0", "1-1", "2-2", "3-3"]),
        (2, 1, ["0-1", "1-2", "2-3"]),
        (2, 2, ["0-1", "2-3"]),
        (3, 2, ["0-2"]),
        (4, 1, ["0-3"]),
        (2, 9, ["0-1"]),
    ],
)
def test_windows_and_steps(window: int, step: int, expected: list[str]) -> None:
    assert keys(plan(program("llama", 4), kinds=("window",), window=window, step=step), "window") == expected


def test_windows_hold_consecutive_selected_layers() -> None:
    probes = plan(program("llama", 4), "ops:linear,layers:0|2|3", kinds=("layer", "window"), window=2)
    assert keys(probes, "layer") == ["0", "2", "3"]
    assert keys(probes, "window") == ["2-3"]
    assert [p.layers for p in probes if p.kind == "window"] == [("2", "3")]


def test_two_stacks_have_labels_with_their_stack_and_no_window_over_both() -> None:
    probes = plan(program("t5", 3), "ops:linear", kinds=("layer", "window"), window=2)
    encoder, decoder = [f"encoder.block:{i}" for i in range(3)], [f"decoder.block:{i}" for i in range(2)]
    assert keys(probes, "layer") == encoder + decoder
    assert keys(probes, "window") == [f"{encoder[0]}-{encoder[1]}", f"{encoder[1]}-{encoder[2]}", "-".join(decoder)]
    for probe in probes:
        assert len({label.partition(":")[0] for label in probe.layers}) == 1
    # A window that only one stack is long enough for.
    probes = plan(program("t5", 3), "ops:linear", kinds=("window",), window=3)
    assert keys(probes, "window") == [f"{encoder[0]}-{encoder[2]}"]


def test_sites_outside_of_layers_are_in_no_layer_probe() -> None:
    probes = plan(program("llama", 4), "ops:linear", kinds=("operator", "layer", "site"))
    assert "lm_head:linear:0" in next(p for p in probes if p.kind == "operator").sites
    assert all("lm_head:linear:0" not in p.sites for p in probes if p.kind == "layer")
    assert next(p for p in probes if p.key == "lm_head:linear:0").layers == ()
    assert plan(program("llama", 4), "modules:lm_head", kinds=("layer", "window")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window 0 and step 1 must be at least 1"),
        ({"step": 0}, "step 0 must be at least 1"),
        ({"window": 5}, "window 5 is longer than the 4 selected layers; choose --window 4"),
        ({"kinds": ("layers",)}, "unknown probe kind 'layers'; known: operator"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(program("llama", 4), **options)


def test_nothing_selected_says_what_there_is() -> None:
    with pytest.raises(SelectorError, match="gelu"):
        plan(program("llama", 4), "ops:gelu")
