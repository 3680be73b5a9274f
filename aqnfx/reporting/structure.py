"""The structure of a traced model as a record, and as blocks in the terminal: layers × operator kinds."""

from __future__ import annotations

import collections
from typing import Any

from rich.console import Console
from rich.text import Text

from aqnfx.artifacts import Schema
from aqnfx.errors import printable
from aqnfx.graph.program import Program
from aqnfx.graph.sites import Site
from aqnfx.reporting.blocks import Block, Column, Note, Spacing, Table, say
from aqnfx.reporting.kinds import COUNT, TEXT
from aqnfx.reporting.render.terminal import show


def _groups(program: Program) -> dict[str | None, list[Site]]:
    groups: dict[str | None, list[Site]] = {program.layer_label(s, i): [] for s, i in program.layers}
    for site in program.sites:
        groups.setdefault(program.layer_label(site.stack, site.layer), []).append(site)
    return groups


def structure_record(program: Program) -> dict[str, Any]:
    """Return layers × operator kinds, the regions of what lies outside of all layers, and every site, as JSON values."""
    groups = _groups(program)
    outside = collections.Counter(s.region for s in groups.get(None, []))
    return {
        "schema": Schema.STRUCTURE,
        "model": {k: v for k, v in program.source.items() if k != "origin"},
        "trace_seconds": program.source.get("trace_seconds"),
        "fingerprint": program.original,
        "stacks": sorted({stack for stack, _ in program.layers}),
        "layers": {
            label: dict(sorted(collections.Counter(str(s.op) for s in sites).items()))
            for label, sites in groups.items()
            if label is not None
        },
        "unattributed": dict(sorted(outside.items())),
        "sites_total": len(program.sites),
        "sites": [s.to_record() for s in program.sites],
        "notes": list(program.notes),
    }


def print_structure(program: Program, console: Console, *, sites: bool = False) -> None:
    """Print layers × operator kinds, what stands outside of all layers, notes and, where asked for, every site id."""
    record = structure_record(program)
    show(structure_blocks(program, record), console)
    for site in record["sites"] if sites else ():
        console.print(Text(printable(f"{site['id']}  [{site['region']}]")), soft_wrap=True)  # ids are whole, to be copied


def structure_blocks(program: Program, record: dict[str, Any]) -> tuple[Block, ...]:
    """Return the blocks of a structure; ``record`` is what :func:`structure_record` makes of it."""
    outside = record["unattributed"]
    regions = ", ".join(f"{count} {region}" for region, count in outside.items()) or "none"
    totals = (
        f"{record['sites_total']} sites in {len(record['layers'])} layers; {sum(outside.values())} outside of all layers"
        f" ({regions}); traced in {record['trace_seconds']:.1f} s"
    )
    return (
        _table(program),
        say(totals),
        *(Note(text=f"note: {note}") for note in record["notes"]),
    )


def _table(program: Program) -> Table:
    """Return the table of layers × operator kinds; equal neighbouring layers share a row."""
    kinds = sorted({str(s.op) for s in program.sites})
    columns = (Column(label="layer", kind=TEXT), *(Column(label=kind, kind=COUNT, wraps=True) for kind in kinds))
    found: list[tuple[list[str], collections.Counter[str]]] = []
    for label, sites in _groups(program).items():
        counts = collections.Counter(str(s.op) for s in sites)
        if found and label is not None and found[-1][0] != ["-"] and found[-1][1] == counts:
            found[-1][0].append(label)
        else:
            found.append(([label if label is not None else "-"], counts))
    rows = tuple(
        (labels[0] if len(labels) == 1 else f"{labels[0]} … {labels[-1]}", *(counts[kind] or "" for kind in kinds))
        for labels, counts in found
    )
    caption = f"{program.source.get('name', 'model')}: sites per layer and operator kind"
    return Table(columns=columns, rows=rows, caption=caption, spacing=Spacing.TIGHT)
