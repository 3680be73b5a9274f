"""A sensitivity map as blocks: what was found, ranked and tabled, what to do about it, and how it was measured."""

from __future__ import annotations

from typing import Any

from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.reporting.blocks import (
    Advice,
    Advices,
    Block,
    Cell,
    Column,
    Gap,
    Heading,
    Note,
    Place,
    Table,
    Text,
    on_page,
    say,
)
from aqnfx.reporting.kinds import CLASS, FACTOR, FACTOR_RANGE, KL, KL_MEASURED, KL_RANGE, PERCENT, PERCENT_RANGE, TEXT
from aqnfx.reporting.method import cost_blocks, method_blocks, provenance_blocks
from aqnfx.reporting.prediction import prediction_blocks, weight_blocks
from aqnfx.reporting.rankings import estimated_words, layer_blocks, operator_blocks
from aqnfx.reporting.sqnr import sqnr_blocks
from aqnfx.reporting.summary import at_level
from aqnfx.reporting.text import MISSING, loss_class, names, percent, percent_range, window_name


def map_blocks(smap: SensitivityMap, report: dict[str, Any]) -> tuple[Block, ...]:
    """Return the blocks of a map; ``report`` is the record that :func:`aqnfx.reporting.report.build_report` makes of it."""
    return (
        *_summary(report),
        *operator_blocks(smap, report),
        *layer_blocks(smap, report),
        *_windows(smap, report),
        *prediction_blocks(report, at_level(smap)),
        *sqnr_blocks(smap),
        *weight_blocks(report),
        *_recommendations(report),
        *method_blocks(smap),
        *provenance_blocks({"model": report["model"]} | report["provenance"]),
        *cost_blocks(report["cost"]),
    )


def _summary(report: dict[str, Any]) -> list[Block]:
    partial: tuple[Block, ...] = on_page(Text(sentences=("Partial run.",), strong=True)) if report["partial"] else ()
    return [
        Heading(text=report["title"], level=1, place=Place.PAGE),
        Heading(text=f"{report['title']}{' (partial run)' if partial else ''}", level=1, place=Place.TERMINAL),
        Heading(text="Summary", place=Place.PAGE),
        *partial,
        say(*report["summary"]),
        *(Note(text=note) for note in report["notes"]),
    ]


def _windows(smap: SensitivityMap, report: dict[str, Any]) -> list[Block]:
    if not report["windows"]:
        return []
    predicted = smap.method != "measure"
    whole = "its prediction, ^ not measured" if predicted else "the sum of its layers"
    columns = (
        Column(label="Layers", kind=TEXT, wraps=True, share=1),
        Column(label="Degradation", kind=PERCENT, short="Lost"),
        Column(label="Interval", kind=PERCENT_RANGE),
        Column(label="Class", kind=CLASS, place=Place.PAGE),
        Column(label="KL (nats/token)", kind=KL_MEASURED, short="KL"),
        Column(label="Interval", kind=KL_RANGE, place=Place.PAGE),
        Column(label="Predicted KL" if predicted else "Sum of single layers", kind=KL, place=Place.PAGE),
        Column(label="Amplification", kind=FACTOR, short="x pred." if predicted else "x sum"),
        Column(label="Interval", kind=FACTOR_RANGE, place=Place.PAGE),
        Column(label="Superadditive", kind=TEXT, place=Place.PAGE),
        Column(label="Avalanche point", kind=TEXT, place=Place.PAGE),
        Column(label="Class", kind=CLASS, place=Place.TERMINAL),
    )
    points = [window_name(layers) for layers in report["avalanche_points"]]
    said = f"Avalanche points: {names(points, limit=20)}." if points else "No avalanche points."
    return [
        Gap(),
        Heading(text=f"Windows {at_level(smap)}", place=Place.PAGE),
        say(said, place=Place.PAGE),
        Table(
            columns=columns,
            rows=tuple(_window(window) for window in report["windows"]),
            caption=f"Windows, degradation {at_level(smap)} (! avalanche point, + more than {whole})",
        ),
    ]


def _window(window: dict[str, Any]) -> tuple[Any, ...]:
    estimated, measured = bool(window.get("estimated")), window["measured"]
    kind = Cell(value=loss_class(window), tone=str(window.get("class", MISSING)))
    more = bool(window.get("superadditive"))
    return (
        Cell(value=window_name(window["layers"]), mark=" !" if window.get("avalanche") else ""),
        Cell(value=window.get("degradation"), mark="^" if estimated else "", words=estimated_words(window)),
        window.get("degradation_ci"), kind, MISSING if measured is None and not estimated else measured,
        None if estimated else window.get("ci"), window["predicted"],
        Cell(value=window["amplification"], mark="+" if more else ""), window.get("amplification_ci"),
        "yes" if more else "no", _avalanche(window), kind,
    )  # fmt: skip


def _avalanche(window: dict[str, Any]) -> str:
    p = window.get("excess_p_holm")
    return ("yes" if window.get("avalanche") else "no") + ("" if p is None else f" (p {p:.2g})")


def _recommendations(report: dict[str, Any]) -> list[Block]:
    items = tuple(
        Advice(
            priority=item["priority"], what=item["what"], action=item["action"], reason=item["reason"],
            numbers="" if item["degradation"] is None
            else f"; degradation {percent(item['degradation'])} ({percent_range(item['ci'])})",
        )
        for item in report["recommendations"]
    )  # fmt: skip
    return [Gap(), Heading(text="Recommendations"), Advices(items=items)]
