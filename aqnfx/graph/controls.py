"""Control buffers of nodes that perturb: which buffer belongs to which site, and how to set them."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from aqnfx.errors import InputError, PassError
from aqnfx.graph.edit import BUFFER_PREFIX, control_buffer, insert_after
from aqnfx.graph.operands import places
from aqnfx.graph.tags import constant, get_tag
from aqnfx.numerics.noise import as_int32
from aqnfx.ops.count import CountCall

Phases = Literal["forward", "backward", "both"]
PHASES: tuple[Phases, ...] = get_args(Phases)

LEVEL, HITS, KEY, CHANNELS, RUN = "level", "hits", "key", "channels", "run"
"""The parts of a site's controls, and the one that all sites share: seed, step and row offset."""


def stem_of(site: str) -> str:
    """Return how the names of a site's buffers begin, without the prefix of all buffers."""
    # The key tells apart ids that differ in punctuation only.
    return f"noise_{''.join(c if c.isalnum() else '_' for c in site)}_{site_key(site) & 0xFFFF:04x}"


def control_name(site: str | None, part: str) -> str:
    """Return the name of a control buffer, without the prefix of all buffers."""
    return f"noise_{part}" if site is None else f"{stem_of(site)}_{part}"


def site_key(site: str) -> int:
    """Return the site's 32-bit stream key: the start of the SHA-256 of its id, so equal in every trace and process."""
    return as_int32(int.from_bytes(hashlib.sha256(site.encode()).digest()[:4], "little"))


def add_switch(module: GraphModule, site: str, level: Tensor, *, inserted_by: str) -> tuple[Node, Node]:
    """Register the level, fp32 (2,), and the counter of a site; return the nodes that read them.

    Raises :class:`PassError` where the site has controls already: two of them would share one level.
    """
    device = device_of(module)
    if hasattr(module, BUFFER_PREFIX + control_name(site, LEVEL)):
        raise PassError(f"{inserted_by}: {site} has controls already; strip first, or set those")
    parts = {LEVEL: level, HITS: torch.zeros(1, dtype=torch.int64)}
    found = [control(module, part, value.to(device), inserted_by=inserted_by, site=site) for part, value in parts.items()]
    return found[0], found[1]


def control(module: GraphModule, part: str, value: Tensor, *, inserted_by: str, site: str | None) -> Node:
    """Register the control buffer ``part`` of a site, or of all where ``site`` is None; return the node that reads it.

    The tag of that node says which part of which site it is: whoever looks for a control reads that, never the name.
    """
    return control_buffer(module, control_name(site, part), value, inserted_by=inserted_by, site=site, part=part)


def count_after(node: Node, site: str, switch: tuple[Node, Node], *, inserted_by: str) -> None:
    """Insert the counter of a site, as :func:`add_switch` returned it, behind the ``node`` that perturbs there."""
    insert_after(node, CountCall.target, switch, inserted_by=inserted_by, site=site, reroute=False)


def device_of(module: GraphModule) -> torch.device:
    """Return where controls are registered: with the first weights of the model."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def by_phase(level: float, phases: Phases) -> tuple[float, float]:
    """Return the forward and the backward level; raises :class:`InputError` for a level or phases that do not exist."""
    if phases not in PHASES:
        raise InputError(f"phases {phases!r} is not one of {', '.join(PHASES)}")
    check_level(level)
    return level if phases != "backward" else 0.0, level if phases != "forward" else 0.0


def check_level(value: Any, what: str = "noise level") -> float:
    """Return a level or a factor on one; raises :class:`InputError` for what is no number from 0 on, or not one in fp32."""
    try:
        number = float(value)
        held = float(torch.tensor(number, dtype=torch.float32))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(f"{what} {value!r} is not a number") from None
    if not 0.0 <= number < math.inf:
        raise InputError(f"{what} {value!r} must be finite and not negative")
    if math.isinf(held) or (number and not held):
        raise InputError(f"{what} {value!r} is {held:g} in fp32, which levels are held in; give 0, or 1.5e-45 to 3.4e38")
    return number


def whole_number(value: Any, what: str) -> int:
    """Return a seed, step or row offset; raises :class:`InputError` for what is no whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{what} {value!r} is not a whole number") from None


def phases_of(forward: float, backward: float) -> Phases:
    """Return the phases that levels are on in, "forward" where neither is."""
    return "both" if forward and backward else "backward" if backward else "forward"


