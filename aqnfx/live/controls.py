"""Controls of a live model: which sites are noisy now, in whatever graphs Dynamo has made of the model so far or will."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aqnfx.errors import InputError, SelectorError
from aqnfx.graph.controls import (
    CHANNELS,
    LEVEL,
    Phases,
    by_phase,
    channel_mask,
    check_level,
    control_name,
    phases_of,
    whole_number,
)
from aqnfx.graph.controls import RUN as RUN_PART
from aqnfx.graph.edit import BUFFER_PREFIX
from aqnfx.graph.selector import Selector, check_layers, selector_from
from aqnfx.graph.sites import Site
from aqnfx.numerics.noise import as_int32

RUN = BUFFER_PREFIX + control_name(None, RUN_PART)


class Control(NamedTuple):
    """A control of a rewritten graph: the name of its buffer, its value at first, and which ``part`` of which site it is."""

    name: str
    value: Tensor
    site: Site | None
    part: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What ``noise`` was asked for: sites that ``selector`` does not match are off, None leaves a value as it was.

    ``scale``: a factor on the level of each site.
    """

    selector: Selector | None = None
    level: float | None = None
    phases: Phases | None = None
    channels: Any = None
    scale: Callable[[Site], float] | None = None

    @property
    def is_on(self) -> bool:
        """Whether it may make a site noisy, as far as can be told without the sites."""
        return self.level != 0.0 and (self.selector is None or not self.selector.nothing)

    def __post_init__(self) -> None:
        by_phase(0.0 if self.level is None else self.level, self.phases or "forward")


@dataclass(slots=True, kw_only=True)
class _SiteState:
    site: Site
    default: tuple[float, float] | None = None  # forward and backward level, as the pass left them
    level: str = ""  # name of the control that holds the levels
    widths: dict[str, int] = field(default_factory=dict)  # name of a mask -> number of channels
    levels: tuple[float, float] = (0.0, 0.0)


class LiveControls:
    """The control tensors of one live model, by name; graphs read them anew at every call.

    A control is never written in place: setting one puts another tensor in its place, so that the backward pass of a
    forward that has run keeps what that forward had. ``tensors`` are inputs of the graphs, ``layers`` the (stack, index) pairs
    of the model; ``version`` grows with every change but that of the step. Where there is a ``source``, seed and step of every
    call are what it returns. What is set holds for calls of all threads.
    """

    def __init__(self, layers: tuple[tuple[str, int], ...] = ()) -> None:
        self.layers = layers
        self.tensors: dict[str, Tensor] = {}
        self.seed, self.step, self.row_offset = 0, 0, 0
        self._sites: dict[str, _SiteState] = {}
        self.source: Callable[[], tuple[int, int]] | None = None
        self._settings: list[Setting] = [Setting()]
        self._seen: dict[int, list[int]] = {}  # id of a setting in a block -> calls, and those in which a site was on
        self.version = 0
        self.lock = threading.RLock()
        self.put_run()

    @property
    def sites(self) -> dict[str, Site]:
        """Sites with a control in the graphs that were captured so far, by id."""
        return {name: state.site for name, state in self._sites.items()}

    def levels(self, site: str) -> tuple[float, float]:
        """Return the forward and the backward level that ``site`` has now."""
        return self._sites[site].levels

    # Graphs ----------------------------------------------------------------------------------------------------------

    def adopt(self, control: Control) -> str:
        """Take a control buffer of a new graph and return the name that its tensor has here.

        Graphs of one model share the tensor of a name. A mask of channels that has another width in another graph (a
        dimension that Dynamo fixed at first) is another tensor.
        """
        name, value, site, part = control
        with self.lock:
            known = self.tensors.get(name)
            if known is not None and known.shape != value.shape:
                name = f"{name}_{'x'.join(map(str, value.shape))}"
            if name not in self.tensors:
                self.tensors[name] = value.detach().clone()
            if site is None:
                return name
            state = self._sites.setdefault(site.id, _SiteState(site=site))
            if part == LEVEL and state.default is None:
                state.default, state.level = (float(value[0]), float(value[1])), name
            elif part == CHANNELS:
                state.widths[name] = value.numel()
            if state.default is not None:
                self._apply(state)
            return name

    def put_run(self) -> Tensor:
        """Make seed, step and row offset those of graphs that run outside of a call, and return them."""
        return self._put_run(self.seed, self.step)

    def next_run(self) -> Tensor:
        """Return seed, step and row offset of a call that begins, and go on to the next step: no two calls have the same."""
        with self.lock:
            seed, step = (self.seed, self.step) if self.source is None else self.source()
            self.step += 1
            return self._put_run(seed, step)

    def _put_run(self, seed: int, step: int) -> Tensor:
        run = [as_int32(value) for value in (seed, step, self.row_offset)]
        device = next(iter(self.tensors.values())).device if self.tensors else "cpu"
        made = self.tensors[RUN] = torch.tensor(run, dtype=torch.int32, device=device)
        return made

    def on(self) -> list[str]:
        """Return the ids of the sites that are noisy now."""
        with self.lock:
            return [name for name, state in self._sites.items() if any(state.levels)]

    def saw_call(self, fired: bool) -> None:
        """Note for the setting that is on top that the model was called, and whether a site was on in what ran."""
        with self.lock:
            if (seen := self._seen.get(id(self._settings[-1]))) is not None:
                seen[0] += 1
                seen[1] += fired

    # Settings --------------------------------------------------------------------------------------------------------

    def make(
        self, *, where: str | None = None, layers: Iterable[int | str] | int | str | None = None,
        ops: Iterable[str] | str | None = None, modules: Iterable[str] | str | None = None,
        sites: Iterable[str] | str | None = None, **rest: Any,
    ) -> Setting:  # fmt: skip
        """Return a checked setting; raises :class:`SelectorError` for layers and sites that the model does not have."""
        if where is not None and any(value is not None for value in (layers, ops, modules, sites)):
            raise InputError("choose the sites by where= or by layers=, ops=, modules=, sites=, not by both")
        chosen = [layers] if isinstance(layers, (int, str)) else layers
        selector = selector_from(where=where, layers=chosen, ops=ops, modules=modules, sites=sites)
        setting = Setting(selector=selector, **rest)
        if selector is not None:
            check_layers(selector, self.layers)
            if self._sites and not self.selects_any(setting):
                raise nothing_matched(setting, self)
        self._check_channels(setting)
        return setting

    def selects_any(self, setting: Setting) -> bool:
        """Return whether a setting selects a site of the graphs that there are, or is one that means to select none."""
        selector = setting.selector
        return selector is None or selector.nothing or any(selector.matches(site) for site in self.sites.values())

    def _check_channels(self, setting: Setting) -> None:
        if setting.channels is None:
            return
        chosen = [s for s in self._sites.values() if setting.selector is None or setting.selector.matches(s.site)]
        for state in chosen:
            if not state.widths:
                raise InputError(f"{state.site.id} has no fixed channel dimension, so noise cannot be restricted to channels")
            for width in state.widths.values():
                channel_mask(setting.channels, width, state.site.id)

    def push(self, setting: Setting) -> None:
        """Make ``setting`` hold on top of those before it; nothing changes where it makes a level that does not exist."""
        with self.lock:
            self._apply_all([*self._settings, setting])
            self._seen[id(setting)] = [0, 0]

    def pop(self, setting: Setting) -> tuple[int, int]:
        """Take back a setting that was pushed; return the calls that were made under it, and those in which a site was on."""
        with self.lock:
            self._apply_all([one for one in self._settings if one is not setting])
            calls, fired = self._seen.pop(id(setting))
            return calls, fired

    def replace(self, setting: Setting) -> None:
        """Make ``setting`` what holds below all that are pushed; nothing changes where it makes a level that does not exist."""
        with self.lock:
            self._apply_all([setting, *self._settings[1:]])

    def _apply_all(self, settings: list[Setting]) -> None:
        made = [(state, *_levels_of(state, settings)) for state in self._sites.values()]
        self._settings = settings
        for state, levels, channels in made:
            self._set(state, levels, channels)
        self.version += 1

    def _apply(self, state: _SiteState) -> None:
        self._set(state, *_levels_of(state, self._settings))
        self.version += 1

    def _set(self, state: _SiteState, levels: tuple[float, float], channels: Any) -> None:
        """Give a site its level and channels: other tensors, where they changed."""
        state.levels = levels
        self._put(state.level, torch.tensor(levels))
        for name, width in state.widths.items():
            self._put(name, torch.ones(width) if channels is None else channel_mask(channels, width, state.site.id))

    def _put(self, name: str, value: Tensor) -> None:
        known = self.tensors[name]
        if not torch.equal(known.cpu(), value):
            self.tensors[name] = value.to(known.device)


