"""aqnfx export: a plan as files that other software reads."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from aqnfx.cli.common import MISSING_HELP, words


def command(
    plan: Path = typer.Argument(help="File of a plan (schema aqnfx.plan/1)."),
    to: str = typer.Option(..., "--to", help="Target: torchao, compressed-tensors, onnx, modelopt, python or pt2."),
    out: Path = typer.Option(..., "--out", help="Folder (new or empty) or file to write, see the table of targets."),
    model: str = typer.Option(None, "--model", help="Model directory or hub id (default: what the plan names)."),
    dtype: str = typer.Option(
        None, "--dtype", help="What a checkpoint stores everything else in (default: auto, as the model's own file has it)."
    ),
    pipeline: str = typer.Option(None, "--pipeline", "-p", help="Passes to run after the plan's, for python and pt2."),
    allow_missing: str = typer.Option(None, "--allow-missing", help=MISSING_HELP),
    no_check: bool = typer.Option(False, "--no-check", help="Do not read what was written back by its target."),
    json_output: bool = typer.Option(False, "--json", help="Print what was written as JSON and nothing else."),
) -> None:
    """Write a plan for another program: a quantised checkpoint, a config, a graph. All of it or nothing."""
    import json
    import warnings

    from aqnfx.cli.places import check_outputs
    from aqnfx.cli.session import keep_freed_memory
    from aqnfx.cli.terminal import Terminal
    from aqnfx.export.targets import export_plan

    keep_freed_memory()
    warnings.filterwarnings("ignore", module="torch|transformers|compressed_tensors")
    given = {name: value for name, value in {"dtype": dtype, "pipeline": pipeline}.items() if value is not None}
    if not os.path.isdir(out):  # a folder that is not empty is refused by the export
        check_outputs([out], {"the plan": plan}, model=model)
    found = export_plan(plan, to, out, model=model, allow_missing=words(allow_missing), check=not no_check, **given)
    if json_output:
        print(json.dumps(found.to_record()))
        return
    console = Terminal()
    console.print(f"{found.target}: {found.path}", soft_wrap=True)
    if found.stored_bytes is not None and found.planned_bytes is not None:
        console.print(f"planned weights: {found.stored_bytes:,} bytes stored, {found.planned_bytes:,} planned")
    if found.checked is not None:
        console.print(found.checked, soft_wrap=True)
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True)
