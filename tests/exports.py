"""One export for many tests: what ``torch.export`` records of a model of Hugging Face or of these tests depends on no weight.

Exporting is most of the time of many tests, and most of them trace the same few architectures. :func:`shared_exports` lets
``torch.export.export`` record each of them once; later models of the same description get the recorded graph with their
own parameters and buffers. Everything behind the export runs for each of them. Models that anything was done to that the
description does not see (hooks, a forward of their own, modules of other packages, what tests keep beside plain values) are
exported as always.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

PACKAGES = ("torch.", "transformers.")
OWN = "tests."
INTERNAL = frozenset(vars(nn.Module()))
PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device)
KEPT = 32  # graphs; a worker's tests come file by file


class Unknown(Exception):
    """The model holds something that its description would not show."""


@dataclass(frozen=True)
class Record:
    """An export without the tensors of the model that it was made of."""

    exported: ExportedProgram
    constants: dict[str, Tensor | None]  # None: the model's own, by this name


def describe(model: nn.Module, args: Any, kwargs: Any, options: Any) -> tuple[Any, ...]:
    """Return all that an export can depend on, hashable; raise :class:`Unknown` where that cannot be told."""
    configs = {id(m.config): m.config for m in model.modules() if "config" in vars(m)}
    if not all(hasattr(config, "to_json_string") for config in configs.values()):
        raise Unknown
    if not configs and not (type(model).__module__ + ".").startswith(OWN):
        raise Unknown
    state = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype())
    chosen = tuple((c.to_json_string(use_diff=False), getattr(c, "_attn_implementation", None)) for c in configs.values())
    modules = tuple(_module(name, module) for name, module in model.named_modules(remove_duplicate=False))
    first: dict[int, str] = {}  # tied tensors show as one
    tensors = tuple(
        (name, first.setdefault(id(t), name), type(t), *_tensor(t), t.requires_grad) for name, t in _tensors(model).items()
    )
    given, spec = pytree.tree_flatten((args, kwargs))
    places: dict[int, int] = {}  # one tensor given twice, or two that share memory, show as one
    inputs = tuple(
        (*_tensor(value), value.requires_grad, places.setdefault(value.untyped_storage().data_ptr(), number))
        if isinstance(value, Tensor) else repr(value)
        for number, value in enumerate(given)
    )  # fmt: skip
    return state, chosen, modules, tensors, inputs, str(spec), repr(options)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _tensor(value: Tensor) -> tuple[Any, ...]:
    return tuple(value.shape), value.dtype, str(value.device), value.stride()


def _module(name: str, module: nn.Module) -> tuple[Any, ...]:
    kind = type(module)
    package = kind.__module__ + "."
    if not package.startswith((*PACKAGES, OWN)):
        raise Unknown
    plain = []
    for key, value in vars(module).items():
        if ("hook" in key and value) or key == "forward":
            raise Unknown
        if isinstance(value, PLAIN) or (isinstance(value, (tuple, list)) and all(isinstance(v, PLAIN) for v in value)):
            plain.append((key, repr(value)))
        elif inspect.isroutine(value):
            plain.append((key, value))
        elif package.startswith(OWN) and key not in INTERNAL:
            raise Unknown
    return name, kind, kind.forward, tuple(sorted(plain)), tuple(sorted(module._non_persistent_buffers_set))


def record(exported: ExportedProgram, model: nn.Module) -> Record:
    kept, own = copy.copy(exported), _tensors(model)
    constants = {}
    for name, value in exported.constants.items():
        if not isinstance(value, Tensor):
            raise Unknown
        constants[name] = None if own.get(name) is value else value.detach().clone()
    if not exported.state_dict.keys() <= own.keys():
        raise Unknown
    kept._state_dict, kept._constants, kept._example_inputs = dict.fromkeys(exported.state_dict), {}, None
    return Record(exported=kept, constants=constants)


def revive(found: Record, model: nn.Module, args: Any, kwargs: Any) -> ExportedProgram:
    """Return the recorded export as that of ``model``."""
    exported, own = copy.copy(found.exported), _tensors(model)
    exported._state_dict = {name: own[name] for name in found.exported._state_dict}
    exported._constants = {n: own[n] if value is None else value.clone() for n, value in found.constants.items()}
    exported._example_inputs = (args, kwargs)
    return exported


class Exports:
    """``torch.export.export`` with a memory."""

    def __init__(self, original: Callable[..., ExportedProgram]) -> None:
        self.original = original
        self.records: OrderedDict[tuple[Any, ...], Record] = OrderedDict()
        self.fresh = False  # True: no memory for now

    def __call__(self, mod: Any, args: Any, kwargs: Any = None, **options: Any) -> ExportedProgram:
        try:
            key = None if self.fresh else describe(mod, args, kwargs, options)
        except Unknown:
            key = None
        if key is None:
            return self.original(mod, args, kwargs, **options)
        if key in self.records:
            self.records.move_to_end(key)
            return revive(self.records[key], mod, args, kwargs)
        exported = self.original(mod, args, kwargs, **options)
        try:
            self.records[key] = record(exported, mod)
        except Unknown:
            return exported
        while len(self.records) > KEPT:
            self.records.popitem(last=False)
        return revive(self.records[key], mod, args, kwargs)  # the first is used as every later one
