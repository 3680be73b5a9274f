"""A scan as blocks, in the terminal and as files: ``scan.json`` and a short ``scan.md``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from aqnfx.artifacts import check_output_dir, json_text, write_all
from aqnfx.reporting.blocks import Block, Cell, Column, Gap, Heading, Note, Place, Table, of_kinds, on_page, say
from aqnfx.reporting.kinds import CLASS, COUNT, DECIBEL, NUMBER, PERCENT, TEXT, fixed
from aqnfx.reporting.method import provenance_blocks
from aqnfx.reporting.render.markdown import markdown
from aqnfx.reporting.render.terminal import show
from aqnfx.scanning.findings import CLASSES, sqnr_or_infinity
from aqnfx.scanning.scan import Scan

FILES = {"scan": "scan.json", "markdown": "scan.md"}
WORST, REMARKS = 10, 3
Records = dict[str, dict[str, dict[str, Any]]]
_DECISION = (
    "Classes of training noise, by SQNR: below 18 dB critical; 18 to 20 dB with more than 10 % of the values in the dead"
    " zone recommended; 18 to 22 dB otherwise optional; above 22 dB skip. SQNR counts every value alike: it does not say how"
    " much the model depends on a weight."
)


def save_scan(scan: Scan, directory: str | os.PathLike[str]) -> dict[str, Path]:
    """Write ``scan.json`` and ``scan.md`` into a directory, made where it is missing, and return their paths.

    All files are replaced, or none. Raises :class:`InputError` when the directory is not writable.
    """
    place = check_output_dir(directory)
    found = {name: place / file for name, file in FILES.items()}
    write_all({found["scan"]: json_text(found["scan"], scan.to_record()), found["markdown"]: scan_markdown(scan)})
    return found


def print_scan(scan: Scan, console: Console) -> None:
    """Print a row per format, the worst weights, remarks and what it took."""
    show(scan_blocks(scan), console)


def scan_markdown(scan: Scan) -> str:
    """Return a scan as GitHub Markdown, ending in a new line."""
    return markdown(scan_blocks(scan))


def scan_blocks(scan: Scan) -> tuple[Block, ...]:
    """Return the blocks of a scan: formats, the worst weights and activations, remarks, and what it took."""
    return (
        Heading(text=f"Formats for the weights of {scan.model['name']}", level=1),
        Gap(),
        _formats("Formats: SQNR in dB, and number of weights by class of training noise", "weight", scan, scan.summary),
        say(_DECISION, place=Place.PAGE),
        *_rankings("weights", 2, scan.ranking, scan.weights, scan.weight_facts),
        _worst("Weight", "weights", scan, scan.weights, scan.weight_facts),
        *_activations(scan),
        *(Note(text=note) for note in [*scan.notes, *_remarks(scan)]),
        say(f"{_DECISION} {_cost(scan)}", place=Place.TERMINAL),
        *provenance_blocks({"model": scan.model} | scan.provenance),
        say(_cost(scan), place=Place.PAGE),
    )


def _activations(scan: Scan) -> list[Block]:
    if not scan.activations:
        return []
    title = "Activations: SQNR in dB, and number of sites by class"
    return [
        Heading(text="Activations", place=Place.PAGE),
        _formats(title, "site", scan, scan.activation_summary),
        *_rankings("activations", 3, scan.activation_ranking, scan.activations, scan.activation_facts),
        _worst("Module", "activations", scan, scan.activations, scan.activation_facts),
    ]


def _formats(caption: str, what: str, scan: Scan, summaries: dict[str, dict[str, Any]]) -> Table:
    """Return a row per format: what it takes, its errors, and how many weights (or sites) are of each class."""
    columns = (
        Column(label="Format", kind=TEXT, wraps=True, least=8),
        Column(label="Bits per value", kind=fixed(2), short="Bits"),
        Column(label="Median SQNR, dB", kind=DECIBEL, short="Median"),
        Column(label="Worst SQNR, dB", kind=DECIBEL, short="Worst"),
        Column(label=f"Worst {what}", kind=TEXT, place=Place.PAGE),
        *(Column(label=kind, kind=COUNT) for kind in CLASSES),
    )
    rows = tuple(
        (
            name, scan.formats[name]["bits"], _finite(found["median_sqnr_db"]), found["worst"]["sqnr_db"],
            found["worst"]["module"], *(Cell(value=found["classes"][kind], tone=kind) for kind in CLASSES),
        )
        for name, found in summaries.items()
    )  # fmt: skip
    return Table(columns=columns, rows=rows, caption=caption)


def _worst(label: str, what: str, scan: Scan, records_of: Records, about: dict[str, dict[str, Any]]) -> Table:
    """Return the weights (or activations) with the lowest SQNR in any format, and what may explain it, for a terminal."""
    lowest = {module: min(map(sqnr_or_infinity, records.values())) for module, records in records_of.items()}
    modules = sorted(lowest, key=lambda module: (lowest[module], module))[:WORST]
    columns = (
        Column(label=label, kind=TEXT, wraps=True, share=1, least=20),
        *(Column(label=name, kind=DECIBEL, wraps=True) for name in scan.formats),
        Column(label="Outliers", kind=NUMBER, wraps=True),
        Column(label="Kurtosis", kind=NUMBER, wraps=True),
    )
    rows = []
    for module in modules:
        records, facts = records_of[module], about[module]
        cells = (Cell(value=records[name]["sqnr_db"], tone=records[name]["class"]) for name in scan.formats)
        rows.append((module, *cells, facts["outlier_ratio"], facts["kurtosis"]))
    caption = f"The {len(modules)} worst of {len(lowest)} {what}, by their lowest SQNR in dB"
    return Table(columns=columns, rows=tuple(rows), caption=caption, place=Place.TERMINAL)


def _rankings(
    what: str, level: int, rankings: dict[str, list[dict[str, Any]]], records_of: Records, about: dict[str, dict[str, Any]]
) -> tuple[Block, ...]:
    """Return the worst weights (or activations) of each format, with all that is known of them, for a page."""
    columns = of_kinds(
        ("#", COUNT), ("Module", TEXT), ("SQNR, dB", DECIBEL), ("Dead zone", PERCENT), ("Saturation", PERCENT),
        ("Relative error", PERCENT), ("Outliers", NUMBER), ("Kurtosis", NUMBER), ("Class", CLASS), ("σ", TEXT),
    )  # fmt: skip
    found: list[Block] = []
    for name, ranking in rankings.items():
        rows = tuple(
            _ranked(row, records_of[row["module"]][name], about[row["module"]]) for row in ranking[:WORST]
        )
        found += [Heading(text=f"{name}: the worst {what}", level=level), Table(columns=columns, rows=rows)]
    return on_page(*found)


def _ranked(row: dict[str, Any], record: dict[str, Any], facts: dict[str, Any]) -> tuple[Any, ...]:
    sigma = "none" if record["sigma"] is None else " to ".join(f"{value:g}" for value in record["sigma"])
    return (
        row["rank"], row["module"], record["sqnr_db"], record["dead_zone"], record["saturation"], record["relative_error"],
        facts["outlier_ratio"], facts["kurtosis"], record["class"], sigma,
    )  # fmt: skip


def _remarks(scan: Scan) -> list[str]:
    """Return the first notes on weights that rank otherwise by relative error, and how many others there are."""
    rankings = (*scan.ranking.values(), *scan.activation_ranking.values())
    notes = [row["note"] for rows in rankings for row in rows if "note" in row]
    more = len(notes) - REMARKS
    return notes[:REMARKS] + ([f"{more} more rank far otherwise by relative error: see the ranking."] if more > 0 else [])


def _cost(scan: Scan) -> str:
    found = scan.provenance
    memory = found["peak_memory_mib"]
    return (
        f"Read {found['weights']} weights, {found['elements'] / 1e6:.1f} M values, in {found['seconds']:.1f} s:"
        f" {found['gb_per_second']:.3g} GB/s{'' if memory is None else f', with at most {memory:.0f} MiB of memory'}."
    )


def _finite(value: float) -> float | None:
    return value if abs(value) != float("inf") else None
