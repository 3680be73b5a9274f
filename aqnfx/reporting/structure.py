"""The structure of a traced model as a record and as a table: layers × operator kinds."""

from __future__ import annotations

import collections
from typing import Any

from rich import box
from rich.table import Table

from aqnfx.graph.program import Program
from aqnfx.graph.sites import Site


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
        "schema": "aqnfx.structure/1",
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


def structure_table(program: Program) -> Table:
    """Return the table of layers × operator kinds; equal neighbouring layers share a row."""
    groups = _groups(program)
    kinds = sorted({str(s.op) for s in program.sites})
    title = f"{program.source.get('name', 'model')}: sites per layer and operator kind"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("layer", no_wrap=True)
    for kind in kinds:
        table.add_column(kind, justify="right", overflow="fold")
    rows: list[tuple[list[str], collections.Counter[str]]] = []
    for label, sites in groups.items():
        counts = collections.Counter(str(s.op) for s in sites)
        if rows and label is not None and rows[-1][0] != ["-"] and rows[-1][1] == counts:
            rows[-1][0].append(label)
        else:
            rows.append(([label if label is not None else "-"], counts))
    for labels, counts in rows:
        name = labels[0] if len(labels) == 1 else f"{labels[0]} … {labels[-1]}"
        table.add_row(name, *(str(counts[kind]) if counts[kind] else "" for kind in kinds))
    return table
