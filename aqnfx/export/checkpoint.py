"""What checkpoints for transformers have in common: the dtype of what is not planned, tied heads, sizes in the files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aqnfx.errors import InputError
from aqnfx.export.job import DTYPES, Job, Linear
from aqnfx.export.readback import Reference, read_back


def checkpoint_dtype(job: Job, given: str) -> torch.dtype:
    """Return what a checkpoint stores unplanned weights in: ``given``, or for ``"auto"`` what the model's own file has.

    Raises :class:`InputError` for another text.
    """
    if given == "auto":
        first: torch.dtype = next(job.model.parameters()).dtype
        return job.stored_dtype if job.stored_dtype in DTYPES.values() and job.stored_dtype is not None else first
    if given not in DTYPES:
        raise InputError(f"--dtype {given} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[given]


def check_pretrained(job: Job, target: str) -> Any:
    """Return the model where transformers can save it; raises :class:`InputError` for any other module."""
    if not _is_pretrained(job.model):
        raise InputError(
            f"{target} writes a checkpoint for transformers, and {type(job.model).__name__} is none of its models; use onnx, "
            "pt2 or python"
        )
    return job.model


def _is_pretrained(model: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def untie(job: Job, planned: Iterable[Linear]) -> tuple[str, ...]:
    """Give planned layers whose weight another module reads too (a tied head) one of their own, and say so.

    The plan stores the use of a weight by one layer: the other readers keep the weight as it is. The saved config then says
    that nothing is tied, since loading would otherwise put the shared weight back. Returns one note per layer.
    """
    owners: dict[int, list[str]] = {}
    for name, module in job.model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners.setdefault(id(weight), []).append(name)
    notes = []
    for linear in list(planned):
        others = [name for name in owners[id(linear.module.weight)] if name != linear.name]
        if others:
            linear.module.weight = nn.Parameter(linear.module.weight.detach().clone(), requires_grad=False)
            notes.append(
                f"{linear.name} shared its weight with {', '.join(others)}: stored apart now, {linear.name} in "
                f"{linear.weight.name}, {', '.join(others)} as it was; the file holds both"
            )
    if notes:
        _tie_nothing(job.model, next(iter(planned)).name)
    return tuple(notes)


def _tie_nothing(model: nn.Module, name: str) -> None:
    """Say in every config that nothing is tied, and give whatever was (biases, embeddings of two stacks) a tensor per name.

    Raises :class:`InputError` for models whose config class ties whatever a file says.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
            if type(config).from_dict(config.to_dict()).tie_word_embeddings:
                raise InputError(
                    f"transformers ties {name} of {type(model).__name__} to the embedding whatever a file says; leave {name} out "
                    "of the plan, or use onnx, pt2 or python"
                )
    seen: set[int] = set()
    for module in model.modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                setattr(module, kind, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            seen.add(id(parameter))


def save_model(model: Any, folder: Path) -> None:
    """Save a transformers model as safetensors, without progress bars."""
    from transformers.utils import logging

    if (generation := getattr(model, "generation_config", None)) is not None:
        try:
            generation.validate(strict=True)
        except ValueError:  # which save_pretrained refuses; the model's own file is copied as it is
            model.generation_config = type(generation)()
    bars: Any = logging  # whose functions have no types
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            bars.enable_progress_bar()


def read_checkpoint(
    target: str, folder: Path, ref: Reference, planned: Iterable[Linear], tokens: list[int] | None, hint: str = ""
) -> str:
    """Load a checkpoint in a fresh process and compare it with the plan; return the line that says how that went."""
    # The runtimes scale such inputs to -128 to 127, a plan to -127 to 127: two errors of one size, in other values.
    apart = any(linear.input is not None and linear.input.name == "int8:row" for linear in planned)
    return read_back(target, folder, ref, allowed=3.0 * ref.inputs if apart else 0.0, hint=hint, tokens=tokens).line


def tensor_bytes(folder: Path, modules: Iterable[str]) -> int:
    """Return the bytes that the safetensors files in ``folder`` hold for the weights of ``modules``; biases do not count.

    Read from the headers: names of a module's weight begin with ``module.weight`` or ``module._weight``.
    """
    prefixes = tuple(f"{module}.{name}" for module in modules for name in ("weight", "_weight"))
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        spans = [entry["data_offsets"] for name, entry in header.items() if name.startswith(prefixes)]
        total += sum(end - begin for begin, end in spans)
    return total


def files_in(folder: Path) -> tuple[Path, ...]:
    """Return every file of a folder, sorted."""
    return tuple(sorted(path for path in folder.rglob("*") if path.is_file()))
