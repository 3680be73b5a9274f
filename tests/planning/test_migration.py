"""Migration plans: priorities of a map with a known truth, what raises them, and maps and divergences that are refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rich.console import Console

from aqnfx.artifacts import Schema
from aqnfx.diagnosis.advice.divergences import parse_divergences
from aqnfx.diagnosis.advice.migration import MigrationStep, migration_plan
from aqnfx.diagnosis.interpret import interpret
from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.errors import ArtifactError, InputError
from aqnfx.reporting.migration import migration_markdown, migration_record, print_migration
from tests.diagnosis.synthetic_run import run

UP0 = "model.layers.0.mlp.up:linear:0"


@pytest.fixture(scope="module")
def smap() -> SensitivityMap:
    return interpret(run())


def changed(smap: SensitivityMap, change: Callable[[dict[str, Any]], object]) -> SensitivityMap:
    record = copy.deepcopy(smap.to_record())
    change(record)
    return SensitivityMap.from_record(json.loads(json.dumps(record)))


def priorities(steps: tuple[MigrationStep, ...]) -> dict[str, int]:
    assert len({step.what for step in steps}) == len(steps), "everything is listed once"
    return {step.what: step.priority for step in steps}


def step_of(steps: tuple[MigrationStep, ...], what: str) -> MigrationStep:
    return next(step for step in steps if step.what == what)


def at_base(record: dict[str, Any], layer: str) -> dict[str, Any]:
    return record["per_layer_detail"][layer]["levels"]["0.05"]


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, float):
        yield value


def test_priorities_follow_the_truth(smap: SensitivityMap) -> None:
    steps = migration_plan(smap)
    assert priorities(steps) == {
        "layers 1, 2, 3 together": 1, "layer 2": 1, "operator linear": 1,
        "layer 1": 2, "layer 3": 2,  # robust alone, and in the avalanche window
        "layer 0": 3, "operator softmax": 3, "operator silu": 3,
    }  # fmt: skip
    assert [step.priority for step in steps] == sorted(step.priority for step in steps)
    assert {step.action for step in steps} == {"validate first in fp16", "spot-check in bf16", "standard int8"}
    assert step_of(steps, "layer 2").action == "validate first in fp16"
    assert "an avalanche window" in steps[0].reasons[0].text
    assert "in a window of priority 1: 1 to 3" in step_of(steps, "layer 1").reasons[0].text
    silu = step_of(steps, "operator silu").reasons[0]
    assert silu.noise_free
    assert "no change at all was seen on 120 samples: not distinguishable from noise-free" in silu.text
    assert not step_of(steps, "layer 0").reasons[0].noise_free
    assert migration_plan(smap.to_record()) == steps


def test_every_number_is_one_of_the_map(smap: SensitivityMap) -> None:
    known = set(numbers(smap.to_record()))
    steps = migration_plan(smap)
    for step in steps:
        for number in (number for reason in step.reasons for number in reason.numbers):
            assert {number.value, *(number.ci or ())} <= known
    found = {number.name: number for number in step_of(steps, "layer 2").reasons[0].numbers}
    level = smap.at_base("layer", "2")
    assert (found["degradation"].value, list(found["degradation"].ci or ())) == (level["degradation"], level["degradation_ci"])
    assert list(found["score"].ci or ()) == level["score_ci"]
    assert [number.name for number in steps[0].reasons[0].numbers] == ["degradation", "amplification"]


@pytest.mark.parametrize(
    ("level", "priority", "text"),
    [
        ({"class": "moderate"}, 2, "of class moderate"),
        ({"class": "critical"}, 1, "of class critical, which the measurement does not settle"),
        ({"class": "critical", "degradation_ci": [-0.1, 0.5]}, 1, "of class critical; not distinguishable from noise-free"),
        ({"distinguishable": False}, 3, "not distinguishable from noise-free when all comparisons are counted"),
        ({"score_ci": [0.4, 1.5]}, 2, "of class robust, with an interval that reaches into moderate"),
        ({"score_ci": [0.4, 1.49]}, 3, "of class robust up to the high end of its interval"),
        ({"score_ci": [None, None]}, 2, "of class robust"),
        ({"score": None}, 2, "the map has no score at its base level"),
        ({"degradation_ci": None}, 3, "the map has no interval"),
        ({"estimated": True}, 2, "predictions do not hold at this level; by prediction, not measured"),
    ],
)
def test_classes_and_doubts(smap: SensitivityMap, level: dict[str, Any], priority: int, text: str) -> None:
    step = step_of(migration_plan(changed(smap, lambda record: at_base(record, "0").update(level))), "layer 0")
    assert step.priority == priority
    assert text in step.reasons[0].text


def test_predictions_count_where_they_hold(smap: SensitivityMap) -> None:
    agreement = {
        "probes": 5, "median_ratio": 1.0, "within_25_percent": 1.0, "worst": {}, "second_order_fails": False,
    }  # fmt: skip

    def change(record: dict[str, Any]) -> None:
        record["agreement"] = {"0.05": agreement}
        at_base(record, "0").update(estimated=True, distinguishable=False)

    step = step_of(migration_plan(changed(smap, change)), "layer 0")
    assert step.priority == 3
    assert step.reasons[0].text.endswith("; by prediction, not measured")


@pytest.mark.parametrize(
    ("window", "avalanche", "priority", "text"),
    [
        ({"class": "avalanche"}, False, 1, "together they lose more than 15 %"),
        ({"class": "avalanche", "distinguishable": False}, False, 2, "together they lose more than 15 %"),
        ({"class": "high"}, False, 2, "together they lose 10 to 15 %"),
        ({"class": "moderate", "degradation_ci": [-0.01, 0.1]}, False, 2, "not distinguishable from noise-free"),
        ({"class": "robust"}, True, 1, "an avalanche window"),
        ({"class": "robust"}, False, None, ""),
    ],
)
def test_windows(smap: SensitivityMap, window: dict[str, Any], avalanche: bool, priority: int | None, text: str) -> None:
    def change(record: dict[str, Any]) -> None:
        next(w for w in record["windows"] if w["key"] == "1-3").update(window)
        record["avalanche_points"] = [[1, 2, 3]] if avalanche else []

    steps = migration_plan(changed(smap, change))
    assert priorities(steps).get("layers 1, 2, 3 together") == priority
    assert priorities(steps)["layer 1"] == (2 if priority == 1 else 3)
    if priority is not None:
        assert text in step_of(steps, "layers 1, 2, 3 together").reasons[0].text


def test_layers_of_windows_alone_are_not_known_by_themselves(smap: SensitivityMap) -> None:
    def change(record: dict[str, Any]) -> None:
        record.update(per_layer={}, per_layer_detail={}, critical_layers=[])
        next(w for w in record["windows"] if w["key"] == "0-1")["class"] = "moderate"

    steps = migration_plan(changed(smap, change))
    assert priorities(steps)["layer 0"] == 2
    assert step_of(steps, "layer 0").reasons[0].text == "the map has no number for it alone"


@pytest.mark.parametrize(
    ("name", "error", "what", "priority"),
    [
        (UP0, 0.5, "layer 0", 1), (UP0, 0.1, "layer 0", 2), (UP0, 0.011, "layer 0", 2), (UP0, 0.01, "layer 0", 3),
        ("0", 0.2, "layer 0", 1), ("model.layers.0.mlp", 0.05, "layer 0", 2), ("model.layers.0.mlp.up", 0.2, "layer 0", 1),
        ("lm_head:linear:0", 0.2, "module lm_head", 1), ("lm_head", 0.001, "module lm_head", 2), ("2", 0.0, "layer 2", 1),
        ("model.layers", 0.05, "module model.layers", 2),
    ],
)  # fmt: skip
def test_divergences_raise_priorities(smap: SensitivityMap, name: str, error: float, what: str, priority: int) -> None:
    step = step_of(migration_plan(smap, {name: error}), what)
    assert step.priority == priority
    reason = next(reason for reason in step.reasons if reason.text.startswith("diverges"))
    assert reason.numbers[0].value == error
    assert (f"at {name}" in reason.text) == (name not in ("0", "2", "lm_head", "model.layers"))


def test_thresholds_of_divergences(smap: SensitivityMap) -> None:
    assert priorities(migration_plan(smap, {"0": 0.05}, thresholds=(0.04, 0.01)))["layer 0"] == 1
    for thresholds in ((0.01, 0.1), (0.1, -0.1), (float("nan"), 0.1)):
        with pytest.raises(InputError, match="two falling numbers"):
            migration_plan(smap, thresholds=thresholds)


def test_unknown_names_are_refused(smap: SensitivityMap) -> None:
    with pytest.raises(InputError, match=r"the map has no site, layer or module 'lm_haed'; did you mean .*'lm_head'"):
        migration_plan(smap, {"lm_haed": 0.1})
    for name in ("9", "", "model.layers.0.ml", "linear"):
        with pytest.raises(InputError, match="has no site, layer or module"):
            migration_plan(smap, {name: 0.1})


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ([], "expected schema"), ({"sites": {"a": 1}}, "expected schema"),
        ({"schema": "aqnfx.divergences/2", "sites": {"a": 1}}, "found 'aqnfx.divergences/2'"),
        ({"schema": Schema.DIVERGENCES}, "sites: Field required"),
        ({"schema": Schema.DIVERGENCES, "sites": {}}, "at least 1 item"),
        ({"schema": Schema.DIVERGENCES, "sites": ["a"]}, "sites: Input should be a valid dict"),
        *(
            ({"schema": Schema.DIVERGENCES, "sites": {"a": bad}}, "sites.a")
            for bad in (True, "1", -0.1, 10**400, None, float("inf"), [0.1])
        ),
    ],
)  # fmt: skip
def test_divergences_that_are_none(record: Any, found: str) -> None:
    with pytest.raises(ArtifactError) as error:
        parse_divergences(record, "d.json")
    assert found in str(error.value)
    assert str(error.value).startswith("d.json: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda r: r.update(critical_layers=[9]), "critical layer '9' is none of its layers"),
        (lambda r: r.update(critical_ops=["conv"]), "critical operator 'conv'"),
        (lambda r: at_base(r, "1").update(score="high"), "per_layer_detail.1.levels.0.05.score: Input should be a valid number"),
        (lambda r: at_base(r, "1").update(degradation=True), "degradation of layer '1' must be a number"),
        (lambda r: at_base(r, "1").update(degradation_ci=[0.1]), "levels.0.05.degradation_ci: List should have at least 2"),
        (lambda r: r["windows"][1].update(degradation="much"), "degradation of window [1, 2, 3] must be a number"),
        (lambda r: r["windows"][1].update(layers=[]), "a window has no layers"),
        (lambda r: r.update(schema="aqnfx.scan/1"), "expected schema"),
    ],
)
def test_maps_that_contradict_themselves(smap: SensitivityMap, change: Callable[[Any], object], found: str) -> None:
    with pytest.raises(ArtifactError) as error:
        migration_plan(changed(smap, change))
    assert found in str(error.value)


def test_a_map_of_nothing_to_list(smap: SensitivityMap) -> None:
    bare = changed(smap, lambda r: r.update(
        per_layer={}, per_operator={}, windows=[], critical_layers=[], critical_ops=[],
    ))  # fmt: skip
    with pytest.raises(InputError, match="no operator, layer or window to list"):
        migration_plan(bare)
    assert [step.what for step in migration_plan(bare, {"0": 0.2})] == ["layer 0"]


def test_the_record_and_what_is_printed(smap: SensitivityMap, capsys: pytest.CaptureFixture[str]) -> None:
    steps = migration_plan(smap, {UP0: 0.05})
    record = migration_record(steps, smap, model={"name": "[red]a|b\x1b[31m"}, divergences={UP0: 0.05})
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["schema"], record["divergences"]["thresholds"]) == ("aqnfx.migration/1", [0.1, 0.01])
    assert [step["what"] for step in record["steps"]] == [step.what for step in steps]
    assert record["map"]["base_level"] == 0.05
    print_migration(record, Console(width=200))
    out = capsys.readouterr().out
    assert "[red]a|b\\x1b[31m" in out
    assert "loses 24.8 %, 24.2 to 25.5 %, score 4.96, 4.83 to 5.10" in out
    text = migration_markdown(record)
    assert "\x1b" not in text
    assert r"\[red\]a\|b" in text
    for heading in ("## Priority 1: validate first in fp16", "## Priority 2: spot-check in bf16", "## Priority 3: standard int8"):
        assert heading in text
    nothing = interpret(run({("operator", "linear"): (0.0, 0.0)}, n=30))
    notes = migration_record((), nothing)["notes"]
    assert any("Nothing in the map is distinguishable from noise-free" in note for note in notes)
    assert "Nothing." in migration_markdown(migration_record((), nothing))
