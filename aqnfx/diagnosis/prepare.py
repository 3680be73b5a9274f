"""From a model and data to a tagged program and its samples: what measuring and predicting share."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from aqnfx.data import EMBEDDED
from aqnfx.diagnosis.options import DEFAULT_MAX_LENGTH, DEFAULT_WINDOW, Options
from aqnfx.errors import InputError, ModelError
from aqnfx.graph.controls import device_of
from aqnfx.graph.lengths import serves, trace_for
from aqnfx.graph.loading import SPREAD, load_model
from aqnfx.graph.program import Program
from aqnfx.graph.selector import Selector
from aqnfx.graph.tags import static_size
from aqnfx.graph.wrappers import unwrap
from aqnfx.passes.decompose_attention import DecomposeAttention
from aqnfx.passes.insert_capture import InsertCapture
from aqnfx.passes.partition_blocks import PartitionBlocks
from aqnfx.passes.perturbing import insert
from aqnfx.passes.pipeline import Pipeline
from aqnfx.passes.tag_layers import TagLayers
from aqnfx.passes.tag_ops import TagOps
from aqnfx.probes.capture import Captures, capture
from aqnfx.probes.data.batches import Batch, Encoded, by_length, make_batches
from aqnfx.probes.data.examples import Data
from aqnfx.probes.data.limits import check_tokens, padding, positions, vocabulary
from aqnfx.probes.data.samples import load_samples, load_tokenizer
from aqnfx.probes.forward import check_padding, eager_forward, is_causal
from aqnfx.probes.measurements import Probe, ProbeKind
from aqnfx.probes.probe_sets import plan_probes
from aqnfx.probes.replay import BlockReplay
from aqnfx.probes.tasks import EXACT_MATCH, KL, TASKS, accuracy_like
from aqnfx.probes.work import Sweep, Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A tagged program, the encoded samples, the probes over its sites, the task, and notes for the report.

    ``longest`` is the length of the longest sample in tokens, ``fixed`` the length that all samples are padded to
    because the trace holds for some lengths only, or None; ``pad`` the padding token. ``model`` is what was traced,
    kept where it is to generate.
    """

    program: Program
    encoded: tuple[Encoded, ...]
    probes: tuple[Probe, ...]
    task: str
    causal: bool
    longest: int
    fixed: int | None
    pad: int
    tokenizer: Any
    notes: tuple[str, ...]
    model: nn.Module | None = None

    def batches(self, options: Options) -> list[Batch]:
        """Return the samples as batches on the device, each padded to its own longest sample unless a length is fixed."""
        size = min(options.batch_size, len(self.encoded))
        while size > 2 and len(self.encoded) % size == 1:
            size -= 1  # compilers take a size of 1 for a constant: a single row left over would be compiled anew
        made = make_batches(self.encoded, batch_size=size, pad_id=self.pad, fixed_length=self.fixed)
        return [batch.to(self.device) for batch in made]

    @property
    def device(self) -> torch.device:
        """Where the inputs go: to the first weights of the model."""
        return device_of(self.program.module)


def prepare(
    model: nn.Module | Program | str | Path, data: Data, options: Options, *, tokenizer: Any = None, tell: Any
) -> Prepared:
    """Load, encode, trace, tag and plan; raises subclasses of :class:`~aqnfx.errors.AqnfxError` for bad input."""
    _check_device(options.device)
    tell("loading the model")
    name = str(model) if isinstance(model, (str, Path)) else _origin(model)
    if isinstance(model, (str, Path)):
        model = _load(str(model), options)
    elif options.dtype != "float32" or options.device == SPREAD or options.allow_missing:
        given = {"allow_missing": ",".join(options.allow_missing), "dtype": options.dtype}
        name, value = ("device", SPREAD) if options.device == SPREAD else next(
            (name, value) for name, value in given.items() if value not in ("", "float32")
        )  # fmt: skip
        raise InputError(f"{name} {value} is for models that are loaded here; prepare the given one, and leave it out")
    else:
        model = cast("nn.Module | Program", unwrap(model))
        _check_place(model, options.device)
    tell("reading the data")
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(_named(name))
    rows = vocabulary(model)
    encoded, notes, task = _samples(data, tokenizer, options, _max_length(model, options))
    check_tokens(encoded, rows, tokenizer)
    pad, padded = padding(tokenizer, model, rows)
    # An adaptive run looks at its first batches: they must be like all others.
    encoded = encoded if options.adaptive or options.budget else by_length(encoded)
    tell("tracing")
    lengths = {len(e.input_ids) for e in encoded}
    longest = max(lengths)
    tagged = tag(model if isinstance(model, Program) else trace_for(model, lengths), options)
    probes, more = plan(tagged, options)
    fixed = None if serves(tagged, lengths) else longest
    tell("preparing")
    causal = _is_causal(tagged, (encoded[0].input_ids * longest)[:longest])
    if not causal:
        if TASKS[task].next_token:
            raise ModelError(
                f"task {task} needs a causal language model; this one sees later tokens; use kl or top1_agreement"
            )
        more = (*more, "the model is not causal: KL and agreement are over all positions, and there is no NLL")
    if fixed is not None and isinstance(model, nn.Module):
        check_padding(model, tagged, min(encoded, key=lambda e: len(e.input_ids)), longest, pad)
    return Prepared(
        program=tagged, encoded=encoded, probes=probes, task=task, causal=causal, longest=longest,
        fixed=fixed, pad=pad,
        tokenizer=tokenizer, notes=(*tagged.notes, *notes, *padded, *more),
        model=model if task == "generate" and isinstance(model, nn.Module) else None,
    )  # fmt: skip


