"""From a sensitivity map to its report: one record (``aqnfx.diagnosis/1``), the files that hold it, and the terminal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from aqnfx.artifacts import Schema, check_output_dir, json_text, jsonable, read_json, write_all
from aqnfx.diagnosis.advice.recommend import recommend
from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.reporting.prediction import prediction_record
from aqnfx.reporting.render.markdown import markdown
from aqnfx.reporting.render.terminal import show
from aqnfx.reporting.sensitivity import map_blocks
from aqnfx.reporting.summary import summary_sentences, title

FILES = {"map": "sensitivity_map.json", "report": "report.json", "markdown": "report.md"}
COST_KEYS = (
    "seconds", "runs", "tokens_per_second", "shares", "peak_memory_mib", "compile", "predict", "activations", "metric",
    "confirm", "total_seconds",
)  # fmt: skip


def build_report(smap: SensitivityMap) -> dict[str, Any]:
    """Return the report of a map as plain JSON values, schema ``aqnfx.diagnosis/1``.

    It says what the Markdown says, in the same order: summary sentences, rankings, layer by level table, windows,
    recommendations, method, provenance and cost. Degradations are fractions, KL is in nats per token.
    """
    layers = {
        key: {"levels": {level: _cell(values) for level, values in entry["levels"].items()}}
        for key, entry in smap.per_layer_detail.items()
    }
    record: dict[str, Any] = {
        "schema": Schema.DIAGNOSIS,
        "title": title(smap),
        "partial": smap.partial,
        "summary": summary_sentences(smap),
        "operators": smap.ranking.get("operators", []),
        "layers": smap.ranking.get("layers", []),
        "layer_levels": layers,
        "windows": [{k: v for k, v in window.items() if k != "levels"} for window in smap.windows],
        "critical_ops": smap.critical_ops,
        "critical_layers": smap.critical_layers,
        "avalanche_points": smap.avalanche_points,
        "critical_threshold": smap.critical_threshold,
        "prediction": prediction_record(smap),
        "sqnr": smap.sqnr,
        "weights": smap.weights,
        "recommendations": [item.to_record() for item in recommend(smap)],
        "method": {"task": smap.task, "noise": smap.noise, "statistics": smap.statistics, "baseline": smap.baseline},
        "notes": smap.notes,
        "model": smap.model,
        "provenance": {key: value for key, value in smap.provenance.items() if key not in COST_KEYS},
        "cost": {key: smap.provenance[key] for key in COST_KEYS if key in smap.provenance},
    }
    cleaned: dict[str, Any] = jsonable(record)
    return cleaned


def report_markdown(smap: SensitivityMap, report: dict[str, Any]) -> str:
    """Return the report as GitHub Markdown, ending in a new line; ``report`` is what :func:`build_report` makes of ``smap``."""
    return markdown(map_blocks(smap, report))


def print_summary(smap: SensitivityMap, console: Console) -> None:
    """Print summary, operator ranking, layer by level table, windows and recommendations; fits 80 columns."""
    show(map_blocks(smap, build_report(smap)), console)


def save_report(smap: SensitivityMap, directory: str | os.PathLike[str]) -> dict[str, Path]:
    """Write ``sensitivity_map.json``, ``report.json`` and ``report.md`` into a directory and return their paths.

    The directory is created where it is missing; all files are replaced, or none. Raises :class:`InputError` when the
    directory is not writable.
    """
    place = check_output_dir(directory)
    report, found = build_report(smap), {name: place / file for name, file in FILES.items()}
    write_all(
        {
            found["map"]: json_text(found["map"], smap.to_record()),
            found["report"]: json_text(found["report"], report),
            found["markdown"]: report_markdown(smap, report),
        }
    )
    return found


def load_map(path: str | os.PathLike[str]) -> SensitivityMap:
    """Read a saved map, from its file or from the directory that :func:`save_report` wrote.

    Raises :class:`InputError` when there is no such file, :class:`ArtifactError` when it is not a sensitivity map.
    """
    place = Path(path)
    place = place / FILES["map"] if place.is_dir() else place
    return SensitivityMap.from_record(read_json(place, schema=Schema.SENSITIVITY))


def _cell(values: dict[str, Any]) -> dict[str, Any]:
    kept = ("degradation", "degradation_ci", "kl", "ci", "class", "distinguishable", "estimated")
    return {name: values[name] for name in kept if name in values}
