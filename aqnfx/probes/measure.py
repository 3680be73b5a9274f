"""measure: run a Program with noise at chosen sites and score the result against its clean run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aqnfx.errors import InputError, Interrupted, ProbeError
from aqnfx.graph.program import Program
from aqnfx.probes.data import Batch
from aqnfx.probes.forward import Forward
from aqnfx.probes.journal import Item, Journal, Scores
from aqnfx.probes.measurements import Measurements, Probe
from aqnfx.probes.memory import peak_memory_mib
from aqnfx.probes.replay import Engine, WholeGraph
from aqnfx.probes.tasks import Reference, reference, score

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What to measure: every probe at every level with every seed; the scores of ``task`` are reported at ``base_level``.

    Raises :class:`InputError` for empty or repeated levels or seeds, levels that are not positive and finite, and a
    base level that is not among the levels.
    """

    probes: tuple[Probe, ...]
    levels: tuple[float, ...]
    seeds: tuple[int, ...]
    base_level: float
    task: str

    def __post_init__(self) -> None:
        for name in ("probes", "levels", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                found = ", ".join(f"{v.kind} {v.key}" if isinstance(v, Probe) else str(v) for v in values[:10])
                raise InputError(f"{name} must be given and differ from each other, found {found or 'none'}")
        for level in self.levels:
            if not 0.0 < level < float("inf"):
                raise InputError(f"noise level {level} must be positive and finite")
        if self.base_level not in self.levels:
            raise InputError(f"base level {self.base_level} is not among the levels {', '.join(map(str, self.levels))}")

    @property
    def size(self) -> int:
        """Noisy runs per batch."""
        return len(self.probes) * len(self.levels) * len(self.seeds)


@dataclass(slots=True)
class _Run:
    """The state of one measuring run."""

    program: Program
    engine: Engine
    sweep: Sweep
    journal: Journal | None
    progress: Progress
    done: dict[Item, Scores] = field(default_factory=dict)
    clean: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    current: Probe | None = None
    fired: set[Probe] = field(default_factory=set)

    def batch(self, index: int, batch: Batch) -> None:
        """Measure what is not yet done of one batch: one clean run, then every probe, level and seed."""
        controls = self.program.controls
        controls.set_run(row_offset=batch.row_offset, step=0)
        self._switch(None, 0.0)
        ref, clean = reference(batch, self.engine.clean(batch))
        self.clean[index] = {**clean, "tokens": batch.score_mask[: batch.size].sum(1).cpu().numpy()}
        for p, probe in enumerate(self.sweep.probes):
            for lv, level in enumerate(self.sweep.levels):
                for k, seed in enumerate(self.sweep.seeds):
                    item = (index, p, lv, k)
                    if item not in self.done:
                        self._switch(probe, level)
                        controls.set_run(seed=seed)
                        self._item(item, batch, ref, probe)
                    self.progress(len(self.done), -1)

    def _item(self, item: Item, batch: Batch, ref: Reference, probe: Probe) -> None:
        check = probe not in self.fired
        if check:
            self.program.controls.reset_hits()
        logits = self.engine.noisy(probe.sites)
        if check:
            self._check_fired(probe)
        scores = {name: values.tolist() for name, values in score(ref, logits).items()}
        self.done[item] = scores
        if self.journal is not None:
            self.journal.add(item, scores)

    def _switch(self, probe: Probe | None, level: float) -> None:
        """Switch the noise of the current probe off and of ``probe`` on."""
        controls = self.program.controls
        if self.current is not None and self.current is not probe:
            for site in self.current.sites:
                controls.set_level(site, 0.0)
        for site in probe.sites if probe is not None else ():
            controls.set_level(site, level)
        self.current = probe

    def _check_fired(self, probe: Probe) -> None:
        hit = {site for site, count in self.program.controls.hits().items() if count}
        if hit != set(probe.sites):
            missed, extra = set(probe.sites) - hit, hit - set(probe.sites)
            raise ProbeError(
                f"probe {probe.kind} {probe.key!r} fired at {len(hit)} sites instead of {len(probe.sites)}; "
                f"silent: {', '.join(sorted(missed)[:3]) or 'none'}; unasked: {', '.join(sorted(extra)[:3]) or 'none'}"
            )
        self.fired.add(probe)


def measure(
    program: Program,
    forward: Forward | Engine,
    batches: Sequence[Batch],
    sweep: Sweep,
    *,
    journal: Journal | None = None,
    progress: Progress | None = None,
    noise_kind: str = "relative_gaussian",
    provenance: Mapping[str, Any] | None = None,
) -> Measurements:
    """Run the sweep over ``batches`` and return per-sample scores of the finished part.

    ``program`` carries noise nodes at every site of every probe and ``forward`` runs it: one of
    :mod:`aqnfx.probes.forward`, or an engine of :mod:`aqnfx.probes.replay`. The same seed gives the same noise at a site
    in every configuration (common random numbers). Batches are the outer loop: one clean run and its reference
    serve all configurations of a batch. Items in ``journal`` are not run again. On ``KeyboardInterrupt`` the
    finished batches are returned with ``complete=False`` (of a first batch, the probes that are finished on it);
    with nothing finished :class:`Interrupted` is raised. Raises :class:`ProbeError` when a probe fires at other
    sites than its own or the logits are not finite.
    """
    missing = sorted({s for p in sweep.probes for s in p.sites} - set(program.controls.sites))
    if missing:
        raise ProbeError(
            f"{len(missing)} probed sites have no noise node, first {missing[0]}; insert noise there first"
        )
    if not batches:
        raise InputError("there are no samples to measure on")
    started, total = time.perf_counter(), sweep.size * len(batches)
    done = {} if journal is None else dict(journal.items)
    resumed = len(done)
    tell = progress or (lambda _done, _total: None)
    engine = forward if isinstance(forward, Engine) else WholeGraph(forward)
    run = _Run(program, engine, sweep, journal, lambda d, _: tell(d, total), done)
    saved, interrupted = program.controls.state(), False
    try:
        with torch.no_grad(), contextlib.suppress(KeyboardInterrupt):
            interrupted = True
            for site in program.controls.sites:
                program.controls.set_level(site, 0.0)
            for index, batch in enumerate(batches):
                run.batch(index, batch)
            interrupted = False
    finally:
        program.controls.restore(saved)
    facts = {
        "runs": len(done) - resumed + len(run.clean),
        "resumed_items": resumed,
        "seconds": time.perf_counter() - started,
        "peak_memory_mib": peak_memory_mib(batches[0].input_ids.device),
    }
    return _collect(run, batches, sweep, interrupted, noise_kind, {**(provenance or {}), **facts})


def _collect(
    run: _Run, batches: Sequence[Batch], sweep: Sweep, interrupted: bool, noise_kind: str, provenance: dict[str, Any]
) -> Measurements:
    per_probe = len(sweep.levels) * len(sweep.seeds)

    def finished(batch: int, probe: int) -> bool:
        return all((batch, probe, i // len(sweep.seeds), i % len(sweep.seeds)) in run.done for i in range(per_probe))

    whole = [
        b for b in range(len(batches)) if b in run.clean and all(finished(b, p) for p in range(len(sweep.probes)))
    ]  # fmt: skip
    chosen = list(range(len(sweep.probes)))
    if not whole:
        chosen = [p for p in chosen if 0 in run.clean and finished(0, p)]
        whole = [0]
        if not chosen:
            raise Interrupted("interrupted before the first probe was finished on the first samples")
    size = [batches[b].size for b in whole]
    metrics = [m for m in next(iter(run.done.values())) if m != "exact_match" or _has_answers(run, whole)]
    scores = {m: np.empty((len(chosen), len(sweep.levels), len(sweep.seeds), sum(size))) for m in metrics}
    for position, probe in enumerate(chosen):
        for lv in range(len(sweep.levels)):
            for k in range(len(sweep.seeds)):
                for metric in metrics:
                    parts = [run.done[b, probe, lv, k][metric] for b in whole]
                    scores[metric][position, lv, k] = np.concatenate(parts)
    clean: dict[str, NDArray[np.float64]] = {
        m: np.concatenate([run.clean[b][m] for b in whole]).astype(np.float64)
        for m in ("nll", "exact_match")
        if m == "nll" or m in metrics
    }
    sites = {s.id: s for s in run.program.sites}
    probed = {s for p in chosen for s in sweep.probes[p].sites}
    return Measurements(
        probes=tuple(sweep.probes[p] for p in chosen), levels=sweep.levels, seeds=sweep.seeds,
        base_level=sweep.base_level, task=sweep.task, noise_kind=noise_kind,
        tokens=np.concatenate([run.clean[b]["tokens"] for b in whole]).astype(np.int64),
        clean=clean, scores=scores, sites=tuple(s for i, s in sites.items() if i in probed),
        samples_requested=sum(b.size for b in batches), complete=not interrupted, provenance=provenance,
    )  # fmt: skip


def _has_answers(run: _Run, batches: Sequence[int]) -> bool:
    return all("exact_match" in run.clean[b] and not np.isnan(run.clean[b]["exact_match"]).any() for b in batches)
