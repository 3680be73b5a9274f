"""What a diagnosis would do and how long it would take, before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from aqnfx.diagnosis.options import Options
from aqnfx.diagnosis.probe_choice import CHECKS, SPOT_CHECKS, PreparedProbes
from aqnfx.diagnosis.workers import instrument
from aqnfx.passes.perturbing import HAS_KERNEL
from aqnfx.probes.compile_choice import compile_seconds, what_to_compile
from aqnfx.probes.work import Sweep

# In forward passes: what a backward pass of one projection draw costs (measured: 2 on two cores, all sites scored).
_BACKWARD = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The work of a run: ``runs`` are noisy forward passes of a batch, ``share`` the part of the model that one of them runs
    on average; ``probes`` an upper bound where predictions choose. Seconds are estimates from one timed forward pass;
    what it takes to generate answers of at most ``new_tokens`` is not in them.
    """

    probes: int
    batches: int
    runs: int
    share: float
    tokens: int
    compiled: str
    forward_seconds: float
    predict_seconds: float
    compile_seconds: float
    measure_seconds: float
    new_tokens: int = 0

    @property
    def seconds(self) -> float:
        """All seconds, without loading and tracing."""
        return self.predict_seconds + self.compile_seconds + self.measure_seconds

    def to_record(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {name: getattr(self, name) for name in (*self.__dataclass_fields__, "seconds")}

    def lines(self) -> list[str]:
        """Return the forecast in words, a line each."""
        bound = "at most " if self.predict_seconds else ""
        found = [
            f"{bound}{self.probes} probes on {self.batches} batches: {bound}{self.runs} noisy runs, of which each computes "
            f"{100 * self.share:.0f} % of the model on average; {self.tokens} tokens per pass over the data",
            f"compiled: {self.compiled}",
        ]
        parts = {"predicting": self.predict_seconds, "compiling": self.compile_seconds, "measuring": self.measure_seconds}
        text = ", ".join(f"{name} {_time(seconds)}" for name, seconds in parts.items() if seconds)
        if self.new_tokens:
            found.append(
                f"generated on top of that, and not in the time below: {self.batches + self.runs} batches of answers of at most "
                f"{self.new_tokens} tokens"
            )
        return [*found, f"about {_time(self.seconds)} ({text}), from one batch in {self.forward_seconds:.2f} s"]


def forecast(ready: PreparedProbes, options: Options) -> Forecast:
    """Estimate the work of a run; one batch is run twice without noise."""
    seeds = tuple(range(options.seeds))
    sweep = Sweep(probes=ready.probes, levels=options.levels, seeds=seeds, base_level=options.base, task=ready.task)
    batches = ready.batches(options)
    compiled = what_to_compile(ready.program, sweep, batches, options.compile, kernel=HAS_KERNEL[options.perturbation.kind])
    _program, engine, work = instrument(ready, options, sweep, "none")
    with torch.no_grad():
        engine.clean(work[0])
        started = time.perf_counter()
        engine.clean(work[0])
        once = time.perf_counter() - started
    passes = sum(batch.input_ids.numel() for batch in work) / work[0].input_ids.numel()  # batches differ in length
    probes, predict = len(ready.probes), 0.0
    if options.method != "measure":
        counts = SPOT_CHECKS if options.method == "predict" else CHECKS
        listed = {kind: sum(p.kind == kind for p in ready.probes) for kind in {p.kind for p in ready.probes}}
        # Windows around critical layers are not known yet: all of them at most.
        probes = sum(n if kind in ("window", "all") and options.method == "both" else min(n, sum(counts.get(kind, (0, 0))))
                     for kind, n in listed.items()) + sum(counts["site"])  # fmt: skip
        predict = once * passes * (1.0 + _BACKWARD * options.draws)
    blocks = max(1, engine.blocks)
    share = sum(1.0 - engine.first(p.sites) / blocks for p in ready.probes) / max(1, len(ready.probes))
    runs = probes * len(sweep.levels) * len(seeds) * len(work)
    return Forecast(
        probes=probes, batches=len(work), runs=runs, share=share, tokens=sum(b.input_ids[: b.size].numel() for b in work),
        compiled=compiled, forward_seconds=once, predict_seconds=predict,
        compile_seconds=compile_seconds(ready.program, compiled),
        measure_seconds=once * passes * (1 + runs / len(work) * share),
        new_tokens=_new_tokens(ready, options),
    )  # fmt: skip


def _new_tokens(ready: PreparedProbes, options: Options) -> int:
    if options.task != "generate":
        return 0
    from aqnfx.live.generation import most_new_tokens  # loads Dynamo

    return most_new_tokens(ready.model, ready.encoded, options.max_new_tokens)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
