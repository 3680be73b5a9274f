"""The switches of noisy operators, and the models that they hold for: the state behind :mod:`aqnfx.noisy_ops`."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from aqnfx.graph.opkinds import OP_SETS
from aqnfx.graph.sites import Site
from aqnfx.live.instrument import Handle, prepare
from aqnfx.numerics.noise import NoiseKind

OPERATORS = ("matmul", "bmm", "linear", "softmax", "silu", "gelu", "layer_norm", "rms_norm")
"""Kinds that can be selected. As ever ``matmul`` means products with weights too; ``linear`` means those alone."""
ERROR_TYPES = tuple(map(str, NoiseKind))
PHASES = ("unknown", "rollout", "actor_forward", "actor_backward")
COUNTED = {"rollout": "rollout", "actor_forward": "actor", "actor_backward": "actor", "unknown": "unknown"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Switches:
    """All that can be switched; None selects everything."""

    enabled: bool = False
    error_scale: float = 1e-5
    error_type: str = "relative_gaussian"
    all_ops_mode: bool = False
    forward: bool = True
    backward: bool = True
    layers: frozenset[int] | None = None
    operators: frozenset[str] | None = None
    channels: tuple[int, ...] | None = None
    layer_scales: Mapping[int, float] = field(default_factory=dict)
    operator_scales: Mapping[str, float] = field(default_factory=dict)

    def kinds(self) -> frozenset[str]:
        """Return the operator kinds that are noisy."""
        if self.operators is None:
            return frozenset(map(str, OP_SETS["extended" if self.all_ops_mode else "core"]))
        return self.operators | ({"linear"} if "matmul" in self.operators else set())

    def scale(self, site: Site) -> float:
        """Return the factor on the error scale of a site."""
        layer = 1.0 if site.layer is None else self.layer_scales.get(site.layer, 1.0)
        return layer * self.operator_scales.get(str(site.op), 1.0)

    def settings(self) -> dict[str, Any]:
        """Return what a handle is told."""
        phases = "both" if self.forward and self.backward else "backward" if self.backward else "forward"
        off = not self.enabled or not (self.forward or self.backward) or self.layers == frozenset() or not self.kinds()
        if off:
            return {"level": 0.0}
        layers = None if self.layers is None else sorted(self.layers)
        return {
            "level": self.error_scale, "phases": phases, "layers": layers, "ops": sorted(self.kinds()),
            "channels": self.channels, "scale": self.scale,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Block:
    """What a ``with`` block of one thread switches until it ends, on top of what is switched and of earlier blocks."""

    key: object
    thread: int
    changes: Mapping[str, Any]


class Board:
    """The switches, and the models that they hold for; ``base`` are the switches without those of open ``blocks``."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.base = Switches()
        self.switches = self.base
        self.handles: weakref.WeakKeyDictionary[nn.Module, Handle] = weakref.WeakKeyDictionary()
        self.kinds: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self.inner: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
        self.blocks: tuple[Block, ...] = ()
        self.seed: int | None = None  # None: noise follows torch's generator
        self.phase = "unknown"
        self.counts: dict[str, int] = {}
        self.layers: dict[int | str, dict[str, int]] = {}

    def change(self, **changes: Any) -> None:
        """Set switches; where a model does not have what is named, all stays as it was.

        A thread that is in a block changes what the block switches, until its end.
        """
        with self.lock:
            mine = next((block for block in reversed(self.blocks) if block.thread == threading.get_ident()), None)
            own = {name: value for name, value in changes.items() if mine is not None and name in mine.changes}
            blocks = tuple(
                dataclasses.replace(one, changes={**one.changes, **own}) if one is mine else one for one in self.blocks
            )
            rest = {name: value for name, value in changes.items() if name not in own}
            self._switch(dataclasses.replace(self.base, **rest), blocks)

    @contextmanager
    def block(self, **changes: Any) -> Iterator[None]:
        """Set switches inside a ``with`` block. Of blocks of several threads that of the last that began and goes on counts."""
        key = object()
        with self.lock:
            self._switch(self.base, (*self.blocks, Block(key, threading.get_ident(), changes)))
        try:
            yield
        finally:
            with self.lock:
                self._switch(self.base, tuple(block for block in self.blocks if block.key is not key))

    def _switch(self, base: Switches, blocks: tuple[Block, ...]) -> None:
        for model in [model for model, handle in self.handles.items() if handle.removed]:
            del self.handles[model]  # it could not be captured, and said so
        self.book()
        before = (self.base, self.blocks, self.switches)
        changes = {name: value for block in blocks for name, value in block.changes.items()}
        self.base, self.blocks, self.switches = base, blocks, dataclasses.replace(base, **changes)
        try:
            for model in list(self.handles):
                self.apply(model)
        except Exception:
            self.base, self.blocks, self.switches = before
            for model in list(self.handles):
                self.apply(model)
            raise

    def apply(self, model: nn.Module) -> None:
        handle = self.handles[model]
        if self.kinds[model] != self.switches.error_type:  # a constant of the graph
            self._instrument(model, instead_of=handle)
        else:
            self._set(handle)

    def _set(self, handle: Handle) -> None:
        settings = self.switches.settings()
        handle.set_noise(**settings)
        follows = self.seed is None and settings["level"] > 0.0
        handle.controls.source = _from_generator if follows else None

    def reseed(self, seed: int | None) -> None:
        """Start the noise of all models from ``seed``, and of those that follow; None: let it follow torch's generator."""
        with self.lock:
            self.seed = seed
            for handle in [handle for handle in self.handles.values() if not handle.removed]:
                handle.load_state_dict({"seed": seed or 0, "step": 0, "row_offset": 0})
                self._set(handle)

    def register(self, model: nn.Module, inner: Any) -> int:
        with self.lock:
            if model not in self.handles or self.handles[model].removed:
                self.inner[model] = inner
                self._instrument(model)
            return len(self.handles[model].layers)

    def forget(self, model: nn.Module) -> None:
        with self.lock:
            self.book()
            if (handle := self.handles.pop(model, None)) is not None:
                handle.remove()

    def _instrument(self, model: nn.Module, instead_of: Handle | None = None) -> None:
        """Let a model run by a handle that is set already: no call finds it without."""
        kind = self.switches.error_type
        handle = prepare(model, pipeline=f"insert-noise{{where=ops:all kind={kind}}}", inner=self.inner[model])
        state = {"seed": self.seed or 0, "step": 0, "row_offset": 0} if instead_of is None else instead_of.state_dict()
        handle.load_state_dict(state)
        self._set(handle)
        self.handles[model], self.kinds[model] = handle.install(instead_of), kind

    def book(self) -> None:
        """Add what was injected since the last time to the counters of the current phase and of the layers."""
        for handle in [handle for handle in self.handles.values() if not handle.removed]:
            for name, hits in handle.stats().items():
                site = handle.sites[name]
                layer = self.layers.setdefault("unknown" if site.layer is None else site.layer, {"forward": 0, "backward": 0})
                for direction, count in hits.items():
                    key = f"{COUNTED[self.phase]}_{direction}"
                    self.counts[key] = self.counts.get(key, 0) + count
                    layer[direction] += count
            handle.reset_stats()


def _from_generator() -> tuple[int, int]:
    """Return a seed and a step for one call, drawn from torch's default generator on the CPU."""
    seed, step = torch.randint(-(1 << 31), 1 << 31, (2,), dtype=torch.int64, device="cpu").tolist()
    return seed, step
