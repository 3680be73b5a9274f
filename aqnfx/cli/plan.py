"""aqnfx plan: the precision of every part of a model under a budget, or by a map, predicted and measured."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer

from aqnfx.cli.common import MISSING_HELP, words
from aqnfx.errors import InputError, Interrupted, nearest


def command(
    context: typer.Context,
    model: str = typer.Argument(help="Local Hugging Face directory, hub id, or tinygsm."),
    data: Path = typer.Option(None, "--data", help="JSON lines, CSV, parquet or plain text; needed for a plan under a budget."),
    formats: str = typer.Option(
        None, help="Menu for weights, or weights/inputs: mxfp4/mxfp8_e4m3,keep/keep (default: int4:g32,int8:g32; for --rule "
        "threshold fp16,int8,int4:g32)."
    ),
    rule: str = typer.Option("optimal", help="optimal: the least KL under a budget; threshold: by the degradation in --map."),
    map: Path = typer.Option(None, "--map", help="sensitivity_map.json: of --rule threshold, --migration; else for reasons."),
    thresholds: str = typer.Option("0.15,0.05", help="Of --rule threshold: degradations for the first and the second format."),
    migration: bool = typer.Option(False, "--migration", help="No formats: list from --map what to validate first."),
    divergences: Path = typer.Option(None, help="JSON of relative errors seen elsewhere, for --migration."),
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
    refine: bool = typer.Option(True, help="Improve on the additive optimum where other draws agree (not with --max-kl)."),
    draws: int = typer.Option(4, help="Projection draws per sample."),
    samples: int = typer.Option(32, help="Samples that choose."),
    eval_samples: int = typer.Option(64, help="Other samples that judge the plan; 0: do not measure it."),
    batch_size: int = typer.Option(8, help="Samples per forward pass."),
    max_length: int = typer.Option(None, help="Tokens per sample (default: 256, or what the model takes)."),
    text_field: str = typer.Option(None, help="Field that holds the text of a record."),
    pack: bool = typer.Option(True, help="Join plain texts into full-length samples."),
    device: str = typer.Option("cpu", help="Device to run on."),
    dtype: str = typer.Option("float32", help="What the model is loaded in: float32, bfloat16 or float16."),
    allow_missing: str = typer.Option(None, "--allow-missing", help=MISSING_HELP),
    seed: int = typer.Option(0, help="Seed of the draws."),
    out: Path = typer.Option(None, "--out", help="File for the plan, plan.json; a report stands beside it as plan.md."),
    json_output: bool = typer.Option(False, "--json", help="Print the plan as JSON and nothing else."),
) -> None:
    """Choose a number format for every linear layer under a budget, and measure the plan on samples that chose nothing.

    With --rule threshold a sensitivity map chooses; with --migration it becomes a list of what to validate first.
    """
    import json
    import warnings

    from aqnfx.artifacts import read_json
    from aqnfx.cli.migration import migrate
    from aqnfx.cli.places import check_outputs, output_directory
    from aqnfx.cli.session import keep_freed_memory
    from aqnfx.cli.terminal import Terminal, progress_bar
    from aqnfx.planning.options import PlanOptions, parse_latency, parse_pairs
    from aqnfx.planning.planner import plan
    from aqnfx.planning.threshold import FORMATS, threshold_plan
    from aqnfx.reporting.plan import print_plan, save_plan
    from aqnfx.reporting.report import load_map

    _check_together(context, rule=rule, migration=migration, map=map, data=data, divergences=divergences)
    if out is not None and os.path.isdir(out):
        name = "migration.json" if migration else "plan.json"
        raise InputError(f"--out {out} is a directory; name a file, such as {out / name}")
    if out is not None and out.suffix in (".md", ".svg"):
        raise InputError(f"--out {out} is where the report or its picture goes; name the JSON file: {out.with_suffix('.json')}")
    if out is not None:
        beside = [out.with_suffix(".md"), *([out.with_suffix(".svg")] if pareto else [])]
        read = {"--data": data, "--map": map, "--divergences": divergences, "--latency-table": latency_table}
        check_outputs([out, *beside], read, model=model)
    if migration:
        migrate(model, map, divergences, allow_missing=words(allow_missing), out=out, json_output=json_output)
        return
    options: dict[str, Any] = dict(
        formats=formats, avg_bits=avg_bits, bytes=total_bytes, seconds=seconds, max_kl=max_kl, count_scales=not nominal,
        kv_formats=kv_formats, kv_bits=kv_bits, modules=words(modules), layers="|".join(words(layers)) or None,
        keep=parse_pairs(keep, "--keep"), floor=_floors(parse_pairs(floor, "--floor")), couple=couple, partial=partial,
        active_experts=active_experts, pareto=pareto, refine=refine, draws=draws, samples=samples, eval_samples=eval_samples,
        batch_size=batch_size, max_length=max_length, text_field=text_field, pack=pack, device=device, dtype=dtype,
        seed=seed, allow_missing=words(allow_missing), rule=rule, thresholds=_pair(thresholds),
    )  # fmt: skip
    if latency_table is not None:
        options["latency_table"] = parse_latency(read_json(latency_table), str(latency_table))
    PlanOptions(**options)  # before anything is loaded
    smap = load_map(map) if map is not None else None
    if smap is not None and rule == "threshold":
        options |= {"formats": words(formats) or FORMATS}
        del options["rule"]  # is what is called
    keep_freed_memory()
    warnings.filterwarnings("ignore", module="torch|transformers")
    console = Terminal(stderr=json_output)
    bars = progress_bar(console, transient=not console.is_terminal)
    with output_directory(out.parent if out is not None else None), bars as bar:
        shown = bar.add_task("starting", total=None)
        options |= {
            "status": lambda text: bar.reset(shown, description=text, total=None),
            "progress": lambda done, total: bar.update(shown, completed=done, total=total),
        }
        try:
            if smap is not None and rule == "threshold":
                found = threshold_plan(model, smap, data, **options)
            else:
                found = plan(model, data, smap=smap, **options)
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted; a plan is written as a whole, so there is nothing to resume") from error
        paths = save_plan(found, out) if out is not None else {}
    if json_output:
        print(json.dumps(found.to_record()))
        return
    print_plan(found, console)
    if paths:
        console.print(f"\nPlan: {paths['plan']}\nReport: {paths['markdown']}", soft_wrap=True)


_OF_MIGRATION = ("model", "allow_missing", "map", "migration", "divergences", "out", "json_output")


def _check_together(
    context: typer.Context, *, rule: str, migration: bool, map: Path | None, data: Path | None, divergences: Path | None
) -> None:
    """Refuse what has no meaning together: a flag that would be read by nothing hides a mistake."""
    from aqnfx.cli.session import check_data
    from aqnfx.planning.options import RULES

    flags = {parameter.name: max(parameter.opts, key=len) for parameter in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name: flags[name] for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    if migration:
        if others := [flag for name, flag in given.items() if name not in _OF_MIGRATION]:
            raise InputError(f"--migration reads a map and chooses no formats; leave out {others[0]}")
    elif divergences is not None:
        raise InputError("--divergences is for --migration")
    if map is None and (migration or rule == "threshold"):
        what = "--migration" if migration else "--rule threshold"
        raise InputError(f"{what} needs --map sensitivity_map.json; aqnfx diagnose MODEL --data FILE makes one")
    if rule not in RULES:
        raise InputError(f"rule {rule!r} is not one of {', '.join(RULES)}{nearest(rule, RULES)}")
    if "thresholds" in given and rule != "threshold":
        raise InputError("--thresholds is for --rule threshold")
    if data is None and (map is None or rule == "optimal") and not migration:
        raise InputError("a plan under a budget needs --data FILE")
    if data is not None:
        check_data(data)


def _pair(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in words(text))
    except ValueError as error:
        raise InputError(f"--thresholds {text!r} are not two numbers, as 0.15,0.05") from error


def _floors(given: dict[str, str]) -> dict[str, float]:
    try:
        return {layer: float(bits) for layer, bits in given.items()}
    except ValueError as error:
        raise InputError(f"--floor: {error}; write LAYER=BITS, as 0=8") from error
