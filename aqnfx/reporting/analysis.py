"""An analysis as blocks, in the terminal and as files: ``analysis.json``, ``analysis.graphml`` and ``analysis.svg``."""

from __future__ import annotations

import collections
import os
from pathlib import Path

import networkx as nx
from rich.console import Console

from aqnfx.artifacts import check_output_dir, json_text, write_all
from aqnfx.diagnosis.explain.analysis import Analysis
from aqnfx.errors import printable
from aqnfx.reporting.analysis_svg import analysis_svg
from aqnfx.reporting.blocks import Block, Column, Gap, Heading, Table, of_kinds, say
from aqnfx.reporting.kinds import COUNT, KL, NUMBER, PERCENT, QUANTITY, TEXT
from aqnfx.reporting.render.terminal import show
from aqnfx.reporting.text import factor_range, names, percent, quantity, window_name

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
    show(analysis_blocks(analysis), console)


def analysis_blocks(analysis: Analysis) -> tuple[Block, ...]:
    """Return the blocks of an analysis, as many as have something to say."""
    found = analysis.structure
    sizes = ", ".join(f"{name} {' × '.join(map(str, shape))}" for name, shape in found.inputs.items())
    totals = (
        f"One forward pass of {sizes}: {quantity(found.flops)}FLOP, {quantity(found.bytes_moved)}B moved;"
        f" {quantity(found.parameters).strip()} parameters in {quantity(found.parameter_bytes)}B."
    )
    cut = [site.id for site in found.sites if not site.reaches_output and site.region != "position"]
    return (
        Heading(text=f"Structure of {analysis.model.get('name', 'the model')}", level=1),
        say(totals),
        Gap(),
        _kinds(analysis),
        say(_groups(analysis)),
        *([say(f"Without a path to the output: {names(cut)}.")] if cut else []),
        *([Gap(), *_critical(analysis), _sites(analysis), *_error_flow(analysis)] if analysis.map else []),
        *(say(f"Note: {note}") for note in analysis.notes),
    )


def _groups(analysis: Analysis) -> str:
    """Say how many coupling groups there are for each reason, and name the first of each."""
    groups = analysis.structure.groups
    reasons = collections.Counter(group.reason for group in groups)
    about = "; ".join(
        f"{count} {reason} (as {next(group.name for group in groups if group.reason == reason)})"
        for reason, count in reasons.items()
    )
    return f"Coupling groups: {about or 'none'}."


def _sites(analysis: Analysis) -> Table:
    columns = (
        Column(label="Site", kind=TEXT, wraps=True, share=1, least=20),
        Column(label="KL, nats", kind=KL, wraps=True),
        Column(label="Share", kind=PERCENT, wraps=True),
        Column(label="per GFLOP", kind=NUMBER, wraps=True),
        Column(label="per Mbit saved", kind=NUMBER, wraps=True),
        Column(label="On the stream", kind=TEXT, wraps=True, right=True),
    )
    rows = tuple(
        (
            entry["id"], entry["kl"], entry["share"], entry["kl_per_gflop"], entry["kl_per_mbit"],
            str(analysis.structure.site(entry["id"]).residual),
        )
        for entry in analysis.sites[:LISTED]
    )  # fmt: skip
    return Table(columns=columns, rows=rows, caption=f"The {len(rows)} most sensitive of {len(analysis.sites)} sites")


def _error_flow(analysis: Analysis) -> list[Block]:
    """Say in which layers most error enters, and which windows amplify or absorb it."""
    flow, said = analysis.error_flow, []
    layers = sorted((e for e in flow["layers"] if e["share"] is not None), key=lambda e: e["share"], reverse=True)
    if layers:
        first = ", ".join(f"layer {e['layer']} ({percent(e['share'])})" for e in layers[:3])
        said.append(f"Most error enters in {first} of what the layers cost one by one.")
    for verdict in ("amplified", "absorbed"):
        windows = [w for w in flow["windows"] if w["verdict"] == verdict]
        if windows:
            listed = ", ".join(
                f"{window_name(w['layers'])} ({w['amplification']:.2g}×, {factor_range(w['ci'])})" for w in windows[:LISTED]
            )
            said.append(f"Together {verdict}: layers {listed}.")
    return [say(*said)]


def _critical(analysis: Analysis) -> list[Block]:
    if not analysis.critical:
        return []
    columns = (
        Column(label="Site", kind=TEXT, wraps=True, share=2, least=20),
        Column(label="× median", kind=NUMBER),
        Column(label="Structural reason", kind=TEXT, wraps=True, share=3),
    )
    rows = tuple(
        (entry["id"], entry["times_median"], "; ".join(reason["text"] for reason in entry["reasons"]))
        for entry in analysis.critical
    )
    return [Table(columns=columns, rows=rows, caption=f"{len(rows)} sites stand out, and why")]


def _kinds(analysis: Analysis) -> Table:
    """A row per operator kind: sums of its sites, and how many of them are bound by computing."""
    found = analysis.structure
    columns = of_kinds(
        ("Operation", TEXT), ("Sites", COUNT), ("FLOP", QUANTITY), ("Bytes moved", QUANTITY),
        ("Parameters", QUANTITY), ("FLOP/byte", NUMBER), ("Compute-bound", COUNT),
    )  # fmt: skip
    rows = []
    kinds = collections.Counter(site.op for site in found.sites)
    for kind in sorted(kinds, key=lambda k: (-sum(s.flops for s in found.sites if s.op == k), k)):
        sites = [site for site in found.sites if site.op == kind]
        flops, moved = sum(s.flops for s in sites), sum(s.bytes_read + s.bytes_written for s in sites)
        rows.append((
            str(kind), len(sites), flops or None, moved, sum(s.parameters for s in sites) or None,
            flops / moved if flops and moved else None, sum(s.bound == "compute" for s in sites),
        ))  # fmt: skip
    caption = f"Operations; at {found.balance:g} FLOP per byte or more they are bound by computing"
    return Table(columns=columns, rows=tuple(rows), caption=caption)
