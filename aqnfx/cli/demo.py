"""aqnfx demo: the main job on the embedded model."""

from __future__ import annotations

from pathlib import Path

import typer


def command(
    out: Path = typer.Option(Path("aqnfx-out/demo"), "--out", help="Directory for the artifacts."),
    samples: int = typer.Option(24, help="Word problems to measure on."),
    seeds: int = typer.Option(2, help="Number of noise seeds."),
    compile_mode: str = typer.Option("auto", "--compile", help="auto, yes or no."),
) -> None:
    """Diagnose the embedded 16-layer model on its word problems: under 3 minutes on two cores."""
    from aqnfx.cli.session import run_session
    from aqnfx.data import embedded_problems

    # Noise of 0.2 is beyond second order for this model, so predictions would not help: everything is measured.
    options = dict(
        levels=(0.1, 0.2), base_level=0.2, samples=samples, seeds=seeds, compile=compile_mode, batch_size=32,
        method="measure", step=2,
    )  # fmt: skip
    run_session("tinygsm", embedded_problems(), options, out=out, resume=False, json_output=False, fresh=True)
