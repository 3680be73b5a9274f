"""measure: run a Program with noise at chosen sites and score the result against its clean run."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aqnfx.errors import ArtifactError, InputError, Interrupted, ProbeError
from aqnfx.graph.program import Program
from aqnfx.probes.adaptive import StoppingRule
from aqnfx.probes.data.batches import Batch
from aqnfx.probes.executors import Executor, InProcess
from aqnfx.probes.forward import Forward
from aqnfx.probes.journal import Journal, Part
from aqnfx.probes.measurements import Measurements
from aqnfx.probes.memory import peak_memory_mib
from aqnfx.probes.replay import Engine, WholeGraph
from aqnfx.probes.tasks import METRICS
from aqnfx.probes.work import Answers, Item, Outcome, Scores, Sweep, Worker, clean_item

__all__ = ["Progress", "Sweep", "measure"]

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class _State:
    """What is known so far: scores by item, and the errors of items that failed."""

    sweep: Sweep
    batches: Sequence[Batch]
    journal: Journal | Part | None
    done: dict[Item, Scores] = field(default_factory=dict)
    failed: dict[Item, str] = field(default_factory=dict)
    rule: StoppingRule | None = None
    deadline: float = math.inf
    settled: dict[int, int] = field(default_factory=dict)
    late: bool = False

    def take(self, outcome: Outcome) -> None:
        """Take what came of an item, and write it down; a second outcome of the same item changes nothing."""
        if outcome.item in self.done:
            return
        if self.journal is not None:
            self.journal.add(outcome.item, outcome.scores, outcome.error)
        if outcome.scores is None:
            self.failed[outcome.item] = outcome.error or "failed"
        else:
            self.failed.pop(outcome.item, None)
            self.done[outcome.item] = outcome.scores

    @property
    def runs(self) -> int:
        """Noisy items that have come to an end."""
        return sum(item[1] >= 0 for item in self.done) + len(self.failed)

    def left(self) -> Iterator[tuple[Item, ...]]:
        """Yield, batch by batch and probe by probe, the items that have not come to an end and are wanted.

        Probes whose claims are settled by the batches before are left out, and everything once the time is over: but never
        the first batch, without which a probe has no number.
        """
        for batch in range(len(self.batches)):
            clean = clean_item(batch)
            wanted = [] if clean in self.done else [clean]
            for probe in self.order(batch):
                unit = (*wanted, *(item for item in self.sweep.unit(batch, probe) if not self.ended(item)))
                if not unit:
                    continue
                if batch and time.perf_counter() > self.deadline:
                    self.late = True
                    return
                wanted = []
                yield unit

    def ended(self, item: Item) -> bool:
        """Return whether an item has come to an end."""
        return item in self.done or item in self.failed

    def order(self, batch: int) -> list[int]:
        """Return the probes that a batch is to be run with."""
        chosen = range(len(self.sweep.probes))
        if self.rule is None or batch == 0:
            return list(chosen)
        open_ = self.rule.unsettled(self.sweep, self.done, batch, total=len(self.batches))
        for probe in chosen:
            if probe not in open_:
                self.settled.setdefault(probe, batch)
        return [probe for probe in chosen if probe not in self.settled]

    def finished(self, batch: int, probe: int) -> bool:
        """Return whether everything of a probe on a batch has come to an end."""
        return clean_item(batch) in self.done and all(
            item in self.done or item in self.failed for item in self.sweep.unit(batch, probe)
        )


def measure(
    program: Program,
    forward: Forward | Engine,
    batches: Sequence[Batch],
    sweep: Sweep,
    *,
    journal: Journal | Part | None = None,
    executor: Executor | None = None,
    answers: Answers | None = None,
    rule: StoppingRule | None = None,
    seconds: float | None = None,
    progress: Progress | None = None,
    noise_kind: str = "relative_gaussian",
    provenance: Mapping[str, Any] | None = None,
) -> Measurements:
    """Run the sweep over ``batches`` and return per-sample scores of the finished part.

    ``program`` carries noise nodes at every site of every probe and ``forward`` runs it: one of
    :mod:`aqnfx.probes.forward`, or an engine of :mod:`aqnfx.probes.replay`; ``executor`` does the work elsewhere,
    with programs of its own; ``answers`` takes the place of exact matches given the tokens before. The same seed
    gives the same noise at a site in every configuration (common random numbers). Batches are the outer loop: one
    clean run and its reference serve all configurations of a batch; the scores are in the order of the samples,
    whatever the order of the batches. Items in ``journal`` are not run again, but those that failed are. With ``rule``
    a probe gets no further samples once its claims are settled; after ``seconds`` no new work begins, but that on the
    first batch. What a probe has no sample of is NaN. A run that fails leaves NaN and a line in ``errors``. On
    ``KeyboardInterrupt`` the finished batches are returned with ``complete=False`` (of a first batch, the probes
    that are finished on it); with nothing finished :class:`Interrupted` is raised. Raises :class:`ProbeError` when a
    probe fires at other sites than its own, a clean run fails, or every noisy run does.
    """
    if not batches:
        raise InputError("there are no samples to measure on")
    if answers is not None and executor is not None:
        raise InputError("answers are generated in this process; leave the executor out")
    worker = Worker(program, WholeGraph(forward) if not isinstance(forward, Engine) else forward, batches, sweep, answers)
    started, total = time.perf_counter(), sweep.size * len(batches)
    compiled_before = getattr(worker.engine, "compile_seconds", 0.0)
    deadline = math.inf if seconds is None else started + seconds
    if journal is not None:
        _check_items(journal, sweep, batches)
    done = {} if journal is None else dict(journal.items)
    state = _State(sweep, batches, journal, done, rule=rule, deadline=deadline)
    resumed, tell, interrupted = state.runs, progress or (lambda _done, _total: None), True
    runs = tokens = 0
    with contextlib.suppress(KeyboardInterrupt):
        for outcome in (executor or InProcess(worker)).run(state.left()):
            state.take(outcome)
            runs += 1
            tokens += batches[outcome.item[0]].input_ids.numel()
            if outcome.item[1] >= 0:
                tell(state.runs, total)
        interrupted = False
    if state.failed and not any(item[1] >= 0 for item in state.done):
        item, error = next(iter(state.failed.items()))
        raise ProbeError(f"all {len(state.failed)} runs failed; {sweep.describe(item)}: {error}")
    seconds_spent = time.perf_counter() - started
    facts: dict[str, Any] = {
        "runs": runs, "resumed_items": resumed, "seconds": seconds_spent, "tokens_per_second": tokens / seconds_spent,
        "peak_memory_mib": peak_memory_mib(batches[0].input_ids.device),
    }  # fmt: skip
    if executor is None:
        compiling = getattr(worker.engine, "compile_seconds", 0.0) - compiled_before
        parts = {"compile": compiling, "run": worker.seconds["run"] - compiling, "statistics": worker.seconds["statistics"]}
        facts["shares"] = {name: value / seconds_spent for name, value in parts.items()}
    if rule is not None or seconds is not None:
        ended = len(state.done) + len(state.failed)
        facts |= {"all_runs": ended, "wanted_runs": total, "settled_probes": len(state.settled), "out_of_time": state.late}
    return _collect(state, program, interrupted, noise_kind, {**(provenance or {}), **facts})


_OF_CLEAN, _OF_NOISY = {"nll", "tokens"}, {"kl", "nll", "top1"}


def _check_items(journal: Journal | Part, sweep: Sweep, batches: Sequence[Batch]) -> None:
    """Raise :class:`ArtifactError` where an item of a journal is not one of this sweep, whatever its checksum says."""
    sizes = (len(batches), len(sweep.probes), len(sweep.levels), len(sweep.seeds))
    for item, scores in [*journal.items.items(), *((failed, None) for failed in journal.failed)]:
        outside = any(number >= size for number, size in zip(item, sizes, strict=True)) or (item[1] < 0 and item[2:] != (0, 0))
        if outside:
            raise ArtifactError(f"the journal holds item {list(item)}, which this run has not; remove it to start again")
        if scores is None:
            continue
        missing = (_OF_CLEAN if item[1] < 0 else _OF_NOISY) - scores.keys()
        size = batches[item[0]].size
        wrong = next((name for name, values in scores.items() if len(values) != size), None)
        if missing or wrong is not None:
            what = f"no {sorted(missing)[0]}" if missing else f"{len(scores[str(wrong)])} values of {wrong} for {size} samples"
            raise ArtifactError(f"the journal holds {what} in item {list(item)}; remove it to start again")


def _collect(
    state: _State, program: Program, interrupted: bool, noise_kind: str, provenance: dict[str, Any]
) -> Measurements:
    sweep, batches = state.sweep, state.batches
    chosen = list(range(len(sweep.probes)))
    some = any if state.rule is not None or state.late else all
    whole = [b for b in range(len(batches)) if clean_item(b) in state.done and some(state.finished(b, p) for p in chosen)]
    if not whole or (state.rule is not None and not all(state.finished(0, p) for p in chosen)):
        chosen = [p for p in chosen if state.finished(0, p)]
        whole = [0]
        if not chosen:
            raise Interrupted("interrupted before the first probe was finished on the first samples")
    whole.sort(key=lambda b: batches[b].row_offset)
    clean = [state.done[clean_item(b)] for b in whole]
    answered = {m for m in METRICS if all(m in one and not np.isnan(one[m]).any() for one in clean)}
    measured = next(scores for item, scores in state.done.items() if item[1] >= 0)
    metrics = [m for m in measured if not METRICS[m].answers or m in answered]
    size = [batches[b].size for b in whole]
    scores = {m: np.full((len(chosen), len(sweep.levels), len(sweep.seeds), sum(size)), np.nan) for m in metrics}
    for row, probe in enumerate(chosen):
        first = 0
        for b, n in zip(whole, size, strict=True):
            unit = sweep.unit(b, probe) if state.finished(b, probe) else ()
            for item in unit:
                for metric in metrics if item in state.done else ():
                    scores[metric][row, item[2], item[3], first : first + n] = state.done[item][metric]
            first += n

    def joined(name: str) -> NDArray[np.float64]:
        return np.concatenate([np.asarray(one[name], dtype=np.float64) for one in clean])

    probed = {s for p in chosen for s in sweep.probes[p].sites}
    failed = {i: e for i, e in state.failed.items() if i[0] in whole and i[1] in chosen}
    return Measurements(
        probes=tuple(sweep.probes[p] for p in chosen), levels=sweep.levels, seeds=sweep.seeds,
        base_level=sweep.base_level, task=sweep.task, noise_kind=noise_kind, tokens=joined("tokens").astype(np.int64),
        clean={m: joined(m) for m in metrics if METRICS[m].clean == "measured"}, scores=scores,
        sites=tuple(s for s in program.all_sites if s.id in probed), samples_requested=sum(b.size for b in batches),
        complete=not interrupted, provenance=provenance,
        numbers=np.concatenate([np.arange(batches[b].row_offset, batches[b].row_offset + batches[b].size) for b in whole]),
        errors=tuple(f"{sweep.describe(item)}: {error}" for item, error in failed.items()),
    )  # fmt: skip
