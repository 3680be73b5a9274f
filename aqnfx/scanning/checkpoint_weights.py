"""The weights of a checkpoint, streamed: chunks of whole rows from its files, never a whole tensor, never the model."""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aqnfx.errors import ModelError, printable
from aqnfx.graph.checkpoint_files import QUANTISED, Entry, header_digest, model_directory, read_config, read_entries
from aqnfx.graph.orientation import Layout, layouts_of

CHUNK = 1 << 19
"""Values of a chunk: what eager temporaries keep near the core (measured: half as fast at 2^22), and enough for a kernel."""

_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_LONGEST_ROW = 1 << 24

_NO_WEIGHT = re.compile(r"(bias|mask|_ids|_index|_indices)$")  # old checkpoints keep attention masks and position ids
_KERNEL = 64  # a third dimension below this is the kernel of a convolution, from here on a stack of matrices


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One weight as a stack of matrices: products sum over ``width``, and each of the ``rows`` is an output channel.

    ``transposed``: every matrix of the stack is stored as (width, rows). All ``stack`` × ``rows`` rows count alike.
    """

    module: str
    entry: Entry
    dtype: torch.dtype
    stack: int
    rows: int
    width: int
    transposed: bool

    @property
    def elements(self) -> int:
        """Number of values."""
        return self.stack * self.rows * self.width

    @property
    def facts(self) -> dict[str, Any]:
        """Shape and dtype as in the checkpoint, and how it is read."""
        return {
            "shape": list(self.entry.shape), "dtype": str(self.dtype).removeprefix("torch."),
            "rows": self.stack * self.rows, "width": self.width, "transposed": self.transposed,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The weights of a checkpoint, what was left out (kind -> how many tensors), and a digest of its headers."""

    name: str
    model_type: str | None
    weights: tuple[Weight, ...]
    skipped: Mapping[str, int]
    digest: str
    notes: tuple[str, ...] = ()


def open_checkpoint(model: str) -> Checkpoint:
    """Read the headers of a local checkpoint (a directory, ``"tinygsm"``, a hub id in the local cache).

    Weights are the floating-point tensors of two or more dimensions; a module is the tensor's name without ``.weight``.
    Vectors, biases, index and mask buffers and empty tensors are counted as skipped. Raises :class:`ModelError` for
    everything that cannot be scanned: no safetensors, damaged files, quantised or integer weights.
    """
    directory = model_directory(model)
    config = read_config(directory)
    entries = read_entries(directory)
    kinds = [_skipped_kind(entry) for entry in entries]
    skipped = Counter(kind for kind in kinds if kind is not None)
    held = [entry for entry, kind in zip(entries, kinds, strict=True) if kind is None]
    if odd := next((entry for entry in held if entry.dtype not in _FLOATS), None):
        raise ModelError(_not_floating(odd, config or {}))
    note, turned = "No config.json: every weight is taken as (out, in), which those of GPT-2 are not.", dict[str, Layout]()
    if config is not None:
        turned, note = layouts_of(directory, {entry.key: entry.shape for entry in held})
    weights: dict[str, Weight] = {}
    for entry in held:
        weight = _weight(entry, turned.get(entry.key))
        if weight.module in weights:  # "a" beside "a.weight": the second keeps its whole name
            weight = _weight(entry, turned.get(entry.key), module=entry.key)
        weights[weight.module] = weight
    if not weights:
        raise ModelError(f"model {model!r} holds no weight of two or more dimensions among its {len(entries)} tensors")
    return Checkpoint(
        name=directory.resolve().name if Path(model).exists() else model, model_type=(config or {}).get("model_type"),
        weights=tuple(weights.values()), skipped=dict(skipped), digest=header_digest(entries),
        notes=(note,) if note else (),
    )  # fmt: skip


def _skipped_kind(entry: Entry) -> str | None:
    """Return what a tensor is that is no weight, or None for a weight."""
    if len(entry.shape) < 2:
        return "vectors and scalars"
    if math.prod(entry.shape) == 0:
        return "empty tensors"
    return "biases, masks and indices" if entry.dtype == "BOOL" or _NO_WEIGHT.search(entry.key) else None


