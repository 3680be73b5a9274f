"""An analysis as files and tables: whole, readable by others, and safe against odd names."""

from __future__ import annotations

import dataclasses
import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import networkx as nx
import pytest
from rich.console import Console

from aqnfx.diagnosis.explain.analysis import Analysis, analyze
from aqnfx.errors import InputError
from aqnfx.graph.structure import Structure
from aqnfx.reporting.analysis import analysis_graphml, print_analysis, save_analysis
from aqnfx.reporting.analysis_svg import analysis_svg
from aqnfx.reporting.text import quantity
from tests.diagnosis.test_analysis import HEAD, NORM, cost, join, record
from tests.graph.small import Stack, traced

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def plain() -> Analysis:
    return analyze(traced(Stack(2), 3, 7, 8))


@pytest.fixture(scope="module")
def joined() -> Analysis:
    program = traced(Stack(2), 3, 7, 8)
    found = record(program, **{HEAD: cost(0.5), "blocks.1.qkv:linear:0": cost(0.01)})
    found["channels"] = {NORM: {"channels": 8, "top": [], "max_ratio": 60.0, "outlier_count": 2}}
    found["per_site"] = [entry for entry in found["per_site"] if entry["id"] != "blocks.0:add:0"]
    found["per_layer_kl"] = {"0": 1e-5, "1": 3e-5}
    found["windows"] = [
        {"layers": [0, 1], "measured": 1e-4, "predicted": 1e-4, "amplification": 2.5, "amplification_ci": [1.5, 3.0]}
    ]
    return join(program, found)


def printed(analysis: Analysis) -> str:
    stream = io.StringIO()
    print_analysis(analysis, Console(file=stream, width=160))
    return stream.getvalue()


def cells(svg: str) -> dict[str, str]:
    """Site -> colour of its cell."""
    found = {}
    for cell in ET.fromstring(svg).iter(f"{SVG}rect"):
        title = cell.find(f"{SVG}title")
        if title is not None and title.text is not None:
            found[title.text.splitlines()[0]] = cell.attrib["fill"]
    return found


def test_files(joined: Analysis, tmp_path: Path):
    paths = save_analysis(joined, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["analysis.graphml", "analysis.json", "analysis.svg"]
    record = json.loads(paths["analysis"].read_text(encoding="utf-8"))
    assert record["schema"] == "aqnfx.analysis/1"
    assert record == joined.to_record()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"):
        save_analysis(joined, tmp_path / "file")


def test_graphml_is_the_graph(joined: Analysis, tmp_path: Path):
    (tmp_path / "a.graphml").write_text(analysis_graphml(joined), encoding="utf-8")
    found = nx.read_graphml(tmp_path / "a.graphml")
    assert set(found.edges) == set(joined.structure.edges)
    assert found.nodes[HEAD]["kl"] == 0.5
    assert found.nodes[HEAD]["flops"] == joined.structure.site(HEAD).flops
    assert found.nodes[HEAD]["parameter_names"] == "head.weight;head.bias"
    assert "kl" not in found.nodes["blocks.0:add:0"]


def test_the_picture_has_a_cell_per_site_and_colours_by_cost(joined: Analysis, plain: Analysis):
    found = cells(analysis_svg(joined))
    assert set(found) == {site.id for site in joined.structure.sites}
    assert found[HEAD] == "#a50f15"  # the darkest
    assert found["blocks.0:add:0"] == "#ffffff"  # no number
    middle, light = found["blocks.1.qkv:linear:0"], found[NORM]
    assert int(middle[3:5], 16) > int(found[HEAD][3:5], 16)
    assert int(light[3:5], 16) > int(middle[3:5], 16)
    by_flops = cells(analysis_svg(plain))
    assert by_flops[NORM] == "#ffffff"
    most = max(plain.structure.sites, key=lambda site: site.flops)
    assert by_flops[most.id] == "#08306b"


def test_layers_share_rows_and_operations_columns(joined: Analysis):
    places = {}
    for cell in ET.fromstring(analysis_svg(joined)).iter(f"{SVG}rect"):
        title = cell.find(f"{SVG}title")
        if title is not None and title.text is not None:
            places[title.text.splitlines()[0]] = (int(cell.attrib["x"]), int(cell.attrib["y"]))
    assert len(set(places.values())) == len(places)
    for name in ("qkv:linear:0", "down:linear:0"):
        assert places[f"blocks.0.{name}"][0] == places[f"blocks.1.{name}"][0]
    assert places["blocks.0.qkv:linear:0"][1] == places["blocks.0:add:1"][1] < places["blocks.1.qkv:linear:0"][1]


def test_names_from_models_are_no_markup(joined: Analysis):
    odd = 'blocks.0.<script>&"[red]x\x1b[31m\n:add:0'
    sites = tuple(dataclasses.replace(s, id=odd, module=odd) if s.id == "blocks.0:add:0" else s for s in joined.structure.sites)
    structure = dataclasses.replace(joined.structure, sites=sites, edges=())
    assert isinstance(structure, Structure)
    hostile = dataclasses.replace(joined, structure=structure, model={"name": odd}, notes=[odd])
    for text in (analysis_svg(hostile), analysis_graphml(hostile), printed(hostile)):
        assert "\x1b" not in text
    for text in (analysis_svg(hostile), analysis_graphml(hostile)):
        assert "<script>" not in text
        ET.fromstring(text)
    assert "[red]x" in printed(hostile)


def test_the_table_says_what_is_critical_and_why(joined: Analysis, plain: Analysis):
    text = printed(joined)
    assert "2 sites stand out, and why" in text
    assert "no residual connection goes around it" in text
    assert "the largest 60× the median" in text
    assert "Most error enters in layer 1 (75.0 %), layer 0 (25.0 %)" in text
    assert "Together amplified: layers 0-1 (2.5×, 1.50 to 3.00)" in text
    assert "2 shared input (as blocks.0.{gate,up})" in text
    assert "stand out" not in printed(plain)


@pytest.mark.parametrize(("value", "text"), [(0, "0 "), (999, "999 "), (1234, "1.23 k"), (5e12, "5 T"), (2.5e16, "25 P")])
def test_quantities(value: float, text: str):
    assert quantity(value) == text
