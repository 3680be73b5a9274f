"""Keep a model as it was while it is traced: a forward may store what it computes, and under tracing that is no number."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_OPAQUE = (Tensor, torch.storage.UntypedStorage, type, ModuleType, str, bytes, int, float, complex, type(None), torch.dtype)
"""What has no parts that a forward stores into."""


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Give the modules of ``model`` their attributes, parameters, buffers and modes back on the way out, also after an error.

    So are the contents of the lists, dicts and sets that they hold, and tensors in other objects that they hold. The values
    of tensors are not kept: tracing writes into copies only.
    """
    saved = _states(model)
    try:
        yield
    finally:
        for state in saved:
            state.restore()


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Let the configs of ``model`` say that no cache is made, for forwards that take ``use_cache`` among other keywords."""
    held: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in held if getattr(config, "use_cache", None) is True}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


class _State:
    """The parts of one dict, list or set, by identity."""

    __slots__ = ("items", "owner", "tensors_only")

    def __init__(self, owner: Any, tensors_only: bool) -> None:
        self.owner, self.tensors_only = owner, tensors_only
        self.items = list(owner.items()) if isinstance(owner, dict) else list(owner)

    def parts(self) -> Iterator[Any]:
        """What may hold parts of its own."""
        yield from (value for _, value in self.items) if isinstance(self.owner, dict) else self.items

    def restore(self) -> None:
        """Put the parts back where any was taken out, put in, or replaced."""
        now = _State(self.owner, self.tensors_only)
        if len(now.items) == len(self.items) and all(map(_same, now.items, self.items)):
            return
        before = set(map(id, self.parts()))
        if self.tensors_only and not any(isinstance(part, Tensor) and id(part) not in before for part in now.parts()):
            return
        self.owner.clear()
        if isinstance(self.owner, list):
            self.owner.extend(self.items)
        else:
            self.owner.update(self.items)


def _same(one: Any, other: Any) -> bool:
    """Whether two parts are the same object; of a dict whether key and value are."""
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other) == 2:
        return one[0] is other[0] and one[1] is other[1]
    return one is other


def _states(model: nn.Module) -> list[_State]:
    """Return the state of everything that belongs to a model and that a forward could store into.

    Those are the modules, the containers that they hold, and objects of other kinds that a module or such a container holds
    directly: there only what a tensor was put into is put back, since they may belong to others too (loggers, threads).
    """
    found: list[_State] = []
    seen: set[int] = set()
    ahead: list[tuple[Any, bool]] = [(model, False)]
    while ahead:
        owner, foreign = ahead.pop()
        if id(owner) in seen or isinstance(owner, _OPAQUE):
            continue
        seen.add(id(owner))
        if isinstance(owner, tuple):
            ahead += [(part, foreign) for part in owner]
        elif isinstance(owner, (dict, list, set)):
            found.append(_State(owner, foreign))
            ahead += [(part, foreign) for part in found[-1].parts()]
        elif isinstance(owner, nn.Module) or not (foreign or callable(owner)):
            attributes, foreign = getattr(owner, "__dict__", None), not isinstance(owner, nn.Module)
            if isinstance(attributes, dict):
                found.append(_State(attributes, foreign))
                ahead += [(part, foreign) for part in found[-1].parts()]
    return found


@contextmanager
def as_it_runs(model: nn.Module) -> Iterator[None]:
    """Let gated delta rules of transformers take the steps that they take when they run, in place of those meant for exporters.

    While a model is exported they solve a triangular system row by row in Python, which rounds otherwise and makes hundreds of
    operations of one (qwen3_next, qwen3_5, olmo_hybrid in transformers 5.23).
    """
    asks, rule = "is_torchdynamo_exporting", "torch_chunk_gated_delta_rule"
    files = {type(module).__module__ for module in model.modules()}
    spaces = [vars(sys.modules[name]) for name in sorted(files & sys.modules.keys())]
    spaces = [space for space in spaces if asks in space and rule in space]
    saved = [space[asks] for space in spaces]
    for space in spaces:
        space[asks] = lambda: False
    try:
        yield
    finally:
        for space, function in zip(spaces, saved, strict=True):
            space[asks] = function
