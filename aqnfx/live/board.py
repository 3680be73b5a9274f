"""The switches of noisy operators, and the models that they hold for: the state behind :mod:`aqnfx.noisy_ops`."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from aqnfx.graph.opkinds import OP_SETS
from aqnfx.graph.sites import Site
from aqnfx.live.instrument import Handle, instrument
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


class Board:
    """The switches, and the models that they hold for."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.switches = Switches()
        self.handles: weakref.WeakKeyDictionary[nn.Module, Handle] = weakref.WeakKeyDictionary()
        self.kinds: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self.inner: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
        self.seed = 0
        self.phase = "unknown"
        self.counts: dict[str, int] = {}
        self.layers: dict[int | str, dict[str, int]] = {}

    def change(self, **changes: Any) -> None:
        """Set switches; where a model does not have what is named, all stays as it was."""
        with self.lock:
            for model in [model for model, handle in self.handles.items() if handle.removed]:
                del self.handles[model]  # it could not be captured, and said so
            self.book()
            before, self.switches = self.switches, dataclasses.replace(self.switches, **changes)
            try:
                for model in list(self.handles):
                    self.apply(model)
            except Exception:
                self.switches = before
                for model in list(self.handles):
                    self.apply(model)
                raise

    def apply(self, model: nn.Module) -> None:
        handle, wanted = self.handles[model], self.switches
        if self.kinds[model] != wanted.error_type:  # a constant of the graph
            state = handle.state_dict()
            handle.remove()
            handle = self._instrument(model)
            handle.load_state_dict(state)
        handle.set_noise(**wanted.settings())

    def register(self, model: nn.Module, inner: Any) -> int:
        with self.lock:
            if model not in self.handles or self.handles[model].removed:
                self.inner[model] = inner
                self._instrument(model)
                self.handles[model].set_noise(seed=self.seed)
                try:
                    self.apply(model)
                except Exception:
                    self.forget(model)
                    raise
            return len(self.handles[model].layers)

    def forget(self, model: nn.Module) -> None:
        with self.lock:
            self.book()
            if (handle := self.handles.pop(model, None)) is not None:
                handle.remove()

    def _instrument(self, model: nn.Module) -> Handle:
        kind = self.switches.error_type
        handle = instrument(model, pipeline=f"insert-noise{{where=ops:all kind={kind}}}", inner=self.inner[model])
        self.handles[model], self.kinds[model] = handle, kind
        return handle

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
