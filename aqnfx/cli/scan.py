"""aqnfx scan: what number formats do to the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import typer


def command(
    model: str = typer.Argument(help="Local Hugging Face directory with safetensors, cached hub id, or tinygsm."),
    formats: str = typer.Option("mxfp4,nvfp4,int8", "--formats", help="Number formats, with commas: mxfp4,int4:g128,…"),
    compile_mode: str = typer.Option("auto", "--compile", help="auto, yes or no."),
    out: Path = typer.Option(None, "--out", help="Directory for scan.json and scan.md (default: the tables only)."),
    json_output: bool = typer.Option(False, "--json", help="Print the record as JSON and nothing else."),
) -> None:
    """Read every weight of a checkpoint and print the error that number formats make, without loading the model."""
    import json

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from aqnfx.cli.session import keep_freed_memory, output_directory
    from aqnfx.diagnosis.scan import scan
    from aqnfx.reporting.scan import print_scan, save_scan

    keep_freed_memory()
    console = Console(stderr=json_output)
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn(), TextColumn("ETA"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )  # fmt: skip
    with output_directory(out), Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("scanning", total=None)
        found = scan(
            model, formats, compile=compile_mode,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    paths = save_scan(found, out) if out is not None else {}
    if json_output:
        print(json.dumps(found.to_record()))
        return
    print_scan(found, console)
    if paths:
        console.print(f"\nReport: {paths['markdown']}", soft_wrap=True, markup=False)
