"""scan(): the error that number formats make in the weights of a checkpoint, read from its files without the model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from aqnfx.artifacts import Schema, jsonable, versions
from aqnfx.errors import InputError, ModelError, printable
from aqnfx.numerics.format_stats import ERROR_SUMS, ValueStatistics, error_record, format_sums
from aqnfx.numerics.formats import Format, parse_format
from aqnfx.probes.compile_choice import compiler_problem
from aqnfx.probes.data.examples import Data
from aqnfx.probes.memory import peak_memory_mib
from aqnfx.scanning.activations import Activations, measure_activations
from aqnfx.scanning.checkpoint_weights import CHUNK, Checkpoint, Weight, chunks, open_checkpoint, value_range
from aqnfx.scanning.findings import decide, rank, summarise

Progress = Callable[[int, int], None]
Formats = Mapping[str, Format]

# Measured per core: operations one by one do about 50 M values per second and format, kernels 350 M, and making kernels
# takes 10 to 20 s, or 5 s where they are in Inductor's cache. It pays from about here on, in values × formats.
_WORTH_COMPILING = 800_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """One scan as plain JSON values; every field is the key of the same name in the record.

    ``formats``: the texts that were asked for -> canonical name, bits. ``weights``: module -> format -> statistics of the
    error (:func:`~aqnfx.numerics.format_stats.error_record`) with ``class`` and ``sigma``
    (:func:`~aqnfx.scanning.findings.decide`). ``weight_facts``: module -> what is true of it in every format.
    ``ranking``: format -> modules, lowest SQNR first. ``summary``: format -> median, worst, number per class.
    ``activations``, ``activation_facts``, ``activation_ranking`` and ``activation_summary`` are the same of the inputs of
    products and of keys and values, by module where it has one of them, else by site id; empty in a scan without data.
    ``ranges``: site id -> [least, largest] value seen, what ``insert-fake-quant{calibration=…}`` reads.
    """

    model: dict[str, Any]
    formats: dict[str, dict[str, Any]]
    weights: dict[str, dict[str, dict[str, Any]]]
    weight_facts: dict[str, dict[str, Any]]
    ranking: dict[str, list[dict[str, Any]]]
    summary: dict[str, dict[str, Any]]
    activations: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    activation_facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    activation_ranking: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    activation_summary: dict[str, dict[str, Any]] = field(default_factory=dict)
    ranges: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_record(self) -> dict[str, Any]:
        """Return the scan as plain JSON values, schema ``aqnfx.scan/1``."""
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        record: dict[str, Any] = jsonable({"schema": Schema.SCAN} | own)
        return record


def scan(
    model: str | Path, formats: str | Sequence[str], *, data: Data | None = None, progress: Progress | None = None,
    compile: str = "auto", chunk: int = CHUNK, status: Callable[[str], None] | None = None, **options: Any,
) -> Scan:  # fmt: skip
    """Measure per weight and format what storing the weight in that format changes; with ``data`` also for activations.

    ``model`` is a local Hugging Face directory with safetensors, a hub id that is in the local cache, or ``"tinygsm"``;
    ``formats`` are texts of :func:`~aqnfx.numerics.formats.parse_format`, a list or one text with commas. Weights are
    read ``chunk`` values at a time, twice where a format has a scale of the whole tensor. ``progress(done, total)`` is
    told bytes. ``data`` (as for :func:`~aqnfx.diagnosis.diagnose.diagnose`) is run through the model once before that,
    with progress in batches, for the inputs of products and for keys and values; ``options`` are then those of
    :func:`~aqnfx.scanning.activations.measure_activations`. ``status(text)`` hears which half runs. ``compile``:
    "auto", "yes" or "no"; counts are the same, sums agree to about 1e-11. Raises
    :class:`InputError` for formats, :class:`ModelError` for checkpoints that cannot be scanned (see
    :func:`~aqnfx.scanning.checkpoint_weights.open_checkpoint`) and for values that are not finite.
    """
    began = time.perf_counter()
    if chunk < 1:
        raise InputError(f"scan: chunk {chunk} must be 1 or more values")
    wanted = _formats(formats)
    checkpoint = open_checkpoint(str(model))
    if options and data is None:
        raise InputError(f"scan: {', '.join(options)} are about data, and no data was given")
    tell_status = status or (lambda _text: None)
    tell_status("activations")
    found = None if data is None else measure_activations(str(model), data, wanted, progress=progress, **options)
    tell_status("weights")
    between = time.perf_counter()
    engine = _Engine(wanted, _compiled(compile, checkpoint, wanted), required=compile == "yes", chunk=chunk)
    readings = 2 if any(fmt.static for fmt in wanted.values()) else 1
    total, done = sum(weight.entry.size for weight in checkpoint.weights), 0
    weights, facts = {}, {}
    for weight in checkpoint.weights:

        def tell(read: int, before: int = done) -> None:
            if progress is not None:
                progress(before * readings + read, total * readings)

        weights[weight.module], facts[weight.module] = engine.measure(weight, tell)
        done += weight.entry.size
    seconds = time.perf_counter() - between
    ranking = {name: rank(weights, name) for name in wanted}
    activations = found or Activations(records={}, facts={}, ranges={})
    decided = {
        key: {name: record | decide(record) for name, record in records.items()}
        for key, records in activations.records.items()
    }
    places = {name: rank(decided, name) for name in wanted} if decided else {}
    return Scan(
        model={"name": checkpoint.name, "model_type": checkpoint.model_type, "digest": checkpoint.digest},
        formats={name: _describe(fmt, checkpoint.weights) for name, fmt in wanted.items()},
        weights=weights, weight_facts=facts, ranking=ranking,
        summary={name: summarise(weights, name, ranking[name]) for name in wanted},
        activations=decided, activation_facts=activations.facts, activation_ranking=places,
        activation_summary={name: summarise(decided, name, places[name]) for name in places}, ranges=activations.ranges,
        notes=[*checkpoint.notes, *_notes(checkpoint, wanted), *engine.notes, *activations.notes],
        provenance={
            **versions("torch", "transformers", "safetensors"),
            "digest_of": "names, dtypes, shapes and sizes of all tensors; not their values", "compile": engine.compiled,
            "weights": len(weights), "elements": sum(weight.elements for weight in checkpoint.weights), "bytes": total,
            "skipped": dict(checkpoint.skipped), "seconds": seconds, "gb_per_second": total / seconds / 1e9,
            "peak_memory_mib": peak_memory_mib("cpu"),
            **({} if found is None else {"data": activations.provenance, "data_seconds": between - began}),
        },
    )  # fmt: skip


def _formats(asked: str | Sequence[str]) -> Formats:
    """Return the formats by the texts that asked for them, in order."""
    texts = asked.split(",") if isinstance(asked, str) else list(asked)
    texts = [text.strip().lower() for text in texts if text.strip()]
    if not texts:
        raise InputError("no format was given to scan; try mxfp4,nvfp4,int8")
    found: dict[str, Format] = {}
    for text in texts:
        fmt = parse_format(text)
        twice = next((name for name, other in found.items() if other == fmt), None)
        if twice is not None:
            raise InputError(f"format {text} was given twice (as {twice} before: both are {fmt.name}); give each once")
        found[text] = fmt
    return found


def _compiled(mode: str, checkpoint: Checkpoint, formats: Formats) -> bool:
    """Return whether to compile: as asked, or where it pays for the size of the checkpoint."""
    if mode not in ("auto", "yes", "no"):
        raise InputError(f"compile {mode!r} is not one of auto, yes, no")
    work = sum(weight.elements for weight in checkpoint.weights) * len(formats)
    if mode == "no" or (mode == "auto" and work < _WORTH_COMPILING):
        return False
    problem = compiler_problem("cpu")
    if problem and mode == "yes":
        raise InputError(f"compile yes was asked, but {problem}; install one, or use --compile no")
    return problem is None


class _Engine:
    """Measures one weight after the other; ``notes`` are what it had to do otherwise than asked."""

    def __init__(self, formats: Formats, compiled: bool, *, required: bool, chunk: int) -> None:
        self.formats = formats
        self.compiled = compiled
        self.notes: list[str] = []
        self._required = required
        self._chunk = chunk

    def measure(self, weight: Weight, tell: Callable[[int], None]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Return the records of a weight per format and its facts; ``tell`` hears how many of its bytes were read."""
        read, bounds, size = 0, None, weight.dtype.itemsize
        if any(fmt.static for fmt in self.formats.values()):
            bounds = value_range(weight, self._chunk)  # not finite where a value is not: the second reading finds it
            tell(read := weight.entry.size)
        values = ValueStatistics(weight.stack * weight.rows)
        sums = {name: torch.zeros(ERROR_SUMS, dtype=torch.float64) for name in self.formats}
        for x in chunks(weight, self._chunk):
            self._call(values.add, x)
            _finite(values.largest, weight)
            for name, fmt in self.formats.items():
                sums[name] += self._call(format_sums, x, fmt, bounds if fmt.static else None)
            tell(read := read + x.numel() * size)
        records = {name: error_record(total, weight.elements) for name, total in sums.items()}
        return {name: record | decide(record) for name, record in records.items()}, weight.facts | values.record()

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call with kernels or without; without from the first time on that they cannot be made."""
        try:
            return function(*arguments, compiled=self.compiled)
        except RuntimeError as error:
            if not self.compiled:
                raise
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            if self._required:
                raise InputError(f"compile yes was asked, but compiling failed ({reason}); use --compile no") from error
            self.compiled = False
            self.notes.append(f"Compiling failed ({reason}); the operations ran one by one.")
            return function(*arguments, compiled=False)


def _finite(value: float, weight: Weight) -> None:
    if not math.isfinite(value):
        what = "NaN" if math.isnan(value) else "infinite values"
        name = printable(weight.entry.key)
        raise ModelError(f"weight {name} of {weight.entry.path.name} holds {what}; repair the checkpoint first")


def _describe(fmt: Format, weights: Sequence[Weight]) -> dict[str, Any]:
    """Return canonical name, bits per value with all scales, and how many weights have rows that end in a part of a block."""
    bits = sum(fmt.stored_bits((weight.stack * weight.rows, weight.width)) for weight in weights)
    partial = sum(weight.width % fmt.block != 0 for weight in weights) if fmt.block else 0
    return {"name": fmt.name, "bits": bits / sum(weight.elements for weight in weights), "partial_blocks": partial}


def _notes(checkpoint: Checkpoint, formats: Formats) -> list[str]:
    notes = []
    if checkpoint.skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(checkpoint.skipped.items()))
        notes.append(f"Not scanned, since they are no weights that sum over a dimension: {kinds}.")
    for name, fmt in formats.items():
        partial = _describe(fmt, checkpoint.weights)["partial_blocks"]
        if partial:
            notes.append(
                f"{name}: {partial} of {len(checkpoint.weights)} weights have rows that {fmt.block} does not divide; their last"
                " block is shorter, which not every kernel takes."
            )
    return notes