def channel_mask(channels: Iterable[int] | Tensor, width: int, site: str) -> Tensor:
    """Return 1 for chosen channels and 0 for others, fp32 (width,); ``channels`` are indices or a bool mask.

    Raises :class:`InputError` for a mask of another shape, and for indices that ``site`` does not have.
    """
    if isinstance(channels, Tensor) and channels.dtype == torch.bool:
        if channels.shape != (width,):
            raise InputError(f"channel mask of shape {list(channels.shape)} given; {site} has {width} channels")
        return channels.detach().cpu().to(torch.float32)
    indices = sorted({int(c) for c in channels})
    if not indices or indices[0] < 0 or indices[-1] >= width:
        raise InputError(f"channels {indices[:5]} given; {site} has channels 0-{width - 1}")
    mask = torch.zeros(width)
    mask[indices] = 1.0
    return mask


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteControl:
    """Buffers of one site.

    ``level`` fp32 (2,): forward and backward; ``channels`` fp32: a factor per channel, or None; ``hits`` int64 (1,).
    """

    level: Tensor
    channels: Tensor | None
    hits: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseControls:
    """All controls of one graph; ``run`` int32 (3,) holds seed, step and row offset, shared by all sites with noise.

    The level of a fake-quant node is a factor on the error of its format: 1 is the format, 0 the clean value.
    """

    run: Tensor
    sites: Mapping[str, SiteControl]

    @classmethod
    def of(cls, module: GraphModule) -> NoiseControls:
        """Collect the buffers that passes registered on ``module``; they outlive ``lower-ops``."""
        found: dict[str, dict[str, Tensor]] = {}
        run = torch.zeros(3, dtype=torch.int32)
        for node in module.graph.nodes:
            tag = get_tag(node)
            if node.op != "get_attr" or tag.part is None:
                continue
            if tag.site is None:
                run = constant(module, node)
            else:
                found.setdefault(tag.site, {})[tag.part] = constant(module, node)
        sites = {
            site: SiteControl(level=part[LEVEL], channels=part.get(CHANNELS), hits=part.get(HITS))
            for site in dict.fromkeys([*places(module.graph), *found])
            if (part := found.get(site)) is not None
        }
        return cls(run=run, sites=sites)

    def set(
        self, chosen: Container[str], *, level: float | None = None, phases: Phases | None = None, channels: Any = None,
        seed: int | None = None, step: int | None = None, row_offset: int | None = None,
    ) -> None:  # fmt: skip
        """Set the ``chosen`` sites to ``level``, and all others off; without a level the chosen ones keep theirs."""
        for site, one in self.sites.items():
            if site not in chosen:
                self.set_level(site, 0.0)
                continue
            if level is not None or phases is not None:
                forward, backward = (float(value) for value in one.level)
                on = phases or phases_of(forward, backward)
                self.set_level(site, max(forward, backward) if level is None else level, on)
            if channels is not None:
                self.set_channels(site, channels)
        self.set_run(seed=seed, step=step, row_offset=row_offset)

    def set_run(self, *, seed: int | None = None, step: int | None = None, row_offset: int | None = None) -> None:
        """Set seed, step and row offset (each any Python integer; the low 32 bits count)."""
        given = {"seed": seed, "step": step, "row_offset": row_offset}
        numbers = [None if value is None else whole_number(value, name) for name, value in given.items()]
        for index, number in enumerate(numbers):
            if number is not None:
                self.run[index] = as_int32(number)

    def set_level(self, site: str, level: float, phases: Phases = "forward") -> None:
        """Set the noise level of one site; the phases that are not named are switched off."""
        buffer = self.sites[site].level
        buffer[0], buffer[1] = by_phase(level, phases)

    def set_channels(self, site: str, channels: Iterable[int] | Tensor | None) -> None:
        """Restrict the noise of a site to ``channels`` (indices or a bool mask); None means all of them."""
        mask = self.sites[site].channels
        if channels is None:
            if mask is not None:
                mask.fill_(True)
            return
        if mask is None:
            raise InputError(f"{site} has no fixed channel dimension, so noise cannot be restricted to channels")
        mask.copy_(channel_mask(channels, mask.numel(), site))

    def hits(self) -> dict[str, int]:
        """Return how often each site injected forward noise since :meth:`reset_hits`."""
        return {site: int(c.hits) for site, c in self.sites.items() if c.hits is not None}

    def reset_hits(self) -> None:
        """Set every injection counter to 0."""
        for control in self.sites.values():
            if control.hits is not None:
                control.hits.zero_()

    def state(self) -> list[Tensor]:
        """Return copies of all controls but the counters, for :meth:`restore`."""
        return [t.clone() for t in self._tensors()]

    def restore(self, state: list[Tensor]) -> None:
        """Write back what :meth:`state` returned."""
        for tensor, saved in zip(self._tensors(), state, strict=True):
            tensor.copy_(saved)

    def _tensors(self) -> list[Tensor]:
        found: list[Any] = [self.run]
        for control in self.sites.values():
            found += [control.level] if control.channels is None else [control.level, control.channels]
        return found
