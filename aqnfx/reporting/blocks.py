"""What a report consists of: a record becomes a tuple of these blocks once, and each renderer knows how a block looks.

Everything here is plain text and numbers. No block holds markup: whoever renders escapes for its own medium.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from aqnfx.reporting.kinds import Kind


class Place(StrEnum):
    """Where a block or a column is shown: everywhere, only where room is short, or only on a page."""

    EVERYWHERE = "everywhere"
    TERMINAL = "terminal"
    PAGE = "page"


class Spacing(StrEnum):
    """How the columns of a table stand in a terminal: flush with the text, inset by a space, or as close as they can."""

    FLUSH = "flush"
    INSET = "inset"
    TIGHT = "tight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Something that is shown everywhere, or in some places only."""

    place: Place = Place.EVERYWHERE


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading(Placed):
    """A heading of level 1 (of the whole), 2 or 3."""

    text: str
    level: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Text(Placed):
    """Sentences: one paragraph on a page, a line each in a terminal."""

    sentences: tuple[str, ...]
    strong: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines(Placed):
    """Lines that stay lines on a page too."""

    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Note(Placed):
    """A remark on the whole, set apart on a page."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bullets(Placed):
    """Remarks that belong together: a list on a page, a line each in a terminal."""

    items: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """What is said of one name; ``under`` is the choice or condition under which it is said, for pages."""

    name: str
    under: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Definitions(Placed):
    """Names, and what is said of each."""

    items: tuple[Definition, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One thing to do: its priority (1 is first), what it is about, what to do, why, and the numbers behind it for pages."""

    priority: int
    what: str
    action: str
    reason: str
    numbers: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advices(Placed):
    """Things to do, in order."""

    items: tuple[Advice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure(Placed):
    """A picture in a file that lies beside the page; ``file`` is its name."""

    file: str
    text: str
    place: Place = Place.PAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap(Placed):
    """An empty line in a terminal; pages set blocks apart by themselves."""

    place: Place = Place.TERMINAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Column(Placed):
    """A column of a table: what stands above it and the kind of its values.

    ``short``: the label where room is short, ``None`` for the same one. ``wraps``: long values are folded there; then
    ``share`` is its part of the room that is left, 0 for what it needs, and ``least`` a width that it keeps.
    ``right``: where its values stand if not on the side of their kind.
    """

    label: str
    kind: Kind
    short: str | None = None
    wraps: bool = False
    share: int = 0
    least: int = 0
    right: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A value with what is said beside it: ``mark`` is a sign that the caption explains, ``words`` say it on a page.

    ``tone`` is the class that colours it, such as ``critical``; ``""`` for no colour.
    """

    value: Any
    mark: str = ""
    words: str = ""
    tone: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table(Placed):
    """Rows of values under columns; a value may stand in a :class:`Cell`. Raises ``ValueError`` for a ragged row.

    ``caption`` stands above it in a terminal, a heading does on a page. ``brief`` are the rows that a terminal shows, all
    where it is ``None``.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    caption: str = ""
    spacing: Spacing = Spacing.FLUSH
    brief: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table: a row of {len(row)} cells under {len(self.columns)} columns")


Block = Heading | Text | Lines | Note | Bullets | Definitions | Advices | Figure | Gap | Table


def shown(blocks: tuple[Block, ...], place: Place) -> list[Block]:
    """Return the blocks that are shown in a place."""
    return [block for block in blocks if block.place in (Place.EVERYWHERE, place)]


def shown_columns(table: Table, place: Place) -> list[tuple[int, Column]]:
    """Return the columns of a table that are shown in a place, with their positions in its rows."""
    return [(at, column) for at, column in enumerate(table.columns) if column.place in (Place.EVERYWHERE, place)]


def cell(value: Any) -> Cell:
    """Return a value of a row as a :class:`Cell`."""
    return value if isinstance(value, Cell) else Cell(value=value)


def of_kinds(*named: tuple[str, Kind]) -> tuple[Column, ...]:
    """Return columns of which only the label and the kind of the values are told."""
    return tuple(Column(label=label, kind=kind) for label, kind in named)


def say(*sentences: str, place: Place = Place.EVERYWHERE) -> Text:
    """Return sentences as a block."""
    return Text(sentences=sentences, place=place)


def on_page(*blocks: Any) -> tuple[Block, ...]:
    """Return blocks as those that only a page shows."""
    return tuple(replace(block, place=Place.PAGE) for block in blocks)
