"""aqnfx analyze: what each operation of a model costs, how they hang together, and why the sensitive ones are."""

from __future__ import annotations

from pathlib import Path

import typer

from aqnfx.cli.common import MISSING_HELP, words


def command(
    model: str = typer.Argument(help="Local Hugging Face directory, hub id, or tinygsm."),
    map: Path = typer.Option(None, "--map", help="sensitivity_map.json, or the directory that diagnose wrote."),
    batch: int = typer.Option(None, "--batch", help="Samples of the forward pass that is counted (default: 1)."),
    tokens: int = typer.Option(None, "--tokens", help="Tokens per sample (default: 128, or what the model takes)."),
    balance: float = typer.Option(295.0, "--balance", help="FLOP per byte from which on an operation is compute-bound."),
    top: int = typer.Option(10, "--top", help="Critical sites to explain, at most."),
    allow_missing: str = typer.Option(None, "--allow-missing", help=MISSING_HELP),
    out: Path = typer.Option(None, "--out", help="Directory for analysis.json, .graphml and .svg (default: the tables only)."),
    json_output: bool = typer.Option(False, "--json", help="Print the record as JSON and nothing else."),
) -> None:
    """Print FLOPs, bytes, residual stream and coupling groups of a model; with --map what its sensitive sites have in common."""
    import json
    import warnings
    from contextlib import nullcontext

    from aqnfx.cli.places import check_files_in, output_directory
    from aqnfx.cli.terminal import Terminal
    from aqnfx.diagnosis.explain.analysis import analyze
    from aqnfx.reporting.analysis import FILES, print_analysis, save_analysis
    from aqnfx.reporting.report import load_map

    warnings.filterwarnings("ignore", module="torch|transformers")
    console = Terminal(stderr=json_output)
    smap = load_map(map) if map is not None else None  # before the model is traced: a bad file fails at once
    check_files_in(out, FILES.values(), {"--map": map})
    with output_directory(out), console.status("tracing", spinner="line") if console.is_terminal else nullcontext():
        found = analyze(model, smap, batch=batch, tokens=tokens, balance=balance, top=top, allow_missing=words(allow_missing))
        paths = save_analysis(found, out) if out is not None else {}
    if json_output:
        print(json.dumps(found.to_record()))
        return
    print_analysis(found, console)
    if paths:
        console.print(f"\nPicture: {paths['svg']}", soft_wrap=True)
