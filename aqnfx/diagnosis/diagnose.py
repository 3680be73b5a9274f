"""diagnose(): a model and data go in, a sensitivity map with error bars comes out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import aqnfx
from aqnfx.diagnosis.activations import capture_on
from aqnfx.diagnosis.interpret import interpret
from aqnfx.diagnosis.options import Options
from aqnfx.diagnosis.probe_choice import (
    CHECKS,
    SPOT_CHECKS,
    PreparedProbes,
    asked_probes,
    choose_probes,
    prepare_probes,
)  # fmt: skip
from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.diagnosis.statistics.thresholds import confirm
from aqnfx.diagnosis.workers import Recipe, instrument
from aqnfx.errors import InputError, ModelError
from aqnfx.graph.frontend import model_digest
from aqnfx.graph.opkinds import OpKind
from aqnfx.graph.program import Program
from aqnfx.passes.decompose_attention import DecomposeAttention
from aqnfx.passes.insert_capture import InsertCapture
from aqnfx.passes.insert_score import InsertScore
from aqnfx.passes.perturbing import HAS_KERNEL
from aqnfx.passes.pipeline import Pipeline
from aqnfx.passes.tag_ops import TagOps
from aqnfx.probes.adaptive import StoppingRule
from aqnfx.probes.capture import Captures, collect
from aqnfx.probes.compile_choice import COMPILED, what_to_compile
from aqnfx.probes.data.batches import Batch, data_digest
from aqnfx.probes.data.examples import Data
from aqnfx.probes.executors import Executor, Threads, accelerators
from aqnfx.probes.forward import eager_forward
from aqnfx.probes.journal import Journal, recorded_identity
from aqnfx.probes.measure import Progress, Sweep, measure
from aqnfx.probes.measurements import Measurements, Probe
from aqnfx.probes.predict import Predictions, predict
from aqnfx.probes.ray_executor import RayExecutor, identity_of
from aqnfx.probes.recompute import checkpointed
from aqnfx.probes.tasks import METRICS
from aqnfx.probes.traces import WeightTrace, fisher_traces, hessian_traces

if TYPE_CHECKING:
    from aqnfx.live.generation import Generator


def diagnose(
    model: nn.Module | Program | str | Path,
    data: Data,
    *,
    tokenizer: Any = None,
    calibration: Data | None = None,
    journal: str | Path | None = None,
    progress: Progress | None = None,
    status: Any = None,
    **options: Any,
) -> SensitivityMap:
    """Predict and measure what noise does to a language model and return its sensitivity map.

    ``model`` is what :func:`aqnfx.trace` takes, or a Program; ``data`` a JSON-lines, CSV, parquet or text file, or texts
    or records in a list, a ``datasets.Dataset``, a table, a generator; ``calibration`` (default: ``data``) is what
    activation statistics are read on where there are predictions. ``tokenizer`` defaults to the one saved with the model.
    ``journal`` is a file that keeps finished work: a run with the same arguments continues it. ``progress(done, total)``
    and ``status(text)`` are
    called as the work goes on. ``options`` are the fields of :class:`~aqnfx.diagnosis.options.Options`. An interrupted
    run returns the map of what is finished, with ``partial`` set. Raises subclasses of
    :class:`~aqnfx.errors.AqnfxError` for bad input.
    """
    wanted = Options(**options)
    found = run(
        model, data, wanted, tokenizer=tokenizer, calibration=calibration, journal=journal, progress=progress,
        status=status,
    )  # fmt: skip
    return interpret(found, outlier_threshold=wanted.outlier_threshold)


def run(
    model: nn.Module | Program | str | Path,
    data: Data,
    options: Options,
    *,
    tokenizer: Any = None,
    calibration: Data | None = None,
    journal: str | Path | None = None,
    progress: Progress | None = None,
    status: Any = None,
) -> Measurements:
    """Do the predicting and measuring part of :func:`diagnose` and return the raw scores."""
    tell, began = status or (lambda _text: None), time.perf_counter()
    if calibration is not None and options.method == "measure":
        raise InputError("calibration data is for activation statistics, which --method measure does not read; leave it out")
    ready = prepare_probes(model, data, options, tokenizer=tokenizer, tell=tell)
    with _answers(ready, options) as answers:  # what cannot generate is refused before anything slow
        return _run(model, data, ready, options, answers, calibration, journal, progress, tell, began)


def _run(
    model: nn.Module | Program | str | Path, data: Data, ready: PreparedProbes, options: Options, answers: Generator | None,
    calibration: Data | None, journal: str | Path | None, progress: Progress | None, tell: Any,
    began: float,
) -> Measurements:  # fmt: skip
    costs = dict[str, Any]()
    predictions, captures, probes = None, None, ready.probes
    if options.method != "measure":
        tell("predicting")
        # Recomputed blocks would count their activations again and again.
        together = calibration is None and not options.checkpoint
        predictions, captures = _predict(ready, options, progress, together)
        if not together:
            tell("reading activations")
            captures = dataclasses.replace(capture_on(calibration, ready, options), gradients=captures.gradients)
            costs["activations"] = {k: captures.provenance[k] for k in ("passes", "seconds")}
        counts = SPOT_CHECKS if options.method == "predict" else CHECKS
        candidates = dict.fromkeys((*ready.probes, *asked_probes(ready.program, options, kinds=("site",))[0]))
        probes = choose_probes(tuple(candidates), predictions, options.base, counts, seed=options.seed)
        probes = _recorded_probes(tuple(candidates), journal, options) or probes
    seeds = tuple(range(options.seed, options.seed + options.seeds))
    sweep = Sweep(probes=probes, levels=options.levels, seeds=seeds, base_level=options.base, task=ready.task)
    work = ready.batches(options)
    earlier = recorded_identity(Path(journal)).get("compile") if journal is not None else None
    if options.compile == "auto" and earlier in COMPILED:  # the choice depends on timing, and a run must not mix them
        compiled = earlier
    else:
        compiled = what_to_compile(ready.program, sweep, work, options.compile, kernel=HAS_KERNEL[options.perturbation.kind])
    noisy, engine, work = instrument(ready, options, sweep, compiled)
    recipe = Recipe.of(model, ready, options, sweep, compiled) if options.executor != "process" else None
    tell("measuring" if compiled == "none" else "compiling")
    identity = _identity(noisy, ready, sweep, options, work) | {"compile": compiled}
    if answers is not None:
        identity["generate"] = answers.record()
    facts = _facts(noisy, ready, data, identity, options)
    if predictions is not None:
        facts["predict"] = dict(predictions.provenance)
    with contextlib.ExitStack() as stack:
        keep = stack.enter_context(Journal(Path(journal), identity)) if journal is not None else None
        elsewhere = stack.enter_context(executor_for(recipe, noisy, options)) if recipe is not None else None
        found = measure(
            noisy, engine, work, sweep, journal=keep, executor=elsewhere, answers=answers, progress=progress,
            noise_kind=options.kind,
            rule=StoppingRule() if options.adaptive or options.budget else None, seconds=options.budget_seconds,
            provenance=facts,
        )  # fmt: skip
        found = found if ready.causal else _without_next_token(found)
        found = dataclasses.replace(found, captures=captures)
        if not found.complete:
            return dataclasses.replace(found, predictions=predictions, planned=ready.probes if predictions else ())
        if predictions is not None:
            found = dataclasses.replace(found, predictions=predictions, planned=ready.probes)
        started = time.perf_counter()
        try:
            traces = _weight_traces(ready, options, predictions, tell)
        except KeyboardInterrupt:
            return dataclasses.replace(found, complete=False)
        if options.metric is not None:
            costs["metric"] = {"seconds": time.perf_counter() - started}
        found = dataclasses.replace(found, weight_metric=options.metric, weights=traces)
        if options.method != "both" or not options.perturbation.graded:  # the error of a format is what it is
            return _with_costs(found, costs, began)

        runs = []

        def at(probe: Probe, level: float) -> Measurements:
            single = Sweep(probes=(probe,), levels=(level,), seeds=seeds, base_level=level, task=ready.task)
            part = None if keep is None else keep.part(f"confirm {probe.kind} {probe.key} at {level!r}")
            measured = measure(noisy, engine, work, single, journal=part, answers=answers, noise_kind=options.kind)
            runs.append(measured.provenance["runs"])
            return measured

        tell("confirming thresholds")
        started = time.perf_counter()
        confirmed, complete = confirm(found, at)
        costs["confirm"] = {"runs": sum(runs), "seconds": time.perf_counter() - started}
        return _with_costs(dataclasses.replace(found, confirmed=confirmed, complete=complete), costs, began)


def _with_costs(m: Measurements, costs: dict[str, Any], began: float) -> Measurements:
    """Add what each phase beside the sweep took to the provenance, and the seconds of everything together."""
    whole = {**costs, "total_seconds": time.perf_counter() - began}
    return dataclasses.replace(m, provenance={**m.provenance, **whole})


@contextlib.contextmanager
def executor_for(recipe: Recipe, program: Program, options: Options) -> Iterator[Executor]:
    """Yield the executor that the options name: a thread per accelerator of this machine, or a Ray cluster."""
    if options.executor == "devices":
        names = accelerators()
        if not names:
            raise InputError("executor devices was asked, and this machine has no accelerator; leave the option out")
        yield Threads([recipe(name) for name in names[: options.workers or len(names)]])
        return
    gpu = torch.device(options.device).type != "cpu"
    cluster = RayExecutor(
        recipe, identity=identity_of(program), address=options.executor, workers=options.workers, gpu=gpu
    )
    try:
        yield cluster
    finally:
        cluster.close()


@contextlib.contextmanager
def _answers(ready: PreparedProbes, options: Options) -> Iterator[Generator | None]:
    """Yield what answers the questions on the live model, which is given back afterwards; None without that task."""
    if options.task != "generate":
        yield None
        return
    from aqnfx.live.generation import STOP, Generator, most_new_tokens  # loads Dynamo

    new = most_new_tokens(ready.model, ready.encoded, options.max_new_tokens)
    assert ready.model is not None  # or that would have raised
    made = Generator.of(
        ready.model, ready.tokenizer, ready.encoded, pad=ready.pad, where=options.where, noise=options.noise,
        max_new_tokens=new, stop=STOP if options.stop is None else options.stop,
        inner="inductor" if options.compile == "yes" else "eager",
    )  # fmt: skip
    training = ready.model.training
    ready.model.eval()
    try:
        with made.handle:
            yield made
    finally:
        ready.model.train(training)


def _recorded_probes(
    candidates: tuple[Probe, ...], journal: str | Path | None, options: Options
) -> tuple[Probe, ...]:
    """Return the probes that the journal was begun with, where it is one of the same method: a choice must not change."""
    earlier = recorded_identity(Path(journal)) if journal is not None else {}
    if earlier.get("method") != _method(options):
        return ()
    known = {json.dumps(_probe_identity(p)): p for p in candidates}
    recorded = [json.dumps(item) for item in earlier.get("probes", [])]
    return tuple(known[item] for item in recorded) if all(item in known for item in recorded) else ()


def _probe_identity(probe: Probe) -> list[Any]:
    return [probe.kind, probe.key, len(probe.sites)]


def _method(options: Options) -> list[Any]:
    return ["measure"] if options.method == "measure" else [options.method, options.draws]


def _weight_traces(
    ready: PreparedProbes, options: Options, predictions: Predictions | None, tell: Any
) -> tuple[WeightTrace, ...]:
    """Return the classical metric per weight that was asked for."""
    if options.metric is None:
        return ()
    tell(options.metric)
    if options.metric == "hessian-trace" and not ready.causal:
        raise ModelError("hessian-trace is of the next-token loss; this model sees later tokens: use fisher-trace")
    if options.metric == "fisher-trace":
        return fisher_traces(predictions or _predict(ready, options, None, False)[0], ready.program)
    fused = any(site.op == OpKind.SDPA for site in ready.program.sites)
    again = Pipeline([DecomposeAttention(where="ops:softmax"), TagOps()])
    program = again(ready.program) if fused else ready.program  # fused kernels have no second derivative
    return hessian_traces(program, eager_forward(program), ready.batches(options), draws=options.draws, seed=options.seed)


def _predict(
    ready: PreparedProbes, options: Options, progress: Progress | None, captured: bool
) -> tuple[Predictions, Captures]:
    """Predict every site, with statistics of gradients and, if ``captured``, of activations from the same passes.

    The nodes for it are gone when this returns.
    """
    capture = InsertCapture(where=options.where, values=captured, gradients=True, perturb=options.captured)
    score = InsertScore(
        where=options.where, kind=options.kind, samples=len(ready.encoded), draws=options.draws,
        weights=options.metric == "fisher-trace",
    )  # fmt: skip
    scored = Pipeline([capture, score])(ready.program)
    forward = eager_forward(checkpointed(scored) if options.checkpoint else scored)
    batches = ready.batches(options)
    found = predict(scored, forward, batches, draws=options.draws, seed=options.seed, progress=progress)
    return found, collect(scored, samples=len(ready.encoded))


def _without_next_token(m: Measurements) -> Measurements:
    """Drop the scores of the next token: a model that has seen it does not predict it."""
    clean, scores = ({k: v for k, v in part.items() if not METRICS[k].next_token} for part in (m.clean, m.scores))
    return dataclasses.replace(m, clean=clean, scores=scores)


def _identity(
    program: Program, ready: PreparedProbes, sweep: Sweep, options: Options, batches: Sequence[Batch]
) -> dict[str, Any]:
    """What makes two runs the same: a journal is continued only if all of this is equal."""
    import transformers

    return {
        "versions": {"aqnfx": aqnfx.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "model": model_digest(program), "graph": program.original, "data": data_digest(ready.encoded),
        "pipeline": program.pipeline, "levels": list(sweep.levels), "seeds": list(sweep.seeds), "task": sweep.task,
        "probes": [_probe_identity(p) for p in sweep.probes], "method": _method(options), "batch_size": options.batch_size,
        "device": str(ready.device), "batches": [batch.row_offset for batch in batches],  # items are numbered by them
    }  # fmt: skip


def _facts(
    program: Program, ready: PreparedProbes, data: Data, identity: Mapping[str, Any], options: Options
) -> dict[str, Any]:
    """What an artifact records of its run: versions, machine, model, data, pipeline, notes."""
    source = {k: v for k, v in program.source.items() if k not in ("trace_seconds", "origin")}
    return {
        **identity["versions"],
        "device": str(ready.device), "dtype": program.source.get("dtype"), "threads": torch.get_num_threads(),
        "platform": platform.machine(), "trace_seconds": program.source.get("trace_seconds"),
        "model": {
            **source, "digest": identity["model"], "layers": len(program.layers), "sites": len(program.sites),
        },
        "data": {
            "path": Path(data).name if isinstance(data, (str, Path)) else "(values)", "digest": identity["data"],
            "samples": len(ready.encoded), "max_length": ready.longest, "notes": list(ready.notes),
        },
        "pipeline": program.pipeline, "compile": identity["compile"], "notes": list(ready.notes),
        **({"generate": identity["generate"]} if "generate" in identity else {}),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
