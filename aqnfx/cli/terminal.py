"""The terminal: consoles that show names as they are, and one progress bar for every command."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment

from aqnfx.errors import printable


class Terminal(Console):
    """A console on which names from outside are only names: no markup, no emoji, control characters written out.

    A reader that goes away raises ``BrokenPipeError``, as it does for ``print``.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of something to print."""
        for segment in super().render(renderable, options):
            plain = segment.control or segment.text == "\n" or segment.text.isprintable()
            yield segment if plain else Segment("\n".join(map(printable, segment.text.split("\n"))), segment.style)

    def on_broken_pipe(self) -> None:
        """Raise what was caught: whoever runs the command knows what it means."""
        raise


def progress_bar(console: Console, *, counts: bool = False, **options: Any) -> Progress:
    """Return a progress bar that is shown on terminals only; ``counts`` shows done/total in place of percent."""
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn() if counts else TaskProgressColumn(),
        TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(elapsed_when_finished=False),
    ]  # fmt: skip
    return Progress(*columns, console=console, disable=not console.is_terminal, **options)
