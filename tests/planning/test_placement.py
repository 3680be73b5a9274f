"""What a plan says of where its modules stand: the analyser's structure, and reasons that a map's statistics support."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import aqnfx
from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.errors import ArtifactError
from aqnfx.graph.structure import structure
from aqnfx.planning.options import PlanOptions
from aqnfx.planning.placement import placements, where
from aqnfx.planning.problem import make_problem
from aqnfx.reporting.plan import explained, plan_markdown
from tests.cli.tiny import TEXT, save_model

DOWN = "model.layers.1.mlp.down_proj"
QUICK: dict[str, Any] = {"samples": 3, "eval_samples": 0, "draws": 2, "max_length": 24, "batch_size": 3, "pack": False}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def program(directory: Path) -> aqnfx.Program:
    return aqnfx.Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(str(directory)))


def made_up(program: aqnfx.Program, *modules: str, **changes: Any) -> SensitivityMap:
    entries = [site.to_record() | {"predicted": {}, "measured": {}} | changes.get(site.id, {}) for site in program.sites]
    return SensitivityMap.from_record({
        "schema": "aqnfx.sensitivity/1", "model": {"parameters": program.source["parameters"], "dtype": "float32"},
        "task": {"metric": "kl", "samples": 4, "tokens": 40},
        "noise": {"kind": "relative_gaussian", "levels": [0.1], "base_level": 0.1, "seeds": [0], "unit_error": 1.0},
        "per_site": entries, "per_operator": {}, "per_layer": {}, "windows": [],
        "channels": {
            f"{module}:linear:0": {"channels": 64, "top": [], "outliers": [], "max_ratio": 40.0, "outlier_count": 2}
            for module in modules or (DOWN,)
        },
    })  # fmt: skip


def test_places_are_those_of_the_analyser(program: aqnfx.Program) -> None:
    problem = make_problem(program, PlanOptions(avg_bits=6.0))
    found, whole = placements(program, problem), structure(program)
    assert list(found) == [part.module for part in problem.parts]
    for module, place in found.items():
        site = whole.site(f"{module}:linear:0")
        assert place["flops_share"] == pytest.approx(site.flops / whole.flops)
        assert (place["residual"], place["merges_at"], place["bound"]) == (site.residual, site.merges_at, site.bound)
    assert where(found[DOWN]) == "layer 1, mlp, writes to the stream"
    assert where(found["lm_head"]) == "no layer, head, every path crosses it"
    assert found[DOWN]["reasons"] == []
    assert any("every path from the inputs to the output crosses it" in text for text in found["lm_head"]["reasons"])


def test_a_map_gives_reasons_and_chooses_nothing(program: aqnfx.Program, directory: Path) -> None:
    problem = make_problem(program, PlanOptions(avg_bits=6.0))
    smap = made_up(program, *(part.module for part in problem.parts))  # whichever are the dearest, which the report explains
    found = placements(program, problem, smap)[DOWN]["reasons"]
    assert any("outlier channels in its own channels: 2, the largest 40×" in text for text in found)
    texts = [line * 2 for line in TEXT]
    plain = aqnfx.plan(str(directory), texts, avg_bits=5.0, **QUICK)
    told = aqnfx.plan(str(directory), texts, avg_bits=5.0, smap=smap, **QUICK)
    assert told.assignments == plain.assignments
    assert (DOWN, told.modules[DOWN]["chosen"], found) in explained(told, len(told.modules))
    assert "outlier channels" in plan_markdown(told)
    assert "outlier channels" not in plan_markdown(plain)
    assert "layer 1, mlp, writes to the stream" in plan_markdown(plain)


def test_a_map_of_another_model_is_refused_before_anything_runs(program: aqnfx.Program, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", hidden_size=64)
    with pytest.raises(ArtifactError, match="the sensitivity map is of another model"):
        aqnfx.plan(str(other), TEXT, avg_bits=5.0, smap=made_up(program), **QUICK)
