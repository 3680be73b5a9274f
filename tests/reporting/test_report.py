"""The report record, its Markdown and the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from synthetic_run import provenance, run

from aqnfx.diagnosis.interpret import interpret
from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.errors import InputError
from aqnfx.reporting.blocks import Column, Table
from aqnfx.reporting.kinds import TEXT
from aqnfx.reporting.report import build_report, load_map, report_markdown, save_report
from aqnfx.reporting.text import percent, percent_range

EVIL = "a|b `c` <script>alert(1)</script> **d** [e](http://x) $f$ __g__\n# h"


@pytest.fixture(scope="module")
def smap() -> SensitivityMap:
    return interpret(run())


@pytest.fixture(scope="module")
def text(smap: SensitivityMap) -> str:
    return report_markdown(smap, build_report(smap))


def test_record(smap: SensitivityMap) -> None:
    report = build_report(smap)
    json.dumps(report, allow_nan=False)
    assert report["schema"] == "aqnfx.diagnosis/1"
    assert [row["key"] for row in report["operators"]] == ["linear", "softmax", "silu"]
    assert report["critical_layers"] == [2]
    assert report["avalanche_points"] == [[1, 2, 3]]
    assert report["layer_levels"]["2"]["levels"]["0.1"]["degradation"] == pytest.approx(0.5, abs=0.03)
    assert report["recommendations"][0]["priority"] == 1
    assert report["cost"] == {"seconds": 12.5, "runs": 54, "compile": False}
    assert "seconds" not in report["provenance"]
    assert report["provenance"]["torch"] == "2.13.0"
    assert 3 <= len(report["summary"]) <= 6


def test_sections_in_order(text: str) -> None:
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert heads == [
        "# Noise sensitivity of tiny", "## Summary", "## Operators at level 0.05", "## Layers",
        "## Windows at level 0.05", "## Recommendations", "## Method", "## Provenance", "## Cost",
    ]  # fmt: skip
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_summary_names_the_truth_with_intervals(smap: SensitivityMap, text: str) -> None:
    linear = smap.at_base("operator", "linear")
    numbers = f"{percent(linear['degradation'])} ({percent_range(linear['degradation_ci'])})"
    summary = text.split("## Summary")[1].split("##")[0]
    assert "3 operator kinds, 4 layers, 2 windows of tiny" in summary
    assert "on 120 samples" in summary
    assert "with 2 seeds" in summary
    assert "95 % intervals" in summary
    assert f"The most sensitive operator is linear: degradation {numbers} and KL 0." in summary
    assert "The most sensitive layer is 2: degradation" in summary
    assert "distinguishable from all other layers" in summary
    assert "1 of 2 windows are avalanche points (1-3)" in summary
    assert "Critical, with the whole interval above robust: operators linear; layers 2." in summary


def test_tables(smap: SensitivityMap, text: str) -> None:
    lines = text.splitlines()
    most = percent(smap.per_operator["linear"])
    assert any(line.startswith(f"| 1 | linear | {most} |") and "| critical | yes |" in line for line in lines)
    assert any(line.startswith("| 3 | silu | 0.0 % | 0.0 to 0.0 % | 0 |") for line in lines)
    assert "| Layer | Level 0.01 | Level 0.05 | Level 0.1 | Rank |" in text
    assert any(line.startswith("| 2 | ") and "| 1 | critical | 0.0" in line for line in lines)
    assert any(line.startswith("| 1-3 | ") and line.endswith("| yes | yes |") for line in lines)
    assert "Avalanche points: 1-3." in text
    assert "| model.digest | sha256:ab12 |" in text
    assert "| pipeline | tag-layers" in text
    assert "| noise.seeds | 0, 1 |" in text
    assert "| measurement | 54 | n/a | 12.5 | n/a |" in text


def test_recommendations_are_numbered_by_priority(text: str) -> None:
    part = text.split("## Recommendations\n\n")[1].split("\n\n")[0].splitlines()
    assert part[0].startswith(
        "1. **Priority 1**, keep in fp16 or higher, validate first: layers 1, 2, 3 together. Together these layers "
        "lose more than 15 %; "
    )
    priorities = [int(line.split("Priority ")[1][0]) for line in part]
    assert priorities == sorted(priorities)
    assert set(priorities) == {1, 3}


def test_nothing_found_is_said() -> None:
    silent = interpret(run({("operator", "linear"): (0.0, 0.0), ("layer", "0"): (0.0, 0.0)}, n=30))
    text = report_markdown(silent, build_report(silent))
    assert "Nothing was found: no operator, layer or window has a degradation distinguishable from 0" in text
    assert "raise --samples to 120" in text
    assert "## Windows" not in text


def test_tie_at_the_top_is_said() -> None:
    even = interpret(run({("layer", "0"): (0.1, 0.1), ("layer", "1"): (0.1, 0.1)}, n=60))
    assert "it is not distinguishable from" in " ".join(build_report(even)["summary"])


def test_partial_run_is_said() -> None:
    partial = interpret(run(n=25, complete=False, samples_requested=80))
    text = report_markdown(partial, build_report(partial))
    assert "**Partial run.**" in text
    assert "25 of 80 samples" in text


class Collector(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_names_from_outside_cannot_add_markup() -> None:
    origin = provenance() | {"model": {"name": EVIL}, "data": {EVIL: EVIL}}
    with_evil = run({("operator", "linear"): (0.2, 0.2), ("layer", "0"): (0.2, 0.2)}, n=20, provenance=origin)
    for probe in with_evil.probes:
        object.__setattr__(probe, "key", EVIL)
    found = interpret(with_evil)
    page = Collector()
    reader = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    page.feed(reader.render(report_markdown(found, build_report(found))))
    allowed = {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "ol", "li", "strong", "blockquote"}
    assert page.tags <= allowed
    assert "a|b `c` <script>alert(1)</script> **d** [e](http://x) $f$ __g__ # h" in page.text


def test_table_refuses_ragged_rows() -> None:
    with pytest.raises(ValueError, match="1 cells under 2 columns"):
        Table(columns=(Column(label="a", kind=TEXT), Column(label="b", kind=TEXT)), rows=(("1",),))


def test_saved_files_read_back(smap: SensitivityMap, tmp_path: Path) -> None:
    paths = save_report(smap, tmp_path / "new" / "out")
    assert sorted(path.name for path in paths.values()) == ["report.json", "report.md", "sensitivity_map.json"]
    assert load_map(tmp_path / "new" / "out") == smap == load_map(paths["map"])
    assert json.loads(paths["report"].read_text()) == build_report(smap)
    again = load_map(paths["map"])
    assert report_markdown(again, build_report(again)) == paths["markdown"].read_text()


def test_saving_where_a_file_is(smap: SensitivityMap, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match="in the way"):
        save_report(smap, tmp_path / "out")


@pytest.mark.parametrize("make", [lambda: Path("x"), lambda: object()])
def test_odd_provenance_does_not_lose_the_report(tmp_path: Path, make: Callable[[], object]) -> None:
    found = interpret(run(n=5, provenance={"device": make(), "model": "just-a-name"}))
    paths = save_report(found, tmp_path)
    assert "# Noise sensitivity of just-a-name" in paths["markdown"].read_text()


def test_minimal_map_can_be_reported() -> None:
    """A map from another producer, with only the required keys."""
    minimal = SensitivityMap(
        model={}, task={"metric": "kl", "samples": 4, "tokens": 40}, per_site=[], per_operator={"linear": 0.1},
        noise={"kind": "uniform", "levels": [0.1], "base_level": 0.1, "seeds": [0]}, per_layer={},
        windows=[{"layers": [0, 1], "measured": 0.2, "predicted": None, "amplification": None}],
    )  # fmt: skip
    assert "## Windows at level 0.1" in report_markdown(minimal, build_report(minimal))
