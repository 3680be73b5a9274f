"""Which probes a diagnosis has: those that were asked, and which of them to measure when all have been predicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from aqnfx.diagnosis.options import DEFAULT_WINDOW, Options
from aqnfx.graph.program import Program
from aqnfx.graph.selector import Selector
from aqnfx.graph.tags import static_size
from aqnfx.probes.data.examples import Data
from aqnfx.probes.measurements import Probe, ProbeKind
from aqnfx.probes.predict import Predictions
from aqnfx.probes.prepare import Prepared, prepare
from aqnfx.probes.probe_sets import plan_probes

Counts = Mapping[ProbeKind, tuple[int, int]]
"""How many probes of a kind are measured: those with the highest predicted cost, and a random sample of the others."""
CHECKS: Counts = {"operator": (4, 0), "layer": (4, 2), "window": (2, 1), "site": (5, 5)}
SPOT_CHECKS: Counts = {"operator": (2, 0), "layer": (2, 1), "site": (2, 2)}
UNREACHED = 2
CRITICAL_SHARE = 2.0
"""A layer whose predicted cost is this many times the median layer's is a neighbour that makes a window worth measuring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedProbes(Prepared):
    """What a diagnosis begins with: a tagged program, its samples, and the probes that were asked."""

    probes: tuple[Probe, ...]


def prepare_probes(
    model: nn.Module | Program | str | Path, data: Data, options: Options, *, tokenizer: Any = None,
    tell: Callable[[str], None] = lambda _text: None,
) -> PreparedProbes:  # fmt: skip
    """Load, encode, trace and tag, and say what to probe; raises subclasses of :class:`~aqnfx.errors.AqnfxError`."""
    # A run that stops early looks at its first batches: they must be like all others.
    in_order = options.adaptive or options.budget is not None
    asked: list[tuple[tuple[Probe, ...], tuple[str, ...]]] = []
    ready = prepare(
        model, data, options, where=options.where, task=options.task, in_order=in_order, tokenizer=tokenizer, tell=tell,
        check=lambda program: asked.append(asked_probes(program, options)),
    )  # fmt: skip
    ((probes, notes),) = asked
    kept = {field.name: getattr(ready, field.name) for field in dataclasses.fields(ready)}
    return PreparedProbes(**kept | {"probes": probes, "notes": (*ready.notes, *notes)})


def choose_probes(
    probes: Sequence[Probe], predictions: Predictions, level: float, counts: Counts, *, seed: int = 0
) -> tuple[Probe, ...]:
    """Return the probes to measure, in the order of ``probes``.

    Of every kind those with the highest predicted KL at ``level`` and a random sample of the others; every window that
    holds or touches a layer whose predicted cost is at least twice the median layer's, where ``counts`` names windows;
    all sites at once. Two probes of each kind without a path to the output are measured as well: that the cost is nothing
    is then seen, not assumed.
    """
    cost = {probe: float(np.nan_to_num(predictions.kl(probe.sites, level).sum(), nan=-1.0)) for probe in probes}
    rng = np.random.default_rng(seed)
    chosen: set[Probe] = {probe for probe in probes if probe.kind == "all"}
    for kind, (top, others) in counts.items():
        ranked = sorted((p for p in probes if p.kind == kind), key=lambda p: -cost[p])
        chosen |= {*ranked[:top], *(ranked[top + i] for i in rng.permutation(max(0, len(ranked) - top))[:others])}
        chosen |= set([p for p in ranked if cost[p] < 0][:UNREACHED])
    if "window" in counts:
        chosen |= _critical_windows(probes, cost)
    return tuple(probe for probe in probes if probe in chosen)


def _critical_windows(probes: Sequence[Probe], cost: dict[Probe, float]) -> set[Probe]:
    """Return the windows with a critical layer inside or next to them."""
    layers = [probe for probe in probes if probe.kind == "layer"]
    finite = [cost[p] for p in layers if cost[p] >= 0]
    if not finite:
        return set()
    limit = CRITICAL_SHARE * float(np.median(finite))
    critical = {p.layers[0] for p in layers if cost[p] >= limit > 0}
    names = [p.layers[0] for p in layers]
    touched = {n for i, n in enumerate(names) if critical & set(names[max(0, i - 1) : i + 2])}
    return {p for p in probes if p.kind == "window" and touched & set(p.layers)}


def asked_probes(
    program: Program, options: Options, *, kinds: tuple[ProbeKind, ...] | None = None
) -> tuple[tuple[Probe, ...], tuple[str, ...]]:
    """Return the probes that the options ask for (or those of ``kinds``), and notes on what they leave out."""
    selector, window, notes = Selector.parse(options.where), options.window, []
    kinds = options.probes if kinds is None else kinds
    if window is None:
        per_stack: dict[str | None, set[int]] = {}
        for site in program.select(selector):
            if site.layer is not None:
                per_stack.setdefault(site.stack, set()).add(site.layer)
        longest = max(map(len, per_stack.values()), default=0)
        window = min(DEFAULT_WINDOW, max(longest, 1))
        if window < DEFAULT_WINDOW and "window" in kinds:
            if window < 2 and len(kinds) > 1:
                kinds = tuple(kind for kind in kinds if kind != "window")
                notes.append(f"{longest} selected layer has no window of several layers, so none was probed")
            else:
                notes.append(f"windows hold {window} layers, because no more are selected")
    if options.checkpoint and options.method == "measure" and options.metric != "fisher-trace":
        notes.append("nothing was predicted, so there was nothing to checkpoint")
    if options.method == "measure":
        plain = Options()
        unread = ["outlier_threshold"] if options.outlier_threshold != plain.outlier_threshold else []
        unread += ["draws"] if options.draws != plain.draws and options.metric is None else []
        if unread:
            notes.append(f"{' and '.join(unread)} did nothing: method measure predicts nothing")
    if "window" in kinds and options.step > window:
        notes.append(f"step {options.step} is larger than the window of {window}: some layers are in no window")
    probes = plan_probes(program, selector, kinds=kinds, window=window, step=options.step)
    shared = _shared_sites(program, {s for p in probes for s in p.sites}) if not options.perturbation.idempotent else []
    if shared:
        notes.append(
            f"{shared[0]}{f' and {len(shared) - 1} more' if len(shared) > 1 else ''} computes one value for the whole "
            "batch: its noise is the same for all samples, so intervals there hold the choice of samples only"
        )
    return probes, tuple(notes)


def _shared_sites(program: Program, chosen: set[str]) -> list[str]:
    """Return the sites among ``chosen`` whose value has no batch dimension although the inputs have a dynamic one."""
    first = next(n for n in program.graph.nodes if n.op == "placeholder").meta["val"]
    if not first.dim() or isinstance(static_size(first.shape[0]), int):
        return []
    values = {site: place.value.meta["val"] for site, place in program.places.items() if site in chosen}
    return [s for s, v in values.items() if not v.dim() or isinstance(static_size(v.shape[0]), int)]
