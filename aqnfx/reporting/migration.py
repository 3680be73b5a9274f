"""A migration plan as blocks, in the terminal and as files: JSON, and Markdown beside it (``aqnfx.migration/1``)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from aqnfx.artifacts import Schema, json_text, jsonable, write_all
from aqnfx.diagnosis.advice.divergences import SIGNIFICANT
from aqnfx.diagnosis.advice.migration import ACTIONS, MigrationStep
from aqnfx.diagnosis.advice.recommend import nothing_distinguishable
from aqnfx.diagnosis.explain.map_of_model import map_facts
from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.reporting.blocks import Block, Column, Heading, Lines, Place, Spacing, Table, on_page, say
from aqnfx.reporting.kinds import TEXT
from aqnfx.reporting.method import provenance_blocks
from aqnfx.reporting.render.markdown import markdown
from aqnfx.reporting.render.terminal import show
from aqnfx.reporting.text import factor, factor_range, nats, percent, percent_range


def migration_record(
    steps: Sequence[MigrationStep], smap: SensitivityMap, *, model: Mapping[str, Any] | None = None,
    divergences: Mapping[str, float] | None = None, thresholds: tuple[float, float] = SIGNIFICANT,
) -> dict[str, Any]:  # fmt: skip
    """Return a migration plan as plain JSON values, schema ``aqnfx.migration/1``; ``model``: of the map where not given."""
    notes = [f"Classes and degradations are those {smap.perturbation.of(smap.base_level)}, on {smap.samples} samples."]
    if smap.partial:
        notes.append("The map is of an interrupted run; finish it before you rely on this list.")
    if nothing_distinguishable(smap):
        notes.append("Nothing in the map is distinguishable from noise-free: a larger --samples or a higher level says more.")
    record: dict[str, Any] = jsonable({
        "schema": Schema.MIGRATION, "model": dict(smap.model if model is None else model), "map": map_facts(smap),
        "actions": {str(priority): action for priority, action in ACTIONS.items()},
        "steps": [step.to_record() for step in steps],
        "divergences": {} if divergences is None else {"thresholds": list(thresholds), "sites": dict(divergences)},
        "notes": notes,
    })  # fmt: skip
    return record


def save_migration(record: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Path]:
    """Write the record to ``path``, the list as Markdown beside it with the suffix ``.md``, and return the paths.

    Both files are replaced, or none. Raises :class:`InputError` where one is not writable.
    """
    place = Path(path)
    found = {"migration": place, "markdown": place.with_suffix(".md")}
    write_all({place: json_text(place, record), found["markdown"]: migration_markdown(record)})
    return found


def print_migration(record: Mapping[str, Any], console: Console) -> None:
    """Print the list."""
    show(migration_blocks(record), console)


def migration_markdown(record: Mapping[str, Any]) -> str:
    """Return the list as GitHub Markdown, ending in a new line."""
    return markdown(migration_blocks(record))


def migration_blocks(record: Mapping[str, Any]) -> tuple[Block, ...]:
    """Return the blocks of a migration plan: one table in a terminal, a section per priority on a page."""
    columns = tuple(Column(label=label, kind=TEXT, wraps=True) for label in ("Priority", "What", "Do", "Why"))
    steps, notes = rows(record), tuple(record["notes"])
    sections: list[Block] = []
    for priority, action in record["actions"].items():
        found = tuple(row[1:] for row in steps if row[0] == priority)
        table = Table(columns=columns[1:], rows=found) if found else say("Nothing.")
        sections += [Heading(text=f"Priority {priority}: {action}"), table]
    about = {"model": record["model"], "map": record["map"]}
    if record["divergences"]:
        about |= {"divergence thresholds": record["divergences"]["thresholds"]}
    return (
        Heading(text=f"Migration plan for {record['model'].get('name')}", level=1),
        Lines(lines=notes, place=Place.PAGE),
        Table(columns=columns, rows=tuple(steps), spacing=Spacing.INSET, place=Place.TERMINAL),
        *on_page(*sections),
        Lines(lines=notes, place=Place.TERMINAL),
        *provenance_blocks(about),
    )


def rows(record: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return priority, what, action and the reasons with their numbers, a line per step."""
    return [
        (
            str(step["priority"]), step["what"], step["action"],
            "; and ".join(_reason(reason) for reason in step["reasons"]),
        )
        for step in record["steps"]
    ]  # fmt: skip


def _reason(reason: Mapping[str, Any]) -> str:
    numbers = ", ".join(_number(number) for number in reason["numbers"])
    return f"{reason['text']} ({numbers})" if numbers else str(reason["text"])


def _number(number: Mapping[str, Any]) -> str:
    name, value, ci = number["name"], number["value"], number["ci"]
    if name == "degradation":
        return f"loses {percent(value)}" + (f", {percent_range(ci)}" if ci else "")
    if name == "relative error":
        return f"relative error {nats(value)}"
    return f"{name} {factor(value)}" + (f", {factor_range(ci)}" if ci else "")