def _is_causal(program: Program, tokens: Sequence[int]) -> bool:
    try:
        return is_causal(program, tokens)
    except IndexError as error:  # the first run: what no configuration told
        raise InputError(
            f"the model cannot run {len(tokens)} tokens: a table has no row for one of them or for its position "
            f"({str(error).splitlines()[0]}); lower max_length"
        ) from error


def _load(name: str, options: Options) -> nn.Module:
    return load_model(
        name, dtype=getattr(torch, options.dtype), device=options.device, allow_missing=options.allow_missing
    )


def tag(program: Program, options: Options) -> Program:
    """Return the program with layers and operations tagged, attention taken apart where a selected site lies inside."""
    return Pipeline([TagLayers(), DecomposeAttention(where=options.where), TagOps()])(program)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a worker for a sweep is made, in this process or another: picklable where ``source`` is.

    ``source`` is a directory, a name or a module; ``ready`` what :func:`prepare` made here, of which the samples are used.
    """

    source: nn.Module | str
    ready: Prepared
    options: Options
    sweep: Sweep
    compiled: str

    @classmethod
    def of(
        cls, source: nn.Module | Program | str | Path, ready: Prepared, options: Options, sweep: Sweep, compiled: str
    ) -> Recipe:
        """Make a recipe; raises :class:`InputError` for a Program, which cannot travel."""
        if isinstance(source, Program):
            raise InputError(
                f"executor {options.executor} makes the model anew for every worker, which needs its directory or module; "
                "a Program was given"
            )
        named = str(source) if isinstance(source, (str, Path)) else source
        bare = dataclasses.replace(ready, program=cast(Any, None), tokenizer=None)
        return cls(source=named, ready=bare, options=options, sweep=sweep, compiled=compiled)

    def __call__(self, device: str | None = None) -> Worker:
        """Load, trace and instrument the model on ``device`` (default: that of the options) and return its worker."""
        options = self.options if device is None else dataclasses.replace(self.options, device=device)
        own = self.source
        model = _load(own, options) if isinstance(own, str) else copy.deepcopy(own).to(options.device)
        program = tag(trace_for(model, {len(e.input_ids) for e in self.ready.encoded}), options)
        ready = dataclasses.replace(self.ready, program=program)
        noisy, engine, batches = instrument(ready, options, self.sweep, self.compiled)
        return Worker(noisy, engine, batches, self.sweep)


def instrument(
    ready: Prepared, options: Options, sweep: Sweep, compiled: str
) -> tuple[Program, BlockReplay, list[Batch]]:
    """Return the program with what perturbs it, the engine that runs it, and the batches in the order in which to run them."""
    perturb = insert(options.perturbation, options.where, kernel=compiled != "none")
    noisy = Pipeline([perturb, PartitionBlocks()])(ready.program)
    engine = BlockReplay(
        noisy, starts=[p.sites for p in sweep.probes], memory=options.replay_bytes, offload=options.replay_offload,
        compiled=compiled == "blocks",
    )  # fmt: skip
    batches = ready.batches(options)
    if ready.encoded[0].number is not None:
        # Short samples and long ones in turn, so that what an interrupted run has finished is no choice of lengths.
        batches = [batches[i] for i in np.random.default_rng(0).permutation(len(batches))]
    return noisy, engine, batches


def capture_on(data: Data | None, ready: Prepared, options: Options) -> Captures:
    """Return activation statistics of the selected sites on ``data`` (None: the samples), at most as long as the samples."""
    encoded = ready.encoded
    if data is not None:
        encoded, _ = load_samples(
            data, ready.tokenizer, samples=options.samples, max_length=ready.longest, text_field=options.text_field,
            pack=options.pack,
        )  # fmt: skip
        check_tokens(encoded, vocabulary(ready.program), ready.tokenizer)
    fixed = ready.fixed if serves(ready.program, {len(e.input_ids) for e in encoded}) else ready.longest
    made = make_batches(encoded, batch_size=min(options.batch_size, len(encoded)), pad_id=ready.pad, fixed_length=fixed)
    program = InsertCapture(where=options.where, perturb=options.captured)(ready.program)
    return capture(program, eager_forward(program), [batch.to(ready.device) for batch in made])


def plan(
    program: Program, options: Options, *, kinds: tuple[ProbeKind, ...] | None = None
) -> tuple[tuple[Probe, ...], tuple[str, ...]]:
    """Return the probes that the options ask for (or those of ``kinds``), and notes on what they leave out."""
    selector, window, notes = Selector.parse(options.where), options.window, []
    kinds = options.probes if kinds is None else kinds
    if window is None:
        per_stack: dict[str | None, set[int]] = {}
        for site in program.select(selector):
            if site.layer is not None:
                per_stack.setdefault(site.stack, set()).add(site.layer)
        longest = max(map(len, per_stack.values()), default=0)
        window = min(DEFAULT_WINDOW, max(longest, 1))
        if window < DEFAULT_WINDOW and "window" in kinds:
            if window < 2 and len(kinds) > 1:
                kinds = tuple(kind for kind in kinds if kind != "window")
                notes.append(f"{longest} selected layer has no window of several layers, so none was probed")
            else:
                notes.append(f"windows hold {window} layers, because no more are selected")
    if options.checkpoint and options.method == "measure" and options.metric != "fisher-trace":
        notes.append("nothing was predicted, so there was nothing to checkpoint")
    if options.method == "measure":
        plain = Options()
        unread = ["outlier_threshold"] if options.outlier_threshold != plain.outlier_threshold else []
        unread += ["draws"] if options.draws != plain.draws and options.metric is None else []
        if unread:
            notes.append(f"{' and '.join(unread)} did nothing: method measure predicts nothing")
    if "window" in kinds and options.step > window:
        notes.append(f"step {options.step} is larger than the window of {window}: some layers are in no window")
    probes = plan_probes(program, selector, kinds=kinds, window=window, step=options.step)
    shared = _shared_sites(program, {s for p in probes for s in p.sites}) if not options.perturbation.idempotent else []
    if shared:
        notes.append(
            f"{shared[0]}{f' and {len(shared) - 1} more' if len(shared) > 1 else ''} computes one value for the whole "
            "batch: its noise is the same for all samples, so intervals there hold the choice of samples only"
        )
    return probes, tuple(notes)


def _shared_sites(program: Program, chosen: set[str]) -> list[str]:
    """Return the sites among ``chosen`` whose value has no batch dimension although the inputs have a dynamic one."""
    first = next(n for n in program.graph.nodes if n.op == "placeholder").meta["val"]
    if not first.dim() or isinstance(static_size(first.shape[0]), int):
        return []
    values = {site: place.value.meta["val"] for site, place in program.places.items() if site in chosen}
    return [s for s, v in values.items() if not v.dim() or isinstance(static_size(v.shape[0]), int)]


def _check_place(model: nn.Module | Program, device: str) -> None:
    weights = (model.module if isinstance(model, Program) else model).parameters()
    place = next((p.device for p in weights), None)
    wanted = torch.device(device)
    if place is not None and (place.type, place.index or 0) != (wanted.type, wanted.index or 0):
        raise InputError(f"the model given is on {place}, and device {device} was asked; say device={str(place)!r}, or move it")


def _check_device(device: str) -> None:
    if device == SPREAD:
        return
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
    limit = positions(model)
    if options.max_length is None:
        return min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
    if limit and options.max_length > limit:
        raise InputError(f"max_length {options.max_length} asked; the model takes at most {limit} positions")
    return options.max_length


def _samples(
    data: Data, tokenizer: Any, options: Options, max_length: int
) -> tuple[tuple[Encoded, ...], tuple[str, ...], str]:
    """Encode the samples; the default task is exact_match where the data has answers, else kl."""
    encoded, notes = load_samples(
        data, tokenizer, samples=options.samples, max_length=max_length, task=options.task or KL.name,
        text_field=options.text_field, pack=options.pack,
    )  # fmt: skip
    answers = all(e.answer is not None for e in encoded)
    task = options.task or (EXACT_MATCH.name if answers else KL.name)
    accuracy_like(task, answers)
    if options.task is None and not answers and any(e.answer is not None for e in encoded):
        notes = (*notes, "some samples have no whole answer, so the task is kl; ask for exact_match to leave them out")
    return encoded, notes, task
