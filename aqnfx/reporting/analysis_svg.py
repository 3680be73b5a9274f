"""The picture of an analysis: layers × operations, coloured by sensitivity, or by FLOPs where there is no map."""

from __future__ import annotations

import math
from collections.abc import Mapping
from xml.sax.saxutils import escape

from aqnfx.diagnosis.explain.analysis import Analysis
from aqnfx.errors import printable
from aqnfx.graph.structure import SiteStructure

_CELL_W, _CELL_H, _LEFT, _TOP, _MARGIN, _CHAR = 26, 18, 150, 40, 16, 6.6
_LOW, _HIGH = (255, 245, 235), (165, 15, 21)  # light to dark of one hue, so that it reads without colours too
_LOW_FLOPS, _HIGH_FLOPS = (240, 245, 252), (8, 48, 107)
_UNKNOWN = "#ffffff"
_DECADES = 4  # costs spread over many orders; what is smaller than the largest by more than this is as light as it gets


def analysis_svg(analysis: Analysis) -> str:
    """Return the picture as SVG: a row per layer, a column per operation of a block, then what lies outside of all layers.

    Cells are coloured by the logarithm of their cost (KL, the operands of an operation with it); without a map of their FLOPs.
    White with a dashed border: the map has no number. Pointing at a cell shows its site and numbers.
    """
    known = bool(analysis.map)
    flops = {site.id: float(site.flops) for site in analysis.structure.sites if site.flops}
    values = analysis.costs() if known else flops
    shown = [site for site in analysis.structure.sites if site.region != "position"]
    inside = [site for site in shown if site.layer is not None]
    outside = [site for site in shown if site.layer is None]
    rows = list(dict.fromkeys(site.layer for site in inside))
    columns = _columns(inside)
    largest = max(values.values(), default=0.0)
    label_height = int(max((len(c) for c in columns), default=0) * _CHAR * 0.75) + 10
    top = _TOP + label_height
    parts = []
    for index, column in enumerate(columns):
        x, y = _LEFT + index * _CELL_W + _CELL_W // 2, top - 6
        parts.append(f'<text x="{x}" y="{y}" transform="rotate(-50 {x} {y})">{_text(column)}</text>')
    for row, layer in enumerate(rows):
        y = top + row * _CELL_H
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end">{_text(str(layer))}</text>')
    for site in inside:
        x, y = _LEFT + columns[_column(site)] * _CELL_W, top + rows.index(site.layer) * _CELL_H
        parts.append(_cell(x, y, site, values, largest, known))
    bottom = top + len(rows) * _CELL_H + _MARGIN
    for index, site in enumerate(outside):
        y = bottom + index * _CELL_H
        parts.append(_cell(_LEFT, y, site, values, largest, known))
        parts.append(f'<text x="{_LEFT + _CELL_W + 8}" y="{y + 13}">{_text(site.id)}</text>')
    end = bottom + len(outside) * _CELL_H + _MARGIN
    parts.append(_legend(_LEFT, end, largest, known))
    longest = max((len(site.id) for site in outside), default=0)
    width = max(_LEFT + len(columns) * _CELL_W + label_height, _LEFT + _CELL_W + int(longest * _CHAR), 520) + _MARGIN
    what = "cost in KL" if known else "FLOPs"
    title = _text(f"{analysis.model.get('name', 'model')}: layers × operations by {what}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{end + 60}" viewBox="0 0 {width} {end + 60}"'
        f' font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="#ffffff"/>'
        f'<text x="{_MARGIN}" y="22" font-size="15" font-weight="bold">{title}</text>' + "\n".join(parts) + "</svg>\n"
    )


def _column(site: SiteStructure) -> str:
    """What an operation is called in its block: the module below the block, and what tells it from the others there."""
    block = ""
    parts = site.module.split(".")
    index = (site.layer or "").rpartition(":")[2]
    if index in parts:
        block = ".".join(parts[parts.index(index) + 1 :])
    return f"{block or '(block)'} {site.op}" + (f" {ordinal}" if (ordinal := site.id.split(":")[-1]) != "0" else "")


def _columns(sites: list[SiteStructure]) -> dict[str, int]:
    """Number the columns in the order of their operations; one that only later layers have stands after what precedes it."""
    found: list[str] = []
    layer, at = None, 0
    for site in sites:
        name = _column(site)
        if site.layer != layer:
            layer, at = site.layer, 0
        if name not in found:
            found.insert(at, name)
        at = found.index(name) + 1
    return {name: index for index, name in enumerate(found)}


def _cell(x: int, y: int, site: SiteStructure, values: Mapping[str, float], largest: float, known: bool) -> str:
    value = values.get(site.id)
    fill = _UNKNOWN if value is None else _colour(value, largest, known)
    border = ' stroke="#999999" stroke-dasharray="2 2"' if value is None else ' stroke="#ffffff"'
    lines = [site.id, f"{site.flops:,} FLOP, {site.parameters:,} parameters, {site.bound}-bound, {site.residual}"]
    lines += [f"KL {value:.3g} nats per token" if value is not None else "no cost in the map"] if known else []
    return (
        f'<rect x="{x}" y="{y}" width="{_CELL_W - 1}" height="{_CELL_H - 1}" fill="{fill}"{border}>'
        f"<title>{_text(chr(10).join(lines))}</title></rect>"
    )


def _colour(value: float, largest: float, known: bool) -> str:
    low, high = (_LOW, _HIGH) if known else (_LOW_FLOPS, _HIGH_FLOPS)
    share = 0.0
    if value > 0 and largest > 0:
        share = max(0.0, 1 + math.log10(value / largest) / _DECADES)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))


def _legend(x: int, y: int, largest: float, known: bool) -> str:
    steps = [largest * 10.0**-decade for decade in range(_DECADES, -1, -1)]
    cells = "".join(
        f'<rect x="{x + i * 70}" y="{y}" width="69" height="12" fill="{_colour(value, largest, known)}"/>'
        f'<text x="{x + i * 70}" y="{y + 26}">{value:.1e}</text>'
        for i, value in enumerate(steps)
    )
    unit = "KL, nats per token" if known else "FLOPs"
    return f'{cells}<text x="{x}" y="{y + 44}">{unit}; dashed: no number</text>' if largest > 0 else ""


def _text(text: str) -> str:
    """Text for SVG: control characters written out, markup escaped; line ends stay."""
    return escape("\n".join(printable(line) for line in text.split("\n")), {'"': "&quot;"})
