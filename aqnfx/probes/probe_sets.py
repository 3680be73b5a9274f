"""Which sets of sites to perturb together: one probe per operator kind, layer, window, site, or all at once."""

from __future__ import annotations

from collections.abc import Sequence

from aqnfx.errors import InputError, SelectorError
from aqnfx.graph.program import Program
from aqnfx.graph.selector import Selector
from aqnfx.graph.sites import Site
from aqnfx.probes.measurements import Probe, ProbeKind

PROBE_KINDS: tuple[ProbeKind, ...] = ("operator", "layer", "window", "site", "all")


def plan_probes(
    program: Program,
    selector: Selector,
    *,
    kinds: Sequence[ProbeKind] = ("operator", "layer", "window"),
    window: int = 3,
    step: int = 1,
) -> tuple[Probe, ...]:
    """Return the probes of ``kinds`` over the sites that ``selector`` matches, in a fixed order.

    Windows hold ``window`` consecutive layers of one stack and start every ``step`` layers; a stack with fewer layers
    has none. Raises :class:`InputError` for a window or step below 1 or longer than every stack,
    :class:`SelectorError` when no site matches.
    """
    if window < 1 or step < 1:
        raise InputError(f"window {window} and step {step} must be at least 1")
    for kind in kinds:
        if kind not in PROBE_KINDS:
            raise InputError(f"unknown probe kind {kind!r}; known: {', '.join(PROBE_KINDS)}")
    sites = selected(program, selector)
    layers = _by_layer(program, sites)
    probes: list[Probe] = []
    if "operator" in kinds:
        for op in dict.fromkeys(site.op for site in sites):
            probes.append(Probe(kind="operator", key=str(op), sites=tuple(s.id for s in sites if s.op == op)))
    if "layer" in kinds:
        probes += [Probe(kind="layer", key=k, sites=v, layers=(k,)) for stack in layers for k, v in stack.items()]
    if "window" in kinds:
        longest = max((len(stack) for stack in layers), default=0)
        if layers and window > longest:
            raise InputError(
                f"window {window} is longer than the {longest} selected layers; choose --window {longest} or less"
            )
        probes += [p for stack in layers for p in _windows(stack, window, step)]
    if "site" in kinds:
        probes += [
            Probe(kind="site", key=s.id, sites=(s.id,), layers=_label(program, s)) for s in sites
        ]  # fmt: skip
    if "all" in kinds:
        probes.append(Probe(kind="all", key="all", sites=tuple(s.id for s in sites)))
    return tuple(probes)


def selected(program: Program, selector: Selector) -> tuple[Site, ...]:
    """Return the sites that ``selector`` matches; raises :class:`SelectorError` when there is none."""
    if sites := tuple(program.select(selector)):
        return sites
    known = sorted({str(site.op) for site in program.sites})
    raise SelectorError(f"{selector} matches none of {len(program.sites)} sites; operator kinds here: {', '.join(known)}")


def _label(program: Program, site: Site) -> tuple[str, ...]:
    label = program.layer_label(site.stack, site.layer)
    return () if label is None else (label,)


def _by_layer(program: Program, sites: Sequence[Site]) -> list[dict[str, tuple[str, ...]]]:
    """Return, per stack, label -> site ids for the layers that have selected sites."""
    stacks: dict[str | None, dict[str, tuple[str, ...]]] = {}
    for stack, index in program.layers:
        members = tuple(s.id for s in sites if (s.stack, s.layer) == (stack, index))
        if members:
            stacks.setdefault(stack, {})[program.layer_label(stack, index) or ""] = members
    return list(stacks.values())


def _windows(stack: dict[str, tuple[str, ...]], window: int, step: int) -> list[Probe]:
    """Return the windows of consecutive layers; a selection with gaps has none across a gap."""
    labels = list(stack)
    probes = []
    for start in range(0, len(labels) - window + 1, step):
        chosen = tuple(labels[start : start + window])
        first, last = (int(label.rpartition(":")[2]) for label in (chosen[0], chosen[-1]))
        if last - first == window - 1:
            ids = tuple(site for label in chosen for site in stack[label])
            probes.append(Probe(kind="window", key=f"{chosen[0]}-{chosen[-1]}", sites=ids, layers=chosen))
    return probes
