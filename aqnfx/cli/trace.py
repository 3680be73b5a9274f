"""aqnfx trace: what a model is made of."""

from __future__ import annotations

import typer


def command(
    model: str = typer.Argument(help="Local Hugging Face directory, hub id, or tinygsm."),
    json_output: bool = typer.Option(False, "--json", help="Print JSON, one record with every site."),
    sites: bool = typer.Option(False, "--sites", help="List every site id."),
) -> None:
    """Trace a model and print its layers × operator kinds, and what could not be attributed to a layer."""
    import json

    from aqnfx.cli.terminal import Terminal
    from aqnfx.graph.frontend import trace
    from aqnfx.passes.pipeline import Pipeline
    from aqnfx.reporting.structure import structure_record, structure_table

    program = Pipeline.parse("tag-layers,tag-ops")(trace(model))
    record = structure_record(program)
    if json_output:
        print(json.dumps(record))
        return
    console = Terminal()
    console.print(structure_table(program))
    outside = record["unattributed"]
    console.print(
        f"{record['sites_total']} sites in {len(record['layers'])} layers; {sum(outside.values())} outside of all layers"
        f" ({', '.join(f'{n} {region}' for region, n in outside.items()) or 'none'}); traced in {record['trace_seconds']:.1f} s"
    )
    for note in record["notes"]:
        console.print(f"note: {note}")
    if sites:
        for site in record["sites"]:
            console.print(f"{site['id']}  [{site['region']}]", soft_wrap=True)
