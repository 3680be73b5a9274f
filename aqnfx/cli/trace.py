"""aqnfx trace: what a model is made of."""

from __future__ import annotations

import typer

from aqnfx.cli.common import MISSING_HELP, words


def command(
    model: str = typer.Argument(help="Local Hugging Face directory, hub id, or tinygsm."),
    allow_missing: str = typer.Option(None, "--allow-missing", help=MISSING_HELP),
    json_output: bool = typer.Option(False, "--json", help="Print JSON, one record with every site."),
    sites: bool = typer.Option(False, "--sites", help="List every site id."),
) -> None:
    """Trace a model and print its layers × operator kinds, and what could not be attributed to a layer."""
    import json

    from aqnfx.cli.terminal import Terminal
    from aqnfx.graph.frontend import trace
    from aqnfx.passes.pipeline import Pipeline
    from aqnfx.passes.tag_layers import TagLayers
    from aqnfx.passes.tag_ops import TagOps
    from aqnfx.reporting.structure import print_structure, structure_record

    program = Pipeline([TagLayers(), TagOps()])(trace(model, allow_missing=words(allow_missing)))
    if json_output:
        print(json.dumps(structure_record(program)))
        return
    print_structure(program, Terminal(), sites=sites)
