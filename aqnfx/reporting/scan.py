"""A scan in the terminal and as files: ``scan.json`` and a short ``scan.md``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aqnfx.diagnosis.scan import Scan
from aqnfx.diagnosis.scan_findings import CLASSES, sqnr_or_infinity
from aqnfx.errors import printable
from aqnfx.reporting.artifacts import check_output_dir, json_text, write_all
from aqnfx.reporting.markdown import table
from aqnfx.reporting.text import MISSING, flatten, percent
from aqnfx.reporting.text import escape_markdown as md

FILES = {"scan": "scan.json", "markdown": "scan.md"}
WORST, REMARKS = 10, 3
Records = dict[str, dict[str, dict[str, Any]]]
_STYLE = {"critical": "bold red", "recommended": "yellow", "optional": "cyan", "skip": "green"}
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
    """Print a row per format, the worst weights, remarks and what it took; names are never read as rich markup."""
    console.print(Text(f"Formats for the weights of {scan.model['name']}", style="bold"))
    console.print()
    console.print(_formats("Formats: SQNR in dB, and number of weights by class of training noise", scan, scan.summary))
    console.print(_worst("weights", scan, scan.weights, scan.weight_facts))
    if scan.activations:
        title = "Activations: SQNR in dB, and number of sites by class"
        console.print(_formats(title, scan, scan.activation_summary))
        console.print(_worst("activations", scan, scan.activations, scan.activation_facts))
    for line in [*scan.notes, *_remarks(scan)]:
        console.print(Text(printable(line)))
    console.print(Text(f"{_DECISION} {_cost(scan)}"))


def _formats(title: str, scan: Scan, summaries: dict[str, dict[str, Any]]) -> Table:
    grid = _table(title)
    grid.add_column("Format", overflow="fold", min_width=8)
    for heading in ("Bits", "Median", "Worst", *CLASSES):
        grid.add_column(heading, justify="right", no_wrap=True)
    for name, summary in summaries.items():
        counts = [Text(str(summary["classes"][kind]), style=_STYLE[kind]) for kind in CLASSES]
        grid.add_row(
            Text(name), f"{scan.formats[name]['bits']:.2f}", _decibel(_finite(summary["median_sqnr_db"])),
            _decibel(summary["worst"]["sqnr_db"]), *counts,
        )  # fmt: skip
    return grid


def _worst(what: str, scan: Scan, records_of: Records, about: dict[str, dict[str, Any]]) -> Table:
    """Return the weights (or activations) with the lowest SQNR in any format, and what may explain it."""
    lowest = {module: min(map(sqnr_or_infinity, records.values())) for module, records in records_of.items()}
    modules = sorted(lowest, key=lambda module: (lowest[module], module))[:WORST]
    grid = _table(f"The {len(modules)} worst of {len(lowest)} {what}, by their lowest SQNR in dB")
    grid.add_column("Module" if what == "activations" else "Weight", overflow="fold", ratio=1, min_width=20)
    for heading in (*scan.formats, "Outliers", "Kurtosis"):
        grid.add_column(Text(heading), justify="right", overflow="fold")
    for module in modules:
        records, facts = records_of[module], about[module]
        cells = [Text(_decibel(records[name]["sqnr_db"]), style=_STYLE[records[name]["class"]]) for name in scan.formats]
        grid.add_row(Text(printable(module)), *cells, _factor(facts["outlier_ratio"]), _factor(facts["kurtosis"]))
    return grid


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


def scan_markdown(scan: Scan) -> str:
    """Return a scan as GitHub Markdown, ending in a new line; names from outside are escaped."""
    lines = [f"# Formats for the weights of {md(scan.model['name'])}", "", *_summary(scan, "weight", scan.summary)]
    lines += ["", md(_DECISION)]
    for name, ranking in scan.ranking.items():
        found = _ranking(ranking[:WORST], {m: r[name] for m, r in scan.weights.items()}, scan.weight_facts)
        lines += ["", f"## {md(name)}: the worst weights", "", *found]
    if scan.activations:
        lines += ["", "## Activations", "", *_summary(scan, "site", scan.activation_summary)]
        for name, ranking in scan.activation_ranking.items():
            found = _ranking(ranking[:WORST], {m: r[name] for m, r in scan.activations.items()}, scan.activation_facts)
            lines += ["", f"### {md(name)}: the worst activations", "", *found]
    for note in [*scan.notes, *_remarks(scan)]:
        lines += ["", f"> {md(note)}"]
    lines += ["", "## Provenance", "", *table(("What", "Value"), flatten({"model": scan.model} | scan.provenance))]
    return "\n".join([*lines, "", md(_cost(scan))]) + "\n"


def _summary(scan: Scan, what: str, summaries: dict[str, dict[str, Any]]) -> list[str]:
    header = ("Format", "Bits per value", "Median SQNR, dB", "Worst SQNR, dB", f"Worst {what}", *CLASSES)
    rows = [
        (
            name, f"{scan.formats[name]['bits']:.2f}", _decibel(_finite(found["median_sqnr_db"])),
            _decibel(found["worst"]["sqnr_db"]), found["worst"]["module"], *(found["classes"][kind] for kind in CLASSES),
        )
        for name, found in summaries.items()
    ]  # fmt: skip
    return table(header, rows, right=(1, 2, 3, *range(5, 5 + len(CLASSES))))


def _ranking(
    ranking: list[dict[str, Any]], records: dict[str, dict[str, Any]], about: dict[str, dict[str, Any]]
) -> list[str]:
    header = ("#", "Module", "SQNR, dB", "Dead zone", "Saturation", "Relative error", "Outliers", "Kurtosis", "Class", "σ")
    rows = []
    for row in ranking:
        record, facts = records[row["module"]], about[row["module"]]
        sigma = "none" if record["sigma"] is None else " to ".join(f"{value:g}" for value in record["sigma"])
        rows.append((
            row["rank"], row["module"], _decibel(record["sqnr_db"]), percent(record["dead_zone"]),
            percent(record["saturation"]), percent(record["relative_error"]), _factor(facts["outlier_ratio"]),
            _factor(facts["kurtosis"]), record["class"], sigma,
        ))  # fmt: skip
    return table(header, rows, right=(0, 2, 3, 4, 5, 6, 7))


def _finite(value: float) -> float | None:
    return value if abs(value) != float("inf") else None


def _decibel(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def _factor(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}"


def _table(title: str) -> Table:
    return Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
