"""The rankings of a sensitivity map as blocks: operator kinds, and layers by noise level."""

from __future__ import annotations

from typing import Any

from aqnfx.diagnosis.sensitivity_map import SensitivityMap, level_key
from aqnfx.numerics.metrics import classify_window
from aqnfx.reporting.blocks import Block, Cell, Column, Gap, Heading, Place, Table, say
from aqnfx.reporting.kinds import (
    BAR,
    CLASS,
    COUNT,
    EFFECT,
    EFFECT_LOSS,
    FACTOR,
    KL,
    KL_RANGE,
    NUMBER,
    PERCENT,
    PERCENT_RANGE,
    TEXT,
    Effect,
)
from aqnfx.reporting.summary import at_level, confidence_text
from aqnfx.reporting.text import half_width

MAX_LAYERS = 40  # rows of the layer table in a terminal
MAX_KL_LEVELS = 4  # levels up to which that table has room for their KL


def operator_blocks(smap: SensitivityMap, report: dict[str, Any]) -> list[Block]:
    """Return the ranking of operator kinds."""
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
            Cell(value=row["class"], words=estimated_words(row), tone=_tone(row)), _evidence(row),
            _threshold(smap, limits.get(row["key"])), _tie(row),
        )
        for row in found
    )  # fmt: skip
    caption = f"Operators, degradation {at_level(smap)} ({signs})"
    return [
        Gap(), Heading(text=f"Operators {at_level(smap)}", place=Place.PAGE),
        Table(columns=columns, rows=rows, caption=caption),
    ]  # fmt: skip


def layer_blocks(smap: SensitivityMap, report: dict[str, Any]) -> list[Block]:
    """Return what every layer loses at every level; a terminal shows the most sensitive, in their order in the model."""
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
            Cell(value=ranks.get(key, {}).get("class"), words=estimated_words(ranks.get(key, {}))),
            _threshold(smap, limits.get(key)), _tie(ranks.get(key, {})),
        )
        for key, entry in layers.items()
    )  # fmt: skip
    most = {row["key"] for row in report["layers"][:MAX_LAYERS]}
    brief = tuple(at for at, key in enumerate(layers) if key in most)
    return [
        Gap(),
        Heading(text="Layers", place=Place.PAGE),
        say(_layers_explained(smap), place=Place.PAGE),
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
    by = smap.perturbation.say("levels")
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


def _signs(row: dict[str, Any]) -> str:
    """Return the signs beside a name that the caption of a ranking explains."""
    sign = "^" if row.get("estimated") else "" if row["distinguishable"] else "*"
    found = sign + ("~" if row["tied_with_next"] else "")
    return f" {found}" if found else ""


def _tone(row: dict[str, Any]) -> str:
    return str(row["class"])


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


def estimated_words(row: dict[str, Any]) -> str:
    """Return what a page says beside a number that was predicted and not measured."""
    return " (est.)" if row.get("estimated") else ""
