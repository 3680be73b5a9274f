"""diagnose(): a model and data go in, a sensitivity map with error bars comes out."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import aqnfx
from aqnfx.diagnosis.interpret import interpret
from aqnfx.diagnosis.sensitivity import SensitivityMap
from aqnfx.errors import InputError, ModelError
from aqnfx.graph.frontend import EMBEDDED, load_model, model_digest, trace
from aqnfx.graph.program import Program
from aqnfx.graph.selector import Selector
from aqnfx.graph.tags import static_size
from aqnfx.passes.pipeline import Pipeline
from aqnfx.probes.compile_choice import what_to_compile
from aqnfx.probes.data import Batch, Encoded, data_digest, make_batches
from aqnfx.probes.journal import Journal, recorded_identity
from aqnfx.probes.measure import Forward, Progress, Sweep, compiled_forward, eager_forward, is_causal, measure
from aqnfx.probes.measurements import Measurements, ProbeKind
from aqnfx.probes.plan import plan_probes
from aqnfx.probes.samples import load_samples, load_tokenizer
from aqnfx.probes.tasks import accuracy_like

DEFAULT_LEVELS = (0.01, 0.05, 0.1)
DEFAULT_MAX_LENGTH = 256
# What is compiled, as artifacts say it -> (the graph, the noise kernel).
_COMPILED = {"none": (False, False), "noise kernel": (False, True), "graph": (True, True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to diagnose and how; the command line's flags of the same names.

    ``ops`` and ``layers`` are selector values (``core``, ``linear|softmax``; ``0-4|7``); ``seeds`` is a count, the
    seeds are ``seed``, ``seed`` + 1, …; ``base_level`` defaults to the middle level; ``compile`` is "yes" (Inductor
    for the whole graph), "no" (PyTorch operations one by one), or "auto" (compile what pays for the projected work).
    ``probes`` are kinds of :data:`aqnfx.probes.plan.PROBE_KINDS`.
    """

    levels: tuple[float, ...] = DEFAULT_LEVELS
    base_level: float | None = None
    window: int = 3
    step: int = 1
    samples: int = 100
    seeds: int = 3
    seed: int = 0
    ops: str = "extended"
    layers: str | None = None
    task: str | None = None
    noise: str = "relative_gaussian"
    probes: tuple[ProbeKind, ...] = ("operator", "layer", "window", "all")
    compile: str = "auto"
    batch_size: int = 32
    max_length: int = DEFAULT_MAX_LENGTH
    text_field: str | None = None
    pack: bool = True
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.compile not in ("auto", "yes", "no"):
            raise InputError(f"compile {self.compile!r} is not one of auto, yes, no")
        for name in ("samples", "seeds", "batch_size", "window", "step"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} must be at least 1")
        if not self.levels:
            raise InputError("levels are empty; give for example 0.01,0.05,0.1")

    @property
    def base(self) -> float:
        """The level that ``per_operator`` and ``per_layer`` are read at."""
        return self.base_level if self.base_level is not None else sorted(self.levels)[len(self.levels) // 2]

    @property
    def where(self) -> str:
        """The selector of the probed sites."""
        parts = [f"ops:{self.ops.replace(',', '|')}"]
        return ",".join(parts + ([f"layers:{self.layers.replace(',', '|')}"] if self.layers else []))


def diagnose(
    model: nn.Module | Program | str | Path,
    data: str | Path | Sequence[str | Mapping[str, str]],
    *,
    tokenizer: Any = None,
    journal: str | Path | None = None,
    progress: Progress | None = None,
    status: Any = None,
    **options: Any,
) -> SensitivityMap:
    """Measure what noise does to a language model and return its sensitivity map.

    ``model`` is what :func:`aqnfx.trace` takes, or a Program; ``data`` a JSON-lines, parquet or text file, or a
    sequence of texts or records. ``tokenizer`` defaults to the one saved with the model. ``journal`` is a file that
    keeps finished work: a run with the same arguments continues it. ``progress(done, total)`` and ``status(text)`` are
    called as the work goes on. ``options`` are the fields of :class:`Options`. An interrupted run returns the map of
    what is finished, with ``partial`` set. Raises subclasses of :class:`~aqnfx.errors.AqnfxError` for bad input.
    """
    return interpret(
        run(model, data, Options(**options), tokenizer=tokenizer, journal=journal, progress=progress, status=status)
    )


def run(
    model: nn.Module | Program | str | Path,
    data: str | Path | Sequence[str | Mapping[str, str]],
    options: Options,
    *,
    tokenizer: Any = None,
    journal: str | Path | None = None,
    progress: Progress | None = None,
    status: Any = None,
) -> Measurements:
    """Do the measuring part of :func:`diagnose` and return the raw scores."""
    tell = status or (lambda _text: None)
    selector = Selector.parse(options.where)  # before the slow part, so that a typing error costs nothing
    _check_device(options.device)
    tell("loading the model")
    name = str(model) if isinstance(model, (str, Path)) else _origin(model)
    if isinstance(model, (str, Path)):
        model = load_model(str(model), device=options.device)
    tell("reading the data")
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(_named(name))
    encoded, notes, task = _samples(data, tokenizer, options, _max_length(model, options))
    tell("tracing")
    longest = max(len(e.input_ids) for e in encoded)
    program = model if isinstance(model, Program) else _trace(model, longest)
    prepared = Pipeline.parse(f'tag-layers,decompose-attention{{where="{options.where}"}},tag-ops')(program)
    probes = plan_probes(prepared, selector, kinds=options.probes, window=options.window, step=options.step)
    seeds = tuple(range(options.seed, options.seed + options.seeds))
    sweep = Sweep(probes=probes, levels=options.levels, seeds=seeds, base_level=options.base, task=task)
    tell("preparing")
    if not is_causal(prepared, (encoded[0].input_ids * longest)[: _fixed_length(prepared) or longest]):
        if task in ("nll", "exact_match"):
            raise ModelError(
                f"task {task} needs a causal language model; this one sees later tokens; use kl or top1_agreement"
            )
        notes = (*notes, "the model is not causal: KL and agreement are over all positions, NLL means nothing")
    fixed = longest if options.compile == "yes" or _fixed_length(prepared) else None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def batches(length: int | None) -> list[Batch]:
        size = min(options.batch_size, len(encoded))
        return [b.to(options.device) for b in make_batches(encoded, batch_size=size, pad_id=pad, fixed_length=length)]

    work = batches(fixed)
    earlier = recorded_identity(Path(journal)).get("compile") if journal is not None else None
    if options.compile == "auto" and earlier in _COMPILED:  # the choice depends on timing, and a run must not mix them
        graph, kernel = _COMPILED[earlier]
    else:
        graph, kernel = what_to_compile(prepared, sweep, work, options.compile)
    compiled = next(name for name, parts in _COMPILED.items() if parts == (graph, kernel))
    if graph and fixed is None:
        work = batches(longest)
    insert = Pipeline.parse(
        f'insert-noise{{where="{options.where}" kind={options.noise} compiled={str(kernel).lower()}}}'
    )
    noisy = insert(prepared)
    tell("compiling" if graph or kernel else "measuring")
    forward: Forward = compiled_forward(noisy) if graph else eager_forward(noisy)
    identity = _identity(noisy, encoded, sweep, options) | {"compile": compiled}
    source = {k: v for k, v in noisy.source.items() if k not in ("trace_seconds", "origin")}
    facts = identity["versions"] | {
        "device": options.device, "dtype": noisy.source.get("dtype"), "threads": torch.get_num_threads(),
        "platform": platform.machine(), "trace_seconds": noisy.source.get("trace_seconds"),
        "model": {**source, "digest": identity["model"], "layers": len(noisy.layers), "sites": len(noisy.sites)},
        "data": {"path": Path(data).name if isinstance(data, (str, Path)) else "(values)", "digest": identity["data"],
                 "samples": len(encoded), "max_length": max(len(e.input_ids) for e in encoded), "notes": list(notes)},
        "pipeline": noisy.pipeline, "compile": compiled,
        "notes": [*noisy.notes, *notes], "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    keep = Journal(Path(journal), identity) if journal is not None else None
    try:
        return measure(
            noisy, forward, work, sweep, journal=keep, progress=progress, noise_kind=options.noise, provenance=facts
        )
    finally:
        if keep is not None:
            keep.__exit__(None, None, None)


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error


def _origin(model: nn.Module | Program) -> str:
    """Return where a model came from, to find its tokenizer by; empty for a model that was made in memory."""
    if not isinstance(model, Program):
        return str(getattr(model, "name_or_path", ""))
    origin = str(model.source.get("origin", ""))
    return origin if origin == EMBEDDED or "/" in origin or Path(origin).is_dir() else ""


def _named(name: str) -> str:
    if not name:
        raise InputError(
            "the model does not say where it was loaded from, so its tokenizer cannot be found; pass tokenizer="
        )
    return name


def _max_length(model: nn.Module | Program, options: Options) -> int:
    config = getattr(model, "config", None)
    source = model.source if isinstance(model, Program) else {}
    limit = source.get("max_positions") or getattr(config, "max_position_embeddings", None) or options.max_length
    if options.max_length > limit and options.max_length != DEFAULT_MAX_LENGTH:
        raise InputError(f"max_length {options.max_length} asked; the model takes at most {limit} positions")
    return min(options.max_length, limit)


def _samples(
    data: str | Path | Sequence[str | Mapping[str, str]], tokenizer: Any, options: Options, max_length: int
) -> tuple[tuple[Encoded, ...], tuple[str, ...], str]:
    """Encode the samples; the default task is exact_match where the data has answers, else kl."""
    encoded, notes = load_samples(
        data, tokenizer, samples=options.samples, max_length=max_length, task=options.task or "kl",
        text_field=options.text_field, pack=options.pack,
    )  # fmt: skip
    answers = all(e.answer is not None for e in encoded)
    task = options.task or ("exact_match" if answers else "kl")
    accuracy_like(task, answers)
    if options.task is None and not answers and any(e.answer is not None for e in encoded):
        notes = (*notes, "some samples have no whole answer, so the task is kl; ask for exact_match to leave them out")
    return encoded, notes, task


def _trace(model: nn.Module, longest: int) -> Program:
    """Trace; a model whose forward fixes the sequence length is traced at the length of the data."""
    program = trace(model)
    fixed = _fixed_length(program)
    return program if fixed in (None, longest) else trace(model, sequence_length=longest)


def _fixed_length(program: Program) -> int | None:
    """Return the sequence length that the model's forward fixes, or None."""
    inputs = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"]
    lengths = [static_size(v.shape[1]) for v in inputs if v.dim() > 1]
    return next((size for size in lengths if isinstance(size, int)), None)


def _identity(program: Program, encoded: Sequence[Encoded], sweep: Sweep, options: Options) -> dict[str, Any]:
    """What makes two runs the same: a journal is continued only if all of this is equal."""
    import transformers

    return {
        "versions": {"aqnfx": aqnfx.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "model": model_digest(program), "graph": program.original, "data": data_digest(encoded),
        "pipeline": program.pipeline, "levels": list(sweep.levels), "seeds": list(sweep.seeds), "task": sweep.task,
        "probes": [[p.kind, p.key, len(p.sites)] for p in sweep.probes], "batch_size": options.batch_size,
        "device": options.device,
    }  # fmt: skip