def _weight(entry: Entry, layout: Layout | None, module: str | None = None) -> Weight:
    shape = entry.shape
    stack, rows, width, transposed = 1, shape[0], math.prod(shape[1:]), layout is not None
    if layout is not None:
        stack, rows, width = layout.stack, layout.rows, layout.width
    elif len(shape) == 3 and shape[2] >= _KERNEL:
        stack, rows, width = shape
    if width > _LONGEST_ROW:
        raise ModelError(f"{printable(entry.key)} has rows of {width} values; at most {_LONGEST_ROW} are held at a time")
    return Weight(
        module=module or entry.key.removesuffix(".weight") or entry.key, entry=entry, dtype=_FLOATS[entry.dtype],
        stack=stack, rows=rows, width=width, transposed=transposed,
    )  # fmt: skip


def _not_floating(entry: Entry, config: Mapping[str, Any]) -> str:
    settings = config.get("quantization_config")
    method = f" ({settings.get('quant_method', 'see its config')})" if isinstance(settings, Mapping) else ""
    name = printable(entry.key)
    if method or entry.dtype.startswith(("F8", "F6", "F4")) or QUANTISED.search(entry.key):
        return f"the checkpoint is quantised already{method}: {name} is {entry.dtype}; scan the one it was made from"
    return f"{name} has the type {entry.dtype}, which is not floating point; scan a checkpoint in fp32, fp16 or bf16"


def chunks(weight: Weight, elements: int = CHUNK) -> Iterator[Tensor]:
    """Yield the rows of a weight in order, (some rows, width), in its dtype (fp64 as fp32).

    A chunk has at most ``elements`` values, or one row where that is longer. All chunks share one buffer: each is valid
    until the next one is asked for. Files are read, not mapped: mapped pages would count as memory in use. Raises
    :class:`ModelError` when the file ends early.
    """
    at_once = max(1, elements // weight.width)
    if not weight.transposed:
        for piece in _runs(weight, at_once * weight.width):
            yield _as_float(piece.view(-1, weight.width))
        return
    size = weight.dtype.itemsize
    buffer = torch.empty(min(at_once, weight.rows) * weight.width * size, dtype=torch.uint8)
    bytes_ = buffer.numpy().data
    with _opened(weight) as file:
        for matrix in range(weight.stack):
            for row in range(0, weight.rows, at_once):
                columns = min(at_once, weight.rows - row)
                base, length = (matrix * weight.width * weight.rows + row) * size, columns * size
                for line in range(weight.width):  # a slab of columns: a piece of every stored line
                    place = weight.entry.start + base + line * weight.rows * size
                    _fill(file, place, bytes_[line * length : (line + 1) * length], weight)
                slab = buffer[: weight.width * length].view(weight.dtype).view(weight.width, columns)
                yield _as_float(slab.t().contiguous())


def value_range(weight: Weight, elements: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Return the least and the largest value of a weight, fp32 scalars, in a reading of its own; NaN where one is NaN."""
    ends = [torch.stack(torch.aminmax(_as_float(piece))) for piece in _runs(weight, elements)]
    low, high = torch.stack(ends).float().unbind(1)
    return low.amin(), high.amax()


def _runs(weight: Weight, elements: int) -> Iterator[Tensor]:
    """Yield the values as they are stored, ``elements`` at a time, in a buffer that is used again."""
    size = weight.dtype.itemsize
    buffer = torch.empty(min(elements, weight.elements) * size, dtype=torch.uint8)
    bytes_ = buffer.numpy().data
    with _opened(weight) as file:
        for first in range(0, weight.elements, elements):
            count = min(elements, weight.elements - first) * size
            _fill(file, weight.entry.start + first * size, bytes_[:count], weight)
            yield buffer[:count].view(weight.dtype)


@contextlib.contextmanager
def _opened(weight: Weight) -> Iterator[FileIO]:
    try:
        with weight.entry.path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise ModelError(f"cannot read {weight.entry.path}: {error.strerror}") from error


def _fill(file: FileIO, place: int, target: memoryview, weight: Weight) -> None:
    file.seek(place)
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])
        if not count:
            raise ModelError(f"{weight.entry.path} ended within {printable(weight.entry.key)}: it changed while it was read")
        done += count


def _as_float(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float64 else x
