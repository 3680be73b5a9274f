"""IntegratedDiagnostic: the same map as diagnose(), and its reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import aqnfx
from aqnfx.errors import InputError
from aqnfx.reporting.report import load_map
from tests.cli.tiny import TEXT, tokenizer
from tests.families import build

OPTIONS: dict[str, Any] = {
    "samples": 4, "seeds": 2, "max_length": 24, "ops": "linear", "compile": "no", "batch_size": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    return aqnfx.trace(build("llama", num_hidden_layers=3))


@pytest.fixture(scope="module")
def finished(model: Any) -> aqnfx.IntegratedDiagnostic:
    diagnostic = aqnfx.IntegratedDiagnostic(model, TEXT, levels=(0.1, 0.3), tokenizer=tokenizer(), **OPTIONS)
    diagnostic.run_full_diagnosis(noise_scale=0.2, window_size=2)
    return diagnostic


@pytest.mark.slow
def test_it_is_diagnose(finished: aqnfx.IntegratedDiagnostic, model: Any) -> None:
    expected = aqnfx.diagnose(
        model, TEXT, levels=(0.1, 0.2, 0.3), base_level=0.2, window=2, tokenizer=tokenizer(), **OPTIONS
    )  # fmt: skip
    assert finished.sensitivity_map is not None
    found, wanted = finished.sensitivity_map.to_record(), expected.to_record()
    del found["provenance"], wanted["provenance"]
    assert found == wanted


def test_defaults_are_one_level_and_windows_of_three(model: Any) -> None:
    diagnostic = aqnfx.IntegratedDiagnostic(model, TEXT, tokenizer=tokenizer(), **OPTIONS)
    smap = diagnostic.run_full_diagnosis()
    assert smap is diagnostic.sensitivity_map
    assert smap.levels == (0.05,)
    assert [w["layers"] for w in smap.windows] == [[0, 1, 2]]


def test_reports(finished: aqnfx.IntegratedDiagnostic, tmp_path: Path) -> None:
    text = finished.generate_report()
    assert text.startswith("# ")
    assert "linear" in text
    paths = finished.save_report(tmp_path / "out")
    assert set(paths) == {"map", "report", "markdown"}
    assert paths["markdown"].read_text(encoding="utf-8") == text
    assert json.loads(paths["report"].read_text(encoding="utf-8"))["schema"] == "aqnfx.diagnosis/1"
    assert finished.sensitivity_map is not None
    assert load_map(tmp_path / "out").to_record() == finished.sensitivity_map.to_record()


def test_there_is_no_report_before_a_run(model: Any, tmp_path: Path) -> None:
    diagnostic = aqnfx.IntegratedDiagnostic(model, TEXT, tokenizer=tokenizer())
    with pytest.raises(InputError, match="run_full_diagnosis"):
        diagnostic.generate_report()
    with pytest.raises(InputError, match="run_full_diagnosis"):
        diagnostic.save_report(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_channels_are_read_on_the_calibration_data(model: Any) -> None:
    options = OPTIONS | {"method": "both"}
    diagnostic = aqnfx.IntegratedDiagnostic(model, TEXT, calibration_data=["a cat"] * 4, tokenizer=tokenizer(), **options)
    smap = diagnostic.run_full_diagnosis(outlier_threshold=1.5)
    own = aqnfx.IntegratedDiagnostic(model, TEXT, tokenizer=tokenizer(), **options).run_full_diagnosis(outlier_threshold=1.5)
    assert smap.channels.keys() == own.channels.keys() != set()
    site, found = next((k, v) for k, v in smap.channels.items() if v["outliers"])
    assert all(entry["ratio"] >= 1.5 for entry in found["outliers"])
    assert found["top"] == own.channels[site]["top"]  # sensitivity is read on the test data
    assert found["max_ratio"] != own.channels[site]["max_ratio"]  # and magnitude on the calibration data
    assert "Channels of outlying magnitude" in diagnostic.generate_report()


@pytest.mark.parametrize(
    ("options", "message"), [({"noise_scale": 0.0}, "noise level 0.0"), ({"window_size": 4}, "window 4 is longer")]
)
def test_bad_values(model: Any, options: dict[str, Any], message: str) -> None:
    diagnostic = aqnfx.IntegratedDiagnostic(model, TEXT, tokenizer=tokenizer(), **OPTIONS)
    with pytest.raises(InputError, match=message):
        diagnostic.run_full_diagnosis(**options)
