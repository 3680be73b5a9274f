"""The summary of a sensitivity map in the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aqnfx.diagnosis.recommend import Recommendation, recommend
from aqnfx.diagnosis.sensitivity import SensitivityMap, level_key
from aqnfx.numerics.metrics import classify_window
from aqnfx.reporting.summary import at_level, summary_sentences, title
from aqnfx.reporting.text import factor, loss_class, nats, percent, percent_range, window_name

MAX_LAYERS = 40
BAR = 8
HEAT = {"avalanche": "bold red", "high": "red", "moderate": "yellow", "robust": "green", "undefined": "dim"}
CLASS = {"critical": "bold red", "moderate": "yellow", "robust": "green"}
PRIORITY = {1: "bold red", 2: "yellow", 3: "green", 4: "cyan"}


def print_summary(smap: SensitivityMap, console: Console) -> None:
    """Print summary, operator ranking, layer by level table, windows and recommendations; fits 80 columns.

    Names from outside are printed as they are, never read as rich markup.
    """
    console.print(Text(f"{title(smap)}{' (partial run)' if smap.partial else ''}", style="bold"))
    for line in [*summary_sentences(smap), *smap.notes]:
        console.print(Text(line))
    for part in (_ranking(smap, "operators", "Operator", console), _layers(smap), _windows(smap)):
        if part is not None:
            console.print()
            console.print(part)
    console.print()
    console.print(Text("Recommendations", style="bold"))
    for item in recommend(smap):
        console.print(_recommendation(item))


def _ranking(smap: SensitivityMap, name: str, heading: str, console: Console) -> Table | None:
    rows = smap.ranking.get(name, [])
    if not rows:
        return None
    extra = ", ^ predicted" if smap.method != "measure" else ""
    grid = _table(f"{heading}s, degradation {at_level(smap)} (~ tied with the next, * not shown to differ from 0{extra})")
    grid.add_column(heading, overflow="fold", ratio=1, min_width=12)
    grid.add_column("", no_wrap=True)
    for name in ("Lost", "Interval", "KL", "Score"):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column("Class", no_wrap=True)
    most = max((row["degradation"] or 0.0 for row in rows), default=0.0)
    for row in rows:
        mark = _mark(row) + ("~" if row["tied_with_next"] else "")
        style = CLASS.get(row["class"], "dim")
        grid.add_row(
            Text(f"{row['key']}{' ' if mark else ''}{mark}"),
            Text(_bar(row["degradation"], most, ascii_only=console.options.ascii_only), style=style),
            percent(row["degradation"]),
            percent_range(row["degradation_ci"]),
            nats(row["kl"]),
            factor(row["score"]),
            Text(row["class"], style=style),
        )
    return grid


def _mark(values: dict[str, Any]) -> str:
    if values.get("estimated"):
        return "^"
    return "" if values["distinguishable"] else "*"


def _bar(value: float | None, most: float, *, ascii_only: bool) -> str:
    filled = 0 if value is None or most <= 0.0 else max(0, round(BAR * value / most))
    return ("#" if ascii_only else "█") * filled


def _layers(smap: SensitivityMap) -> Table | None:
    if not smap.per_layer_detail:
        return None
    order = [row["key"] for row in smap.ranking.get("layers", [])][:MAX_LAYERS]
    shown = [key for key in smap.per_layer_detail if key in set(order)]
    left_out = len(smap.per_layer_detail) - len(shown)
    more = f"; {left_out} less sensitive layers are in the report" if left_out else ""
    with_kl = len(smap.levels) <= 4
    values = "degradation, KL" if with_kl else "degradation"
    estimated = ", ^ predicted, not measured" if smap.method != "measure" else ""
    by = "by noise level" if smap.format is None else f"by factor on the error of {smap.format}"
    grid = _table(f"Layers {by}: {values} (* not distinguishable from 0{estimated}){more}")
    grid.add_column("Layer", overflow="fold")
    for level in smap.levels:
        grid.add_column(f"{level:g}", justify="right", no_wrap=True)
    for key in shown:
        cells = smap.per_layer_detail[key]["levels"]
        grid.add_row(Text(key), *(_heat(cells.get(level_key(level)), with_kl=with_kl) for level in smap.levels))
    return grid


def _heat(values: dict[str, Any] | None, *, with_kl: bool) -> Text:
    if not values or values["degradation"] is None:
        return Text("n/a", style="dim")
    text = percent(values["degradation"]) + _mark(values)
    if with_kl:
        text += f" {nats(values['kl']):>8}"
    return Text(text, style=HEAT[classify_window(values["degradation"])])


def _windows(smap: SensitivityMap) -> Table | None:
    if not smap.windows:
        return None
    predicted = smap.method != "measure"
    whole = "its prediction, ^ not measured" if predicted else "the sum of its layers"
    grid = _table(f"Windows, degradation {at_level(smap)} (! avalanche point, + more than {whole})")
    grid.add_column("Layers", overflow="fold", ratio=1)
    for heading in ("Lost", "Interval", "KL", "x pred." if predicted else "x sum"):
        grid.add_column(heading, justify="right", no_wrap=True)
    grid.add_column("Class", no_wrap=True)
    for window in smap.windows:
        grid.add_row(
            Text(window_name(window["layers"]) + (" !" if window.get("avalanche") else "")),
            percent(window.get("degradation")) + ("^" if window.get("estimated") else ""),
            percent_range(window.get("degradation_ci")),
            nats(window["measured"]),
            factor(window["amplification"]) + ("+" if window.get("superadditive") else ""),
            Text(loss_class(window), style=HEAT.get(str(window.get("class")), "dim")),
        )
    return grid


def _recommendation(item: Recommendation) -> Text:
    line = Text(f"  {item.priority} ", style=PRIORITY[item.priority])
    line.append(f"{item.what}: {item.action}", style="bold")
    return line.append(f" ({item.reason})")


def _table(title: str) -> Table:
    return Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
