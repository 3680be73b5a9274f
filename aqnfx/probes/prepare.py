"""From a model and data to a tagged program and its samples: what every job that runs a model begins with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from aqnfx.data import EMBEDDED
from aqnfx.errors import InputError, ModelError
from aqnfx.graph.controls import device_of
from aqnfx.graph.lengths import serves, trace_for
from aqnfx.graph.loading import SPREAD, load_model
from aqnfx.graph.program import Program
from aqnfx.graph.selector import Selector
from aqnfx.graph.wrappers import unwrap
from aqnfx.passes.decompose_attention import DecomposeAttention
from aqnfx.passes.pipeline import Pipeline
from aqnfx.passes.tag_layers import TagLayers
from aqnfx.passes.tag_ops import TagOps
from aqnfx.probes.data.batches import Batch, Encoded, by_length, make_batches
from aqnfx.probes.data.examples import Data
from aqnfx.probes.data.limits import check_tokens, padding, positions, vocabulary
from aqnfx.probes.data.samples import load_samples, load_tokenizer
from aqnfx.probes.forward import check_padding, is_causal
from aqnfx.probes.probe_sets import selected
from aqnfx.probes.settings import DEFAULT_MAX_LENGTH, RunSettings
from aqnfx.probes.tasks import EXACT_MATCH, KL, TASKS, accuracy_like


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A tagged program, the encoded samples, the task, and notes for the report.

    ``longest`` is the length of the longest sample in tokens, ``fixed`` the length that all samples are padded to
    because the trace holds for some lengths only, or None; ``pad`` the padding token. ``model`` is what was traced,
    kept where it is to generate.
    """

    program: Program
    encoded: tuple[Encoded, ...]
    task: str
    causal: bool
    longest: int
    fixed: int | None
    pad: int
    tokenizer: Any
    notes: tuple[str, ...]
    model: nn.Module | None = None

    def batches(self, settings: RunSettings) -> list[Batch]:
        """Return the samples as batches on the device, each padded to its own longest sample unless a length is fixed."""
        size = min(settings.batch_size, len(self.encoded))
        while size > 2 and len(self.encoded) % size == 1:
            size -= 1  # compilers take a size of 1 for a constant: a single row left over would be compiled anew
        made = make_batches(self.encoded, batch_size=size, pad_id=self.pad, fixed_length=self.fixed)
        return [batch.to(self.device) for batch in made]

    @property
    def device(self) -> torch.device:
        """Where the inputs go: to the first weights of the model."""
        return device_of(self.program.module)


def prepare(
    model: nn.Module | Program | str | Path, data: Data, settings: RunSettings, *, where: str, task: str | None = None,
    in_order: bool = False, check: Callable[[Program], None] | None = None, tokenizer: Any = None,
    tell: Callable[[str], None] = lambda _text: None,
) -> Prepared:
    """Load, encode, trace and tag for sites that the selector ``where`` names.

    ``task`` None: exact_match where the data has answers, else kl. Samples are put in an order of their lengths unless they
    are to stay ``in_order``. ``check`` is called with the tagged program before anything runs. Raises subclasses of
    :class:`~aqnfx.errors.AqnfxError` for bad input.
    """
    _check_device(settings.device)
    tell("loading the model")
    name = str(model) if isinstance(model, (str, Path)) else _origin(model)
    if isinstance(model, (str, Path)):
        model = load(str(model), settings)
    elif settings.dtype != "float32" or settings.device == SPREAD or settings.allow_missing:
        given = {"allow_missing": ",".join(settings.allow_missing), "dtype": settings.dtype}
        name, value = ("device", SPREAD) if settings.device == SPREAD else next(
            (name, value) for name, value in given.items() if value not in ("", "float32")
        )  # fmt: skip
        raise InputError(f"{name} {value} is for models that are loaded here; prepare the given one, and leave it out")
    else:
        model = cast("nn.Module | Program", unwrap(model))
        _check_place(model, settings.device)
    tell("reading the data")
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(_named(name))
    rows = vocabulary(model)
    encoded, notes, task = _samples(data, tokenizer, settings, task, _max_length(model, settings))
    check_tokens(encoded, rows, tokenizer)
    pad, padded = padding(tokenizer, model, rows)
    encoded = encoded if in_order else by_length(encoded)
    tell("tracing")
    lengths = {len(e.input_ids) for e in encoded}
    longest = max(lengths)
    tagged = tag(model if isinstance(model, Program) else trace_for(model, lengths), where)
    selected(tagged, Selector.parse(where))
    if check is not None:
        check(tagged)
    more: tuple[str, ...] = ()
    fixed = None if serves(tagged, lengths) else longest
    tell("preparing")
    causal = _is_causal(tagged, (encoded[0].input_ids * longest)[:longest])
    if not causal:
        if TASKS[task].next_token:
            raise ModelError(
                f"task {task} needs a causal language model; this one sees later tokens; use kl or top1_agreement"
            )
        more = ("the model is not causal: KL and agreement are over all positions, and there is no NLL",)
    if fixed is not None and isinstance(model, nn.Module):
        check_padding(model, tagged, min(encoded, key=lambda e: len(e.input_ids)), longest, pad)
    return Prepared(
        program=tagged, encoded=encoded, task=task, causal=causal, longest=longest, fixed=fixed, pad=pad, tokenizer=tokenizer,
        notes=(*tagged.notes, *notes, *padded, *more),
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


def load(name: str, settings: RunSettings) -> nn.Module:
    """Load the model called ``name`` where and in what the settings say."""
    return load_model(
        name, dtype=getattr(torch, settings.dtype), device=settings.device, allow_missing=settings.allow_missing
    )


def tag(program: Program, where: str) -> Program:
    """Return the program with layers and operations tagged, attention taken apart where a selected site lies inside."""
    return Pipeline([TagLayers(), DecomposeAttention(where=where), TagOps()])(program)


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


def _max_length(model: nn.Module | Program, settings: RunSettings) -> int:
    limit = positions(model)
    if settings.max_length is None:
        return min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
    if limit and settings.max_length > limit:
        raise InputError(f"max_length {settings.max_length} asked; the model takes at most {limit} positions")
    return settings.max_length


def _samples(
    data: Data, tokenizer: Any, settings: RunSettings, asked: str | None, max_length: int
) -> tuple[tuple[Encoded, ...], tuple[str, ...], str]:
    """Encode the samples; the default task is exact_match where the data has answers, else kl."""
    encoded, notes = load_samples(
        data, tokenizer, samples=settings.samples, max_length=max_length, task=asked or KL.name,
        text_field=settings.text_field, pack=settings.pack,
    )  # fmt: skip
    answers = all(e.answer is not None for e in encoded)
    task = asked or (EXACT_MATCH.name if answers else KL.name)
    accuracy_like(task, answers)
    if asked is None and not answers and any(e.answer is not None for e in encoded):
        notes = (*notes, "some samples have no whole answer, so the task is kl; ask for exact_match to leave them out")
    return encoded, notes, task
