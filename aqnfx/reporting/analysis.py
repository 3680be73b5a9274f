"""An analysis in the terminal and as files: ``analysis.json``, ``analysis.graphml`` and ``analysis.svg``."""

from __future__ import annotations

import collections
import os
from pathlib import Path

import networkx as nx
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aqnfx.diagnosis.analysis import Analysis
from aqnfx.errors import printable
from aqnfx.reporting.analysis_svg import analysis_svg
from aqnfx.reporting.artifacts import check_output_dir, json_text, write_all
from aqnfx.reporting.text import MISSING, factor_range, names, percent, window_name

FILES = {"analysis": "analysis.json", "graphml": "analysis.graphml", "svg": "analysis.svg"}
LISTED = 10


def save_analysis(analysis: Analysis, directory: str | os.PathLike[str]) -> dict[str, Path]:
    """Write ``analysis.json``, ``analysis.graphml`` and ``analysis.svg`` into a directory, made where it is missing.

    Returns their paths. All files are replaced, or none. Raises :class:`InputError` when the directory is not writable.
    """
    place = check_output_dir(directory)
    found = {name: place / file for name, file in FILES.items()}
    write_all(
        {
            found["analysis"]: json_text(found["analysis"], analysis.to_record()),
            found["graphml"]: analysis_graphml(analysis),
            found["svg"]: analysis_svg(analysis),
        }
    )
    return found


def analysis_graphml(analysis: Analysis) -> str:
    """Return the sites and what reads them as GraphML; nodes have the fields of their records, and ``kl`` where it is known.

    ``kl`` is the sum over the site and its operands. Lists are joined by semicolons; what is None is left out.
    """
    graph: nx.DiGraph[str] = nx.DiGraph()
    costs = analysis.costs()
    for site, fields in analysis.structure.graph().nodes(data=True):
        known = {key: ";".join(v) if isinstance(v, tuple) else v for key, v in fields.items() if v is not None}
        known |= {"kl": costs[site]} if site in costs else {}
        graph.add_node(printable(site), **{key: printable(v) if isinstance(v, str) else v for key, v in known.items()})
    graph.add_edges_from((printable(a), printable(b)) for a, b in analysis.structure.edges)
    return "\n".join(nx.generate_graphml(graph)) + "\n"


def print_analysis(analysis: Analysis, console: Console) -> None:
    """Print totals, the operator kinds, the coupling groups and, with a map, the critical sites and where error goes."""
    found = analysis.structure
    sizes = ", ".join(f"{name} {' × '.join(map(str, shape))}" for name, shape in found.inputs.items())
    console.print(Text(f"Structure of {printable(str(analysis.model.get('name', 'the model')))}", style="bold"))
    _say(console, f"One forward pass of {sizes}: {quantity(found.flops)}FLOP, {quantity(found.bytes_moved)}B moved;"
         f" {quantity(found.parameters).strip()} parameters in {quantity(found.parameter_bytes)}B.")  # fmt: skip
    console.print()
    console.print(_kinds(analysis))
    reasons = collections.Counter(group.reason for group in found.groups)
    about = "; ".join(f"{count} {reason} (as {next(g.name for g in found.groups if g.reason == reason)})"
                      for reason, count in reasons.items())  # fmt: skip
    _say(console, f"Coupling groups: {about or 'none'}.")
    cut = [site.id for site in found.sites if not site.reaches_output and site.region != "position"]
    if cut:
        _say(console, f"Without a path to the output: {names(cut)}.")
    if analysis.map:
        console.print()
        _print_map(analysis, console)
    for note in analysis.notes:
        _say(console, f"Note: {note}")


def _print_map(analysis: Analysis, console: Console) -> None:
    if analysis.critical:
        console.print(_critical(analysis))
    grid = _table(f"The {min(LISTED, len(analysis.sites))} most sensitive of {len(analysis.sites)} sites")
    grid.add_column("Site", overflow="fold", ratio=1, min_width=20)
    for heading in ("KL, nats", "Share", "per GFLOP", "per Mbit saved", "On the stream"):
        grid.add_column(heading, justify="right", overflow="fold")
    for entry in analysis.sites[:LISTED]:
        grid.add_row(
            Text(printable(entry["id"])), _number(entry["kl"]), percent(entry["share"]), _number(entry["kl_per_gflop"]),
            _number(entry["kl_per_mbit"]), analysis.structure.site(entry["id"]).residual,
        )  # fmt: skip
    console.print(grid)
    layers = sorted(
        (e for e in analysis.error_flow["layers"] if e["share"] is not None), key=lambda e: e["share"], reverse=True
    )
    if layers:
        first = ", ".join(f"layer {e['layer']} ({percent(e['share'])})" for e in layers[:3])
        _say(console, f"Most error enters in {first} of what the layers cost one by one.")
    for verdict in ("amplified", "absorbed"):
        windows = [w for w in analysis.error_flow["windows"] if w["verdict"] == verdict]
        if windows:
            listed = ", ".join(
                f"{window_name(w['layers'])} ({w['amplification']:.2g}×, {factor_range(w['ci'])})" for w in windows[:LISTED]
            )
            _say(console, f"Together {verdict}: layers {listed}.")


def _critical(analysis: Analysis) -> Table:
    grid = _table(f"{len(analysis.critical)} sites stand out, and why")
    grid.add_column("Site", overflow="fold", ratio=2, min_width=20)
    grid.add_column("× median", justify="right", no_wrap=True)
    grid.add_column("Structural reason", overflow="fold", ratio=3)
    for entry in analysis.critical:
        why = "; ".join(reason["text"] for reason in entry["reasons"])
        grid.add_row(Text(printable(entry["id"])), _number(entry["times_median"]), Text(printable(why)))
    return grid


def _kinds(analysis: Analysis) -> Table:
    """A row per operator kind: sums of its sites, and how many of them are bound by computing."""
    found = analysis.structure
    grid = _table(f"Operations; at {found.balance:g} FLOP per byte or more they are bound by computing")
    for heading in ("Operation", "Sites", "FLOP", "Bytes moved", "Parameters", "FLOP/byte", "Compute-bound"):
        grid.add_column(heading, justify="left" if heading == "Operation" else "right", no_wrap=True)
    kinds = collections.Counter(site.op for site in found.sites)
    for kind in sorted(kinds, key=lambda k: (-sum(s.flops for s in found.sites if s.op == k), k)):
        sites = [site for site in found.sites if site.op == kind]
        flops, moved = sum(s.flops for s in sites), sum(s.bytes_read + s.bytes_written for s in sites)
        bound = sum(s.bound == "compute" for s in sites)
        grid.add_row(
            kind, str(len(sites)), quantity(flops) if flops else MISSING, quantity(moved),
            quantity(sum(s.parameters for s in sites)) if any(s.parameters for s in sites) else MISSING,
            f"{flops / moved:.3g}" if flops and moved else MISSING, str(bound),
        )  # fmt: skip
    return grid


def quantity(value: float) -> str:
    """Return a number with a decimal prefix, ready for its unit: ``1.23 G``, ``45.0 M``, ``678 `` below a thousand."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.0f} "


def _say(console: Console, text: str) -> None:
    console.print(Text(printable(text)))


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}"


def _table(title: str) -> Table:
    return Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
