"""aqnfx diagnose: the main job. A model and data in, a sensitivity map with error bars out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import typer

from aqnfx.cli.common import MISSING_HELP, words
from aqnfx.errors import InputError


def _numbers(text: str | None, kind: type, option: str) -> tuple[Any, ...] | None:
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in str(text).split(",") if part.strip())
    except ValueError as error:
        raise InputError(f"{option} {text!r} is not a list of numbers such as 0.01,0.05,0.1") from error


def _config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the values of a YAML file as defaults of the flags, which go first."""
    if path is not None:
        from aqnfx.cli.config import read_config

        types = {name: kind for name, kind in get_type_hints(command).items() if name not in ("config", "return")}
        context.default_map = {**(context.default_map or {}), **read_config(path, types)}
    return path


def command(
    model: str = typer.Argument(help="Local Hugging Face directory, hub id, or tinygsm."),
    data: Path = typer.Option(..., "--data", help="JSON lines, CSV, parquet or plain text.", show_default=False),
    levels: str = typer.Option(None, help="Noise levels (default: 0.01,0.05,0.1; with --perturb 1)."),
    base_level: float = typer.Option(None, help="Level that rankings are read at (default: the middle one)."),
    window: int = typer.Option(None, help="Layers per window (default: 3, or all of fewer layers)."),
    step: int = typer.Option(1, help="Layers between window starts."),
    samples: int = typer.Option(100, help="Samples to measure on."),
    seeds: int = typer.Option(None, help="Number of noise seeds (default: 3; with --perturb 1)."),
    seed: int = typer.Option(0, help="First noise seed."),
    ops: str = typer.Option("extended", help="Operator kinds: core, extended, all, or linear,softmax,…"),
    layers: str = typer.Option(None, help="Layers: 0-4,7 (default: all)."),
    task: str = typer.Option(None, help="kl, nll, top1_agreement, exact_match or generate (default: by the data)."),
    max_new_tokens: int = typer.Option(None, help="Most tokens of an answer (task generate; default: by the data)."),
    stop: list[str] = typer.Option(None, help="Text that ends an answer, \\n for a new line; repeatable (default: \\nQ:)."),
    noise: str = typer.Option("relative_gaussian", help="Kind of noise."),
    perturb: str = typer.Option(None, help="Number format whose error takes the place of noise: mxfp4, int8:token, …"),
    roles: str = typer.Option(None, help="What is perturbed: output, input, weight, key, value, other or auto."),
    probes: str = typer.Option("operator,layer,window,all", help="What to probe; also: site."),
    method: str = typer.Option("both", help="predict, measure or both."),
    draws: int = typer.Option(8, help="Projection draws of the prediction."),
    checkpoint: bool = typer.Option(False, "--checkpoint", help="Predict with block boundaries kept only: less memory."),
    metric: str = typer.Option(None, help="Also per weight: fisher-trace or hessian-trace."),
    outlier_threshold: float = typer.Option(10.0, help="Magnitude of an outlier channel, in medians (with predictions)."),
    compile_mode: str = typer.Option("auto", "--compile", help="auto, yes or no."),
    replay_memory: str = typer.Option("2GiB", help="Most memory for what is kept of a clean run."),
    replay_offload: bool = typer.Option(False, "--replay-offload", help="Keep it in the host's memory."),
    batch_size: int = typer.Option(32, help="Samples per forward pass."),
    max_length: int = typer.Option(None, help="Tokens per sample (default: 256, or what the model takes)."),
    text_field: str = typer.Option(None, help="Field that holds the text of a record."),
    pack: bool = typer.Option(True, help="Join plain texts into full-length samples."),
    device: str = typer.Option("cpu", help="Device to run on; auto: layer by layer over all accelerators."),
    dtype: str = typer.Option("float32", help="What the model is loaded in: float32, bfloat16 or float16."),
    allow_missing: str = typer.Option(None, "--allow-missing", help=MISSING_HELP),
    adaptive: bool = typer.Option(False, "--adaptive", help="Stop sampling what is settled."),
    budget: str = typer.Option(None, help="Time for measuring: 90s, 10m, 2h (implies --adaptive)."),
    executor: str = typer.Option("process", help="Where to measure: process, devices, ray or ray://HOST:PORT."),
    workers: int = typer.Option(None, help="Workers of devices or ray (default: all there are)."),
    out: Path = typer.Option(Path("aqnfx-out"), "--out", help="Directory for the artifacts."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print what would be done and about how long it takes."),
    resume: bool = typer.Option(False, "--resume", help="Continue the unfinished run in --out."),
    json_output: bool = typer.Option(False, "--json", help="Print the sensitivity map as JSON and nothing else."),
    config: Path = typer.Option(
        None, "--config", help="YAML file with values for these options.", is_eager=True, callback=_config
    ),
) -> None:
    """Measure what noise does to a language model: per operator kind, per layer, per window, with error bars."""
    from aqnfx.cli.session import run_forecast, run_session

    options: dict[str, Any] = dict(
        levels=_numbers(levels, float, "--levels"), base_level=base_level, window=window, step=step, samples=samples,
        seeds=seeds, seed=seed, ops=ops, layers=layers, task=task,
        max_new_tokens=max_new_tokens, stop=tuple(t.replace("\\n", "\n") for t in stop) if stop else None,
        noise=noise, perturb=perturb, roles=roles,
        probes=tuple(p.strip() for p in probes.split(",") if p.strip()), method=method, draws=draws,
        checkpoint=checkpoint, metric=metric, outlier_threshold=outlier_threshold,
        compile=compile_mode, replay_memory=replay_memory, replay_offload=replay_offload, batch_size=batch_size,
        max_length=max_length, text_field=text_field, pack=pack, device=device, dtype=dtype, adaptive=adaptive, budget=budget,
        executor=executor, workers=workers, allow_missing=words(allow_missing),
    )  # fmt: skip
    if dry_run:
        return run_forecast(model, data, options, json_output=json_output)
    run_session(model, data, options, out=out, resume=resume, json_output=json_output)
