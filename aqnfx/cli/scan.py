"""aqnfx scan: what number formats do to the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from aqnfx.cli.common import MISSING_HELP, words
from aqnfx.errors import InputError, Interrupted


def command(
    model: str = typer.Argument(help="Local Hugging Face directory with safetensors, cached hub id, or tinygsm."),
    formats: str = typer.Option("mxfp4,nvfp4,int8", "--formats", help="Number formats, with commas: mxfp4,int4:g128,…"),
    data: Path = typer.Option(None, "--data", help="JSON lines, CSV, parquet or plain text: scan activations too."),
    samples: int = typer.Option(None, help="Samples of the data (default: 32)."),
    batch_size: int = typer.Option(None, help="Samples per forward pass (default: 8)."),
    max_length: int = typer.Option(None, help="Tokens per sample (default: 256, or what the model takes)."),
    text_field: str = typer.Option(None, help="Field that holds the text of a record."),
    device: str = typer.Option(None, help="Device that the data is run on (default: cpu)."),
    dtype: str = typer.Option(None, help="What the model is loaded in for the data (default: float32)."),
    allow_missing: str = typer.Option(None, "--allow-missing", help=MISSING_HELP),
    compile_mode: str = typer.Option("auto", "--compile", help="auto, yes or no."),
    out: Path = typer.Option(None, "--out", help="Directory for scan.json and scan.md (default: the tables only)."),
    json_output: bool = typer.Option(False, "--json", help="Print the record as JSON and nothing else."),
) -> None:
    """Read every weight of a checkpoint and print the error that number formats make; with --data of activations too."""
    import json
    import warnings

    from aqnfx.cli.places import check_files_in, output_directory
    from aqnfx.cli.session import check_data, keep_freed_memory
    from aqnfx.cli.terminal import Terminal, progress_bar
    from aqnfx.reporting.scan import FILES, print_scan, save_scan
    from aqnfx.scanning.scan import scan

    keep_freed_memory()
    console = Terminal(stderr=json_output)
    about_data: dict[str, Any] = dict(
        samples=samples, batch_size=batch_size, max_length=max_length, text_field=text_field, device=device, dtype=dtype,
        allow_missing=words(allow_missing) or None,
    )  # fmt: skip
    given: dict[str, Any] = {name: value for name, value in about_data.items() if value is not None}
    if data is None and given:
        raise InputError(f"--{next(iter(given)).replace('_', '-')} is about data, and there is none; add --data FILE")
    if data is not None:
        check_data(data)
        given = {"data": data, "samples": 32, "batch_size": 8, **given}
        warnings.filterwarnings("ignore", module="torch|transformers")
    check_files_in(out, FILES.values(), {"--data": data})
    with output_directory(out), progress_bar(console) as bar:
        task = bar.add_task("scanning", total=None)
        try:
            found = scan(
                model, formats, compile=compile_mode, status=lambda text: bar.reset(task, description=text, total=None),
                progress=lambda done, total: bar.update(task, completed=done, total=total), **given,
            )  # fmt: skip
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted; a scan is written as a whole, so there is nothing to resume") from error
        paths = save_scan(found, out) if out is not None else {}
    if json_output:
        print(json.dumps(found.to_record()))
        return
    print_scan(found, console)
    if paths:
        console.print(f"\nReport: {paths['markdown']}", soft_wrap=True)
