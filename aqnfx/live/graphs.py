"""A graph of a live model as it runs: its sites, which of them were on, and how often."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aqnfx.live.code import KEPT
from aqnfx.live.controls import LiveControls


@dataclass(slots=True, eq=False)
class State:
    """Which sites of a graph are noisy, (forward, on gradients), and how often it ran both ways."""

    sites: tuple[frozenset[str], frozenset[str]]
    calls: list[int] = field(default_factory=lambda: [0, 0])
    dropped: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class LiveGraph:
    """One graph of a model as it runs: its sites, and how often it ran with which of them on.

    ``fragment`` is the number of the code that it was captured from: graphs of the same fragment stand for each other
    (prefill and decoding), a graph break starts another; a graph that is ``whole`` is all of a call of the model.
    ``switched``: id of a site with controls as the code has it -> its id in the model. ``hits``: site -> injections, forward
    and on gradients, of states that were dropped.
    """

    fragment: int
    switched: Mapping[str, str]
    all_sites: tuple[str, ...]
    modules: frozenset[str]
    whole: bool = False
    states: dict[tuple[frozenset[str], frozenset[str]], State] = field(default_factory=dict)
    hits: dict[str, list[int]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def state(self, controls: LiveControls) -> tuple[State, frozenset[str]]:
        """Return the state that the controls make now, and the ids in the code of the sites that are on."""
        levels = {site: controls.levels(site) for site in self.switched.values()}
        forward, backward = (frozenset(site for site, level in levels.items() if level[phase]) for phase in (0, 1))
        active = frozenset(own for own, site in self.switched.items() if any(levels[site]))
        with self._lock:
            found = self.states.pop((forward, backward), None) or State((forward, backward))
            if len(self.states) >= KEPT:
                self._drop(self.states.pop(next(iter(self.states))))
            self.states[forward, backward] = found
        return found, active

    def count(self, state: State, phase: int) -> None:
        """Count a forward (0) or a backward pass (1) in ``state``."""
        with self._lock:
            state.calls[phase] += 1
            if state.dropped:
                self._drop(state)

    def _drop(self, state: State) -> None:
        state.dropped = True
        for phase, sites in enumerate(state.sites):
            for site in sites if state.calls[phase] else ():
                self.hits.setdefault(site, [0, 0])[phase] += state.calls[phase]
        state.calls = [0, 0]

    def add_hits(self, found: Mapping[str, dict[str, int]]) -> None:
        """Add how often noise was injected to ``found``: site -> {"forward": n, "backward": n}."""
        with self._lock:
            for site, kept in self.hits.items():
                found[site]["forward"] += kept[0]
                found[site]["backward"] += kept[1]
            for state in self.states.values():
                for sites, times, direction in zip(state.sites, state.calls, ("forward", "backward"), strict=True):
                    for site in sites:
                        found[site][direction] += times

    def reset_hits(self) -> None:
        """Set every counter to 0."""
        with self._lock:
            self.hits.clear()
            for state in self.states.values():
                state.calls = [0, 0]

    def watch(self, state: State, outputs: Any) -> None:
        """Count the backward pass of a call with these outputs, when it comes."""
        wanted = [value for value in outputs if isinstance(value, Tensor) and value.requires_grad]
        if wanted:

            def ran(_: Tensor) -> None:
                self.count(state, 1)

            torch.autograd.graph.register_multi_grad_hook(wanted, ran, mode="any")
