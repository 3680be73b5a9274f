"""Blocks in a terminal: rich tables and lines that fit its width, with every name printed as it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table as Grid
from rich.text import Text as Line

from aqnfx.errors import printable
from aqnfx.reporting import blocks as b
from aqnfx.reporting.blocks import Block, Column, Place, Spacing, Table, cell, shown, shown_columns
from aqnfx.reporting.kinds import BAR

WIDTH_OF_BAR = 8
TONES = {
    "avalanche": "bold red", "critical": "bold red", "high": "red", "moderate": "yellow", "recommended": "yellow",
    "optional": "cyan", "robust": "green", "skip": "green", "undefined": "dim",
}  # fmt: skip
PRIORITIES = {1: "bold red", 2: "yellow", 3: "green", 4: "cyan"}
_SPACING: dict[Spacing, dict[str, Any]] = {
    Spacing.FLUSH: {"pad_edge": False, "title_justify": "left"},
    Spacing.INSET: {"title_justify": "left"},
    Spacing.TIGHT: {"padding": (0, 1, 0, 0)},
}


def show(blocks: tuple[Block, ...], console: Console) -> None:
    """Print blocks; names from outside are never read as rich markup, and their control characters are written out."""
    for block in shown(blocks, Place.TERMINAL):
        for part in _rendered(block, ascii_only=console.options.ascii_only):
            console.print(part)


def _rendered(block: Block, *, ascii_only: bool) -> Iterable[RenderableType]:
    match block:
        case b.Heading():
            return [_line(block.text, style="bold")]
        case b.Text():
            return [_line(sentence, style="bold" if block.strong else "") for sentence in block.sentences]
        case b.Lines():
            return [_line(line) for line in block.lines]
        case b.Note():
            return [_line(block.text)]
        case b.Bullets():
            return [_line(item) for item in block.items]
        case b.Definitions():
            return [_line(f"{item.name}: {item.text}.") for item in block.items]
        case b.Advices():
            return [_advice(item.priority, f"{item.what}: {item.action}", item.reason) for item in block.items]
        case b.Figure():
            return [_line(f"{block.text}: {block.file}")]
        case b.Gap():
            return [""]
        case b.Table():
            return [_grid(block, ascii_only=ascii_only)]


def _line(text: str, style: str = "") -> Line:
    return Line(printable(text), style=style)


def _advice(priority: int, head: str, reason: str) -> Line:
    line = Line(f"  {priority} ", style=PRIORITIES.get(priority, ""))
    line.append(printable(head), style="bold")
    return line.append(f" ({printable(reason)})")


def _grid(table: Table, *, ascii_only: bool) -> Grid:
    title = _line(table.caption, style="bold") if table.caption else None
    grid = Grid(title=title, box=box.SIMPLE_HEAD, **_SPACING[table.spacing])
    columns = shown_columns(table, Place.TERMINAL)
    for _, column in columns:
        label = column.label if column.short is None else column.short
        grid.add_column(_line(label), justify="right" if _right(column) else "left", **_room(column))
    rows = table.rows if table.brief is None else [table.rows[at] for at in table.brief]
    bars = {at: _scale(row[at] for row in table.rows) for at, column in columns if column.kind is BAR}
    for row in rows:
        grid.add_row(*(_cell(row[at], column, bars.get(at, 0.0), ascii_only=ascii_only) for at, column in columns))
    return grid


def _right(column: Column) -> bool:
    return column.kind.right or column.kind.ranges if column.right is None else column.right


def _room(column: Column) -> dict[str, Any]:
    if not column.wraps:
        return {"no_wrap": True}
    return {"overflow": "fold", "ratio": column.share or None, "min_width": column.least or None}


def _cell(value: Any, column: Column, most: float, *, ascii_only: bool) -> Line:
    found = cell(value)
    style = TONES.get(found.tone, "dim") if found.tone else ""
    if column.kind is BAR:
        return Line(_bar(found.value, most, ascii_only=ascii_only), style=style)
    return _line(column.kind.text(found.value, brief=True) + found.mark, style=style)


def _scale(values: Iterable[Any]) -> float:
    return max((cell(value).value or 0.0 for value in values), default=0.0)


def _bar(value: float | None, most: float, *, ascii_only: bool) -> str:
    filled = 0 if value is None or most <= 0.0 else max(0, round(WIDTH_OF_BAR * value / most))
    return ("#" if ascii_only else "█") * filled
