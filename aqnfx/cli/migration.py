"""aqnfx plan --migration: what to validate first, from a sensitivity map."""

from __future__ import annotations

from pathlib import Path


def migrate(
    model: str, map: Path, divergences: Path | None, *, allow_missing: tuple[str, ...], out: Path | None, json_output: bool
) -> None:
    """Print the migration plan of a model and, with ``out``, write it as JSON and Markdown."""
    import json
    import warnings
    from contextlib import nullcontext

    import torch

    from aqnfx.artifacts import read_json
    from aqnfx.cli.places import output_directory
    from aqnfx.cli.terminal import Terminal
    from aqnfx.diagnosis.advice.divergences import parse_divergences
    from aqnfx.diagnosis.advice.migration import migration_plan
    from aqnfx.diagnosis.explain.map_of_model import as_probed
    from aqnfx.graph.lengths import recorded, trace_for
    from aqnfx.planning.planner import model_facts
    from aqnfx.probes.settings import DTYPES
    from aqnfx.reporting.migration import migration_record, print_migration, save_migration
    from aqnfx.reporting.report import load_map

    smap = load_map(map)  # before the model is traced: a bad file fails at once
    errors = None if divergences is None else parse_divergences(read_json(divergences), str(divergences))
    warnings.filterwarnings("ignore", module="torch|transformers")
    console = Terminal(stderr=json_output)
    directory = out.parent if out is not None else None
    with output_directory(directory), console.status("tracing") if console.is_terminal else nullcontext():
        # In the dtype of the map: its digest of the weights is over their bytes.
        made_in = str(smap.model.get("dtype"))
        dtype = getattr(torch, made_in if made_in in DTYPES else DTYPES[0])
        traced = trace_for(model, recorded(smap.provenance), dtype=dtype, allow_missing=allow_missing)
        program = as_probed(traced, smap)
        steps = migration_plan(smap, errors, program=program)
        record = migration_record(steps, smap, model=model_facts(model, program), divergences=errors)
        paths = save_migration(record, out) if out is not None else {}
    if json_output:
        print(json.dumps(record))
        return
    print_migration(record, console)
    if paths:
        console.print(f"\nList: {paths['migration']}\nReport: {paths['markdown']}", soft_wrap=True)
