"""A sensitivity map as blocks: what was found, ranked and tabled, what to do about it, and how it was measured."""

from __future__ import annotations

from typing import Any

from aqnfx.diagnosis.sensitivity import SensitivityMap, level_key
from aqnfx.numerics.metrics import classify_window
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
)
from aqnfx.reporting.kinds import (
    BAR,
    CLASS,
    COUNT,
    EFFECT,
    EFFECT_LOSS,
    FACTOR,
    FACTOR_RANGE,
    KL,
    KL_MEASURED,
    KL_RANGE,
    NUMBER,
    PERCENT,
    PERCENT_RANGE,
    TEXT,
    Effect,
)
from aqnfx.reporting.method import cost_blocks, method_blocks, provenance_blocks
from aqnfx.reporting.prediction import prediction_blocks, weight_blocks
from aqnfx.reporting.sqnr import sqnr_blocks
from aqnfx.reporting.summary import at_level, confidence_text
from aqnfx.reporting.text import MISSING, half_width, loss_class, names, percent, percent_range, window_name

MAX_LAYERS = 40  # rows of the layer table in a terminal
MAX_KL_LEVELS = 4  # levels up to which that table has room for their KL


def map_blocks(smap: SensitivityMap, report: dict[str, Any]) -> tuple[Block, ...]:
    """Return the blocks of a map; ``report`` is the record that :func:`aqnfx.reporting.report.build_report` makes of it."""
    return (
        *_summary(report),
        *_operators(smap, report),
        *_layers(smap, report),
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
        Text(sentences=tuple(report["summary"])),
        *(Note(text=note) for note in report["notes"]),
    ]


def _operators(smap: SensitivityMap, report: dict[str, Any]) -> list[Block]:
    found = report["operators"]
    if not found:
        return []
    limits = report["critical_threshold"].get("operators", {})
    predicted = ", ^ predicted" if smap.method != "measure" else ""
    signs = f"~ tied with the next, * not shown to differ from 0{predicted}"
    columns = (
        Column(label="#", kind=COUNT, place=Place.PAGE),
        Column(label="Operator", kind=TEXT, wraps=True, share=1, least=12),
        Column(label="", kind=BAR, place=Place.TERMINAL),
        Column(label="Degradation", kind=PERCENT, short="Lost"),
        Column(label="Interval", kind=PERCENT_RANGE),
        Column(label="KL (nats/token)", kind=KL, short="KL"),
        Column(label="Interval", kind=KL_RANGE, place=Place.PAGE),
        Column(label="Score", kind=FACTOR),
        Column(label="Class", kind=CLASS),
        Column(label="Distinguishable from 0", kind=TEXT, place=Place.PAGE),
        Column(label="Level for 10 %", kind=NUMBER, place=Place.PAGE),
        Column(label="Against the next", kind=TEXT, place=Place.PAGE),
    )
    rows = tuple(
        (
            row["rank"], Cell(value=row["key"], mark=_signs(row)), Cell(value=row["degradation"], tone=_tone(row)),
            row["degradation"], row["degradation_ci"], row["kl"], row["kl_ci"], row["score"],
            Cell(value=row["class"], words=_estimated(row), tone=_tone(row)), _evidence(row),
            _threshold(smap, limits.get(row["key"])), _tie(row),
        )
        for row in found
    )  # fmt: skip
    caption = f"Operators, degradation {at_level(smap)} ({signs})"
    return [
        Gap(), Heading(text=f"Operators {at_level(smap)}", place=Place.PAGE),
        Table(columns=columns, rows=rows, caption=caption),
    ]  # fmt: skip


