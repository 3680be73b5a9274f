"""aqnfx opt: run a pipeline of passes and print the graph."""

from __future__ import annotations

from pathlib import Path

import typer

from aqnfx.cli.common import MISSING_HELP, words


def command(
    model: str = typer.Argument(help="Local Hugging Face directory, hub id, or tinygsm."),
    allow_missing: str = typer.Option(None, "--allow-missing", help=MISSING_HELP),
    pipeline: str = typer.Option("tag-layers,tag-ops", "--pipeline", "-p", help="Passes: name{option=value …},name…"),
    print_graph: bool = typer.Option(False, "--print", help="Print the rewritten graph."),
    out: Path = typer.Option(None, "--out", help="Write the rewritten graph's text to this file."),
) -> None:
    """Run graph passes on a model, like mlir-opt: every step is verified, and shown with what it changed."""
    from aqnfx.artifacts import write_text
    from aqnfx.cli.places import check_outputs, output_directory
    from aqnfx.errors import printable
    from aqnfx.graph.frontend import trace
    from aqnfx.passes.pipeline import Pipeline

    parsed = Pipeline.parse(pipeline)  # a typing error should not cost a trace
    if out is not None:
        check_outputs([out], {}, model=model)
    with output_directory(out.parent if out is not None else None):
        program = parsed(trace(model, allow_missing=words(allow_missing)))
        text = program.render(tags=True)
        if out is not None:
            write_text(out, text)
    if print_graph:
        print("\n".join(map(printable, text.split("\n"))), end="")
    for step in program.history:
        changes = ", ".join(f"{n:+d} {name}" for name, n in step.op_diff.items()) or "no change in operations"
        print(f"# {printable(str(step.spec))}: {changes} ({step.seconds:.2f} s)")
    print(f"# fingerprint {program.fingerprint[:16]}")
