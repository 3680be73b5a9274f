"""Blocks as GitHub Markdown, in which names from outside cannot add cells, markup or HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from aqnfx.reporting import blocks as b
from aqnfx.reporting.blocks import Block, Place, Table, cell, shown, shown_columns

_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def markdown(blocks: tuple[Block, ...]) -> str:
    """Return blocks as GitHub Markdown, ending in a new line; blocks stand apart by an empty line."""
    parts = [_rendered(block) for block in shown(blocks, Place.PAGE)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def escape(text: Any) -> str:
    """Return text for GitHub Markdown, tables included, that shows as it is: no markup, HTML, math or new line."""
    line = _one_line(str(text))
    line = re.sub(r"[\\`|*\[\]~$]", r"\\\g<0>", line)
    # An underscore between letters or digits, as in self_attn, is no emphasis on GitHub and stays readable.
    line = re.sub(r"(?<![^\W_])_+|_+(?![^\W_])", lambda found: r"\_" * len(found[0]), line)
    return "".join(_HTML.get(character, character) for character in line)


def _rendered(block: Block) -> list[str]:
    match block:
        case b.Heading():
            return [f"{'#' * block.level} {escape(block.text)}"]
        case b.Text():
            text = " ".join(escape(sentence) for sentence in block.sentences)
            return [f"**{text}**" if block.strong else text]
        case b.Lines():
            return [f"{escape(line)}  " for line in block.lines]
        case b.Note():
            return [f"> {escape(block.text)}"]
        case b.Bullets():
            return [f"- {escape(item)}" for item in block.items]
        case b.Definitions():
            return [f"- {_code(item.name)} in {escape(item.under)}: {escape(item.text)}." for item in block.items]
        case b.Advices():
            return [_advice(number, item) for number, item in enumerate(block.items, start=1)]
        case b.Figure():
            return [f"![{escape(block.text)}]({quote(block.file)})"]
        case b.Gap():
            return []
        case b.Table():
            return _table(block)


def _advice(number: int, item: Any) -> str:
    reason = f"{item.reason[:1].upper()}{item.reason[1:]}{item.numbers}."
    return f"{number}. **Priority {item.priority}**, {escape(item.action)}: {escape(item.what)}. {escape(reason)}"


def _table(table: Table) -> list[str]:
    columns = shown_columns(table, Place.PAGE)
    rights = [column.kind.right if column.right is None else column.right for _, column in columns]
    lines = [_row(escape(column.label) for _, column in columns), _row("---:" if right else "---" for right in rights)]
    for row in table.rows:
        cells = [(cell(row[at]), column) for at, column in columns]
        lines.append(_row(escape(column.kind.text(found.value) + found.words) for found, column in cells))
    return lines


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _code(text: str) -> str:
    """Return text as a code span, whose fence is longer than any run of backticks in it: escapes do not work inside."""
    line = _one_line(text)
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    fence = "`" * (longest + 1)
    return f"{fence}{space}{line}{space}{fence}"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return "".join(character for character in line if character.isprintable())
