"""The sensitivity map as an artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_run import run

from aqnfx.artifacts import jsonable
from aqnfx.diagnosis.interpret import interpret
from aqnfx.diagnosis.sensitivity_map import SensitivityMap, layer_label, level_key
from aqnfx.errors import ArtifactError

MINIMAL: dict[str, Any] = {
    "schema": "aqnfx.sensitivity/1",
    "model": {"name": "tiny"},
    "task": {"metric": "kl", "samples": 100, "tokens": 12800},
    "noise": {"kind": "relative_gaussian", "levels": [0.01, 0.05], "base_level": 0.05, "seeds": [0, 1]},
    "per_site": [
        {"id": "a:linear:0", "module": "a", "op": "linear", "layer": 1, "region": "mlp",
         "measured": {"0.05": {"kl": 0.1, "ci": [0.0, 0.2], "degradation": 0.1}}},
    ],
    "per_operator": {"linear": 0.1},
    "per_layer": {"0": 0.1, "1": None},
    "windows": [{"layers": [0, 1], "measured": 0.2, "predicted": 0.1, "amplification": 2.0}],
}  # fmt: skip


def test_minimal_record_of_the_schema_is_enough() -> None:
    smap = SensitivityMap.from_record(MINIMAL)
    assert smap.levels == (0.01, 0.05)
    assert smap.base_level == 0.05
    assert smap.base_key == "0.05"
    assert smap.seeds == (0, 1)
    assert smap.samples == 100
    assert smap.confidence == 0.95
    assert smap.at_base("layer", "0") == {}


def test_round_trip_through_json() -> None:
    smap = interpret(run(n=20))
    assert SensitivityMap.from_record(json.loads(json.dumps(smap.to_record(), allow_nan=False))) == smap


def test_unknown_keys_survive() -> None:
    record = MINIMAL | {"sketch": {"columns": 3}}
    assert SensitivityMap.from_record(record).to_record()["sketch"] == {"columns": 3}


def test_map_does_not_share_with_its_record() -> None:
    record = json.loads(json.dumps(MINIMAL))
    smap = SensitivityMap.from_record(record)
    record["per_operator"]["linear"] = 9.0
    assert smap.per_operator["linear"] == 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "aqnfx.plan/1"}, "expected schema 'aqnfx.sensitivity/1', found 'aqnfx.plan/1'"),
        ({"schema": None}, "found None"),
        ({"per_operator": None}, "per_operator"),
        ({"per_layer": {"0": "high"}}, r"per_layer\.0"),
        ({"noise": {"kind": "x", "levels": [], "base_level": 0.1, "seeds": []}}, r"noise\.levels"),
        ({"task": {"metric": "kl", "tokens": 1}}, r"task\.samples: Field required"),
        ({"per_site": [{"id": "a"}]}, r"per_site\.0\.module.*and 3 more"),
        ({"per_layer": {"0": float("nan")}}, r"per_layer\.0"),
        ({"agreement": {"0.1": {"probes": 3}}}, r"agreement\.0\.1\.median_ratio"),
        ({"channels": {"a": {"channels": 8, "top": [["x", 0.1, 0.0, 0.2]]}}}, r"channels\.a\.top\.0\.0"),
        ({"weights": {"metric": 3}}, r"weights\.metric"),
        ({"method": 1}, "method"),
        ({"windows": [{"layers": [0], "measured": "x", "predicted": None, "amplification": None}]}, r"windows\.0\.measured"),
        ({"per_layer_detail": {"3": {"levels": {"0.1": 3}}}}, r"per_layer_detail\.3\.levels\.0\.1"),
        ({"sqnr": {"sites": "many"}}, r"sqnr\.format"),
        ({"avalanche_points": [3]}, r"avalanche_points\.0"),
    ],
)
def test_foreign_records_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        SensitivityMap.from_record(MINIMAL | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [key for key in MINIMAL if key != "schema"])
def test_required_keys(key: str) -> None:
    with pytest.raises(ArtifactError, match=key):
        SensitivityMap.from_record({k: v for k, v in MINIMAL.items() if k != key})


def test_second_order_fails_where_something_was_compared() -> None:
    compared = {"probes": 3, "median_ratio": 1.0, "within_25_percent": 1.0, "worst": {}}
    found = [
        SensitivityMap.from_record(MINIMAL | {"agreement": {level: compared | {"second_order_fails": fails}}}).second_order_fails
        for level, fails in (("0.05", True), ("0.05", False), ("0.01", True))
    ]
    assert found == [True, False, None]


def test_labels_and_keys() -> None:
    assert [level_key(x) for x in (0.05, 0.1, 1.0, 0.1 + 0.2, 1e-6)] == ["0.05", "0.1", "1", "0.3", "1e-06"]
    assert layer_label("12") == 12
    assert layer_label("decoder.block:3") == "decoder.block:3"


def test_jsonable() -> None:
    found = jsonable({"a": (float("nan"), np.float32(0.5), np.int64(3)), 1: Path("x"), "b": True, "c": None})
    assert found == {"a": [None, 0.5, 3], "1": "x", "b": True, "c": None}
