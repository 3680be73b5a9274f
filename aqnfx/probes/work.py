"""Work items: one run of one batch under one configuration, done by a worker, in any order and anywhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from aqnfx.errors import InputError, Interrupted, ModelError, ProbeError
from aqnfx.graph.program import Program
from aqnfx.probes.data.batches import Batch
from aqnfx.probes.measurements import Probe
from aqnfx.probes.replay import Engine
from aqnfx.probes.tasks import EXACT_MATCH, Reference, reference, score

Item = tuple[int, int, int, int]
"""Batch, probe, level and seed, by their numbers in the sweep; the clean run of a batch is (batch, -1, 0, 0)."""
Scores = dict[str, list[float]]


def clean_item(batch: int) -> Item:
    """Return the item of the clean run of a batch."""
    return batch, -1, 0, 0


class Answers(Protocol):
    """Says which samples of a batch are answered correctly with noise at ``sites``: 1 or 0 per sample."""

    def correct(self, batch: Batch, sites: Sequence[str] = (), *, level: float = 0.0, seed: int = 0) -> list[float]:
        """Return 1 or 0 per sample."""


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

    def unit(self, batch: int, probe: int) -> tuple[Item, ...]:
        """Return the items of one probe on one batch: every level and seed."""
        return tuple((batch, probe, lv, k) for lv in range(len(self.levels)) for k in range(len(self.seeds)))

    def describe(self, item: Item) -> str:
        """Return an item in words."""
        batch, probe, level, seed = item
        if probe < 0:
            return f"the clean run of batch {batch}"
        found = self.probes[probe]
        return f"{found.kind} {found.key} at level {self.levels[level]:g}, seed {self.seeds[seed]}, batch {batch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of an item: scores per sample, or the error in one line."""

    item: Item
    scores: Scores | None = None
    error: str | None = None


class FiringError(ProbeError):
    """Noise was injected elsewhere than asked: nothing that this worker measures can be trusted."""


class Worker:
    """Runs items of a sweep over ``batches`` on one copy of a program.

    The clean run of a batch comes before its first item and is kept for the following ones. A run that fails is an
    outcome with an error; a clean run that fails, and noise at other sites than asked, are raised. ``answers`` says of every
    run which samples it answers correctly, in place of what the logits say.
    """

    def __init__(
        self, program: Program, engine: Engine, batches: Sequence[Batch], sweep: Sweep, answers: Answers | None = None
    ) -> None:
        missing = sorted({s for p in sweep.probes for s in p.sites} - set(program.controls.sites))
        if missing:
            raise ProbeError(
                f"{len(missing)} probed sites have no noise node, first {missing[0]}; insert noise there first"
            )
        self.program, self.engine, self.batches, self.sweep, self.answers = program, engine, batches, sweep, answers
        self._batch, self._clean = -1, Outcome(item=clean_item(-1))
        self._reference: Reference | None = None
        self._probe: Probe | None = None
        self._fired: set[Probe] = set()
        self.seconds = {"run": 0.0, "statistics": 0.0}
        """Seconds in forward passes and in scoring them."""

    def run(self, items: Sequence[Item]) -> Iterator[Outcome]:
        """Run items of one batch, one by one, with an outcome for the clean run too wherever one was needed.

        The controls are set back at the end.
        """
        controls = self.program.controls
        saved = controls.state()
        try:
            for site in controls.sites:
                controls.set_level(site, 0.0)
            for item in items:
                if self._batch != item[0]:
                    with torch.no_grad():
                        self._start(item[0])
                    yield self._clean
                if item[1] >= 0:
                    with torch.no_grad():
                        outcome = self._run(item)
                    yield outcome
        finally:
            self._probe = None
            controls.restore(saved)

    def _start(self, number: int) -> None:
        """Run a batch without noise."""
        batch = self.batches[number]
        self._batch = -1  # until the clean run has succeeded
        self._switch(None, 0.0)
        self.program.controls.set_run(row_offset=batch.row_offset, step=0)
        started = time.perf_counter()
        logits = self.engine.clean(batch)
        between = time.perf_counter()
        self._reference, clean = reference(batch, logits)
        self._spent(started, between)
        counted = {**clean, "tokens": batch.score_mask[: batch.size].sum(1).cpu().numpy()}
        scores = {name: values.tolist() for name, values in counted.items()}
        if self.answers is not None:
            scores[EXACT_MATCH.name] = self._answered(self.answers, batch)
        self._batch, self._clean = number, Outcome(item=clean_item(number), scores=scores)

    def _run(self, item: Item) -> Outcome:
        number, p, lv, k = item
        probe = self.sweep.probes[p]
        self._switch(probe, self.sweep.levels[lv])
        self.program.controls.set_run(seed=self.sweep.seeds[k], row_offset=self.batches[number].row_offset, step=0)
        assert self._reference is not None  # made by the clean run
        try:
            scores = self._score(self._reference, probe)
            if self.answers is not None:
                scores[EXACT_MATCH.name] = self._answered(
                    self.answers, self.batches[number], probe.sites, self.sweep.levels[lv], self.sweep.seeds[k]
                )
            return Outcome(item=item, scores=scores)
        except (FiringError, ModelError, Interrupted):
            raise
        except (ProbeError, RuntimeError) as error:  # logits that are not finite, a device out of memory
            lines = str(error).splitlines() or [type(error).__name__]
            return Outcome(item=item, error=lines[0])

    def _score(self, ref: Reference, probe: Probe) -> Scores:
        check = probe not in self._fired
        if check:
            self.program.controls.reset_hits()
        started = time.perf_counter()
        logits = self.engine.noisy(probe.sites)
        if check:
            self._check_fired(probe)
        between = time.perf_counter()
        found = {name: values.tolist() for name, values in score(ref, logits).items()}
        self._spent(started, between)
        return found

    def _answered(
        self, answers: Answers, batch: Batch, sites: Sequence[str] = (), level: float = 0.0, seed: int = 0
    ) -> list[float]:
        started = time.perf_counter()
        found = answers.correct(batch, sites, level=level, seed=seed)
        self.seconds["run"] += time.perf_counter() - started
        return found

    def _spent(self, started: float, between: float) -> None:
        """Count a forward pass that ended at ``between``, and what came after it; devices finish with the scores."""
        self.seconds["run"] += between - started
        self.seconds["statistics"] += time.perf_counter() - between

    def _switch(self, probe: Probe | None, level: float) -> None:
        """Switch the noise of the last probe off and that of ``probe`` on."""
        controls = self.program.controls
        if self._probe is not None and self._probe is not probe:
            for site in self._probe.sites:
                controls.set_level(site, 0.0)
        for site in probe.sites if probe is not None else ():
            controls.set_level(site, level)
        self._probe = probe

    def _check_fired(self, probe: Probe) -> None:
        hit = {site for site, count in self.program.controls.hits().items() if count}
        if hit != set(probe.sites):
            missed, extra = set(probe.sites) - hit, hit - set(probe.sites)
            raise FiringError(
                f"probe {probe.kind} {probe.key!r} fired at {len(hit)} sites instead of {len(probe.sites)}; "
                f"silent: {', '.join(sorted(missed)[:3]) or 'none'}; unasked: {', '.join(sorted(extra)[:3]) or 'none'}"
            )
        self._fired.add(probe)