def _levels_of(state: _SiteState, settings: Sequence[Setting]) -> tuple[tuple[float, float], Any]:
    """Return forward and backward level of a site and its channels, as all settings together make them."""
    forward, backward = state.default or (0.0, 0.0)
    channels: Any = None
    for setting in settings:
        if setting.selector is not None and not setting.selector.matches(state.site):
            forward = backward = 0.0
            continue
        if setting.level is not None or setting.phases is not None:
            level = max(forward, backward) if setting.level is None else setting.level
            forward, backward = by_phase(level, setting.phases or phases_of(forward, backward))
        if setting.scale is not None:
            factor = setting.scale(state.site)
            what = f"the level of {state.site.id}, scaled by {factor!r},"
            forward, backward = (check_level(level * check_level(factor, what), what) for level in (forward, backward))
        if setting.channels is not None:
            channels = setting.channels
    return (forward, backward), channels


def run_values(**values: Any) -> dict[str, int]:
    """Return the given ones of seed, step and row offset; raises :class:`InputError` for what is no whole number."""
    return {name: whole_number(value, name) for name, value in values.items() if value is not None}


def run_state(controls: LiveControls) -> dict[str, int]:
    """Return what continues a noise stream: seed, step and row offset."""
    return {"seed": controls.seed, "step": controls.step, "row_offset": controls.row_offset}


def load_run_state(controls: LiveControls, state: Mapping[str, Any]) -> None:
    """Continue the stream that :func:`run_state` described; raises :class:`InputError` for anything else."""
    wanted = ("seed", "step", "row_offset")
    if sorted(state) != sorted(wanted) or not all(isinstance(state[key], int) for key in wanted):
        found = ", ".join(map(str, state)) or "nothing"
        raise InputError(f"the state of a handle has the integers {', '.join(wanted)}; found {found}")
    controls.seed, controls.step, controls.row_offset = (state[key] for key in wanted)
    controls.put_run()


def nothing_matched(setting: Setting, controls: LiveControls) -> SelectorError:
    """Return the error of a setting that selects nothing in the graphs that there are."""
    return SelectorError(f"{setting.selector} selects none of the {len(controls.sites)} sites with controls")


