"""Draw the heat map of a diagnosis as SVG: what noise in every operator, layer and window of layers costs.

    aqnfx demo
    python examples/bench/heat_map.py aqnfx-out/demo docs/demo.svg
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from aqnfx.reporting.report import load_map

CELL, HEIGHT, LEFT, GAP = 40, 26, 110, 22
LIGHT, DARK = (255, 245, 235), (165, 15, 21)  # one hue, so that it reads without colours too


def cell(x: int, y: int, width: int, share: float | None, what: str, label: str | None = None) -> str:
    """A rectangle coloured by ``share``, a fraction of answers, with the share or a label in it."""
    if share is None:
        fill, text, ink = "#ffffff", "", "#000000"
    else:
        depth = min(max(share, 0.0), 1.0)
        fill = "#" + "".join(f"{round(a + (b - a) * depth):02x}" for a, b in zip(LIGHT, DARK, strict=True))
        text, ink = label or f"{share:.0%}", "#ffffff" if depth > 0.45 else "#000000"
    return (
        f'<rect x="{x}" y="{y}" width="{width - 2}" height="{HEIGHT - 2}" fill="{fill}"><title>{escape(what)}</title></rect>'
        f'<text x="{x + width / 2 - 1}" y="{y + 16}" text-anchor="middle" fill="{ink}">{escape(text)}</text>'
    )


def words(x: float, y: int, text: str, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'


def grid(top: int, name: str, details: dict[str, Any], levels: list[float], width: int) -> tuple[list[str], int]:
    """A row of cells for each noise level, a column for each layer or operator."""
    parts = [words(LEFT + i * width + width / 2, top - 5, key, "middle") for i, key in enumerate(details)]
    for row, level in enumerate(levels):
        y = top + row * HEIGHT
        parts.append(words(LEFT - 8, y + 16, f"{name}, {level:.0%}", "end"))
        for i, (key, detail) in enumerate(details.items()):
            lost = detail["levels"][f"{level:g}"]["degradation"]
            parts.append(cell(LEFT + i * width, y, width, lost, f"{key}, noise {level:.0%}"))
    return parts, top + len(levels) * HEIGHT + GAP + 12


def picture(record: dict[str, Any]) -> str:
    """Return the SVG of a sensitivity map's record."""
    levels, layers, operators = record["noise"]["levels"], record["per_layer_detail"], record["per_operator_detail"]
    right = LEFT + len(layers) * CELL
    parts = [words(16, 22, f"Answers that {record['model']['name']} loses by noise, in one place at a time", weight="bold")]
    made, y = grid(62, "Operator", operators, levels, (right - LEFT) // max(len(operators), 1))
    parts += made
    made, y = grid(y, "Layer", layers, levels, CELL)
    parts += made
    order, base = {key: i for i, key in enumerate(layers)}, record["noise"]["base_level"]
    ends = [0, 0]  # windows that overlap stand in two rows
    parts.append(words(LEFT - 8, y + 16 - GAP // 2, f"Window, {base:.0%}", "end"))
    for window in record["windows"]:
        first, last = (order[str(window["layers"][i])] for i in (0, -1))
        row = 0 if ends[0] <= first else 1
        ends[row] = last + 1
        at = y - GAP // 2 + row * HEIGHT
        parts.append(cell(LEFT + first * CELL, at, (last - first + 1) * CELL, window["degradation"], f"layers {first} to {last}"))
    bottom = y + 2 * HEIGHT + 4
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + 16} {bottom}" width="{right + 16}" height="{bottom}"'
        ' font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "</svg>\n"
    )


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("usage: heat_map.py MAP OUT.svg; MAP is the directory that aqnfx diagnose or demo wrote")
    Path(sys.argv[2]).write_text(picture(load_map(sys.argv[1]).to_record()), encoding="utf-8")


if __name__ == "__main__":
    main()
