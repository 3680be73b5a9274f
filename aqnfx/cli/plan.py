"""aqnfx plan: the precision of every part of a model under a budget, predicted and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from aqnfx.errors import InputError, Interrupted


def command(
    model: str = typer.Argument(help="Local Hugging Face directory, hub id, or tinygsm."),
    data: Path = typer.Option(..., "--data", help="JSON lines, parquet or plain text.", show_default=False),
    formats: str = typer.Option("int4:g32,int8:g32", help="Menu for weights, or weights/inputs: mxfp4/mxfp8_e4m3,keep/keep."),
    avg_bits: float = typer.Option(None, help="Budget: bits per planned weight, scales included."),
    total_bytes: str = typer.Option(None, "--bytes", help="Budget: size of the planned weights, as 12MiB."),
    seconds: float = typer.Option(None, help="Budget: time by --latency-table."),
    max_kl: float = typer.Option(None, help="Smallest size that keeps the predicted KL below, in nats per token."),
    nominal: bool = typer.Option(False, "--nominal", help="Do not count scales into bits and bytes."),
    kv_formats: str = typer.Option(None, help="Menu for keys and values, with --kv-bits."),
    kv_bits: float = typer.Option(None, help="Budget of keys and values: bits per value, scales included."),
    latency_table: Path = typer.Option(None, help="JSON: module or '*' -> choice -> seconds."),
    modules: str = typer.Option(None, help="Globs of module names to plan (default: every linear layer and expert)."),
    layers: str = typer.Option(None, help="Layers to plan: 0-4,7 (default: all)."),
    keep: list[str] = typer.Option([], "--keep", help="MODULE=FORMAT that is not in question; MODULE may be a glob."),
    floor: list[str] = typer.Option([], "--floor", help="LAYER=BITS: least bits of a layer's weights, without scales."),
    couple: str = typer.Option("none", help="none, or fused: weights that runtimes multiply together get one choice."),
    partial: str = typer.Option("refuse", "--partial-groups", help="Blocks that do not divide a layer: refuse, pad or drop."),
    active_experts: bool = typer.Option(False, "--active-experts", help="Count experts by the share that a token uses."),
    pareto: int = typer.Option(0, help="Also the best plans at this many budgets, from the same costs."),
    refine: bool = typer.Option(True, help="Improve on the additive optimum where held-out draws agree."),
    draws: int = typer.Option(8, help="Projection draws per sample."),
    samples: int = typer.Option(32, help="Samples that choose."),
    eval_samples: int = typer.Option(64, help="Other samples that judge the plan; 0: do not measure it."),
    task: str = typer.Option(None, help="kl, nll, top1_agreement, exact_match (default: by the data)."),
    batch_size: int = typer.Option(8, help="Samples per forward pass."),
    max_length: int = typer.Option(None, help="Tokens per sample (default: 256, or what the model takes)."),
    text_field: str = typer.Option(None, help="Field that holds the text of a record."),
    pack: bool = typer.Option(True, help="Join plain texts into full-length samples."),
    device: str = typer.Option("cpu", help="Device to run on."),
    dtype: str = typer.Option("float32", help="What the model is loaded in: float32, bfloat16 or float16."),
    seed: int = typer.Option(0, help="Seed of the draws."),
    out: Path = typer.Option(None, "--out", help="File for the plan, plan.json; a report stands beside it as plan.md."),
    json_output: bool = typer.Option(False, "--json", help="Print the plan as JSON and nothing else."),
) -> None:
    """Choose a number format for every linear layer under a budget, and measure the plan on samples that chose nothing."""
    import json
    import warnings

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from aqnfx.cli.session import keep_freed_memory
    from aqnfx.planning.options import parse_latency, parse_pairs
    from aqnfx.planning.planner import plan
    from aqnfx.reporting.artifacts import check_output_dir, read_json
    from aqnfx.reporting.plan import print_plan, save_plan

    if not data.exists():
        raise InputError(f"data file {data} does not exist")
    if out is not None:
        if out.is_dir():
            raise InputError(f"--out {out} is a directory; name a file, such as {out / 'plan.json'}")
        check_output_dir(out.parent)
    options: dict[str, Any] = dict(
        formats=formats, avg_bits=avg_bits, bytes=total_bytes, seconds=seconds, max_kl=max_kl, count_scales=not nominal,
        kv_formats=kv_formats, kv_bits=kv_bits, modules=_words(modules), layers="|".join(_words(layers)) or None,
        keep=parse_pairs(keep, "--keep"), floor=_floors(parse_pairs(floor, "--floor")), couple=couple, partial=partial,
        active_experts=active_experts, pareto=pareto, refine=refine, draws=draws, samples=samples, eval_samples=eval_samples,
        task=task, batch_size=batch_size, max_length=max_length, text_field=text_field, pack=pack, device=device, dtype=dtype,
        seed=seed,
    )  # fmt: skip
    if latency_table is not None:
        options["latency_table"] = parse_latency(read_json(latency_table), str(latency_table))
    keep_freed_memory()
    warnings.filterwarnings("ignore", module="torch|transformers")
    console = Console(stderr=json_output)
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("ETA"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=not console.is_terminal, disable=not console.is_terminal) as bar:
        shown = bar.add_task("starting", total=None)
        try:
            found = plan(
                model, data, status=lambda text: bar.reset(shown, description=text, total=None),
                progress=lambda done, total: bar.update(shown, completed=done, total=total), **options,
            )  # fmt: skip
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted; a plan is written as a whole, so there is nothing to resume") from error
    paths = save_plan(found, out) if out is not None else {}
    if json_output:
        print(json.dumps(found.to_record()))
        return
    print_plan(found, console)
    if paths:
        console.print(f"\nPlan: {paths['plan']}\nReport: {paths['markdown']}", soft_wrap=True, markup=False)


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _floors(given: dict[str, str]) -> dict[str, float]:
    try:
        return {layer: float(bits) for layer, bits in given.items()}
    except ValueError as error:
        raise InputError(f"--floor: {error}; write LAYER=BITS, as 0=8") from error