def _layers(smap: SensitivityMap, report: dict[str, Any]) -> list[Block]:
    layers = report["layer_levels"]
    if not layers:
        return []
    ranks = {row["key"]: row for row in report["layers"]}
    limits = report["critical_threshold"].get("layers", {})
    with_kl = len(smap.levels) <= MAX_KL_LEVELS
    keys = [level_key(level) for level in smap.levels]
    columns = (
        Column(label="Layer", kind=TEXT, wraps=True),
        *(
            Column(label=f"Level {key}", kind=EFFECT if with_kl else EFFECT_LOSS, short=f"{level:g}")
            for key, level in zip(keys, smap.levels, strict=True)
        ),
        Column(label="Rank", kind=COUNT, place=Place.PAGE),
        Column(label="Class", kind=CLASS, place=Place.PAGE),
        Column(label="Level for 10 %", kind=NUMBER, place=Place.PAGE),
        Column(label="Against the next", kind=TEXT, place=Place.PAGE),
    )
    rows = tuple(
        (
            key, *(_effect(entry["levels"].get(level)) for level in keys), ranks.get(key, {}).get("rank"),
            Cell(value=ranks.get(key, {}).get("class"), words=_estimated(ranks.get(key, {}))),
            _threshold(smap, limits.get(key)), _tie(ranks.get(key, {})),
        )
        for key, entry in layers.items()
    )  # fmt: skip
    most = {row["key"] for row in report["layers"][:MAX_LAYERS]}
    brief = tuple(at for at, key in enumerate(layers) if key in most)
    return [
        Gap(),
        Heading(text="Layers", place=Place.PAGE),
        Text(sentences=(_layers_explained(smap),), place=Place.PAGE),
        Table(columns=columns, rows=rows, caption=_layers_caption(smap, with_kl, len(rows) - len(brief)), brief=brief),
    ]


def _layers_explained(smap: SensitivityMap) -> str:
    estimated = "; (est.) predicted, not measured" if smap.method != "measure" else ""
    return (
        f"Degradation ± half the {confidence_text(smap)} interval, then KL in nats per token; rank and class {at_level(smap)}"
        f"; * not distinguishable from no effect{estimated}."
    )


def _layers_caption(smap: SensitivityMap, with_kl: bool, left_out: int) -> str:
    values = "degradation, KL" if with_kl else "degradation"
    estimated = ", ^ predicted, not measured" if smap.method != "measure" else ""
    by = "by noise level" if smap.format is None else f"by factor on the error of {smap.format}"
    more = f"; {left_out} less sensitive layers are in the report" if left_out else ""
    return f"Layers {by}: {values} (* not distinguishable from 0{estimated}){more}"


def _effect(values: dict[str, Any] | None) -> Cell:
    if not values or values["degradation"] is None:
        return Cell(value=Effect(degradation=None, half=None, kl=None), tone="undefined")
    effect = Effect(
        degradation=values["degradation"], half=half_width(values["degradation_ci"]), kl=values["kl"],
        estimated=bool(values.get("estimated")), shown=values["distinguishable"],
    )  # fmt: skip
    return Cell(value=effect, tone=classify_window(values["degradation"]))


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
        Text(sentences=(said,), place=Place.PAGE),
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
        Cell(value=window.get("degradation"), mark="^" if estimated else "", words=_estimated(window)),
        window.get("degradation_ci"), kind, MISSING if measured is None and not estimated else measured,
        None if estimated else window.get("ci"), window["predicted"],
        Cell(value=window["amplification"], mark="+" if more else ""), window.get("amplification_ci"),
        "yes" if more else "no", _avalanche(window), kind,
    )  # fmt: skip


def _avalanche(window: dict[str, Any]) -> str:
    p = window.get("excess_p_holm")
    return ("yes" if window.get("avalanche") else "no") + ("" if p is None else f" (p {p:.2g})")


def _signs(row: dict[str, Any]) -> str:
    """Return the signs beside a name that the caption of a ranking explains."""
    sign = "^" if row.get("estimated") else "" if row["distinguishable"] else "*"
    found = sign + ("~" if row["tied_with_next"] else "")
    return f" {found}" if found else ""


def _tone(row: dict[str, Any]) -> str:
    return str(row["class"])


def _estimated(row: dict[str, Any]) -> str:
    return " (est.)" if row.get("estimated") else ""


def _evidence(row: dict[str, Any]) -> str:
    if row.get("estimated"):
        return "predicted, not measured"
    return "yes" if row["distinguishable"] else "no"


def _tie(row: dict[str, Any]) -> str:
    if "difference_to_next" not in row:
        return ""
    if not row["tied_with_next"]:
        return "distinguishable"
    return "tied" if row["difference_to_next"]["kl_tied"] else "tied (KL differs)"


def _threshold(smap: SensitivityMap, limit: float | None) -> float | str:
    return f"> {max(smap.levels):g}" if limit is None else limit


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
