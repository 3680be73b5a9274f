"""What measures: the program with what perturbs it, the engine that runs it, and the recipe of a worker elsewhere."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn

from aqnfx.diagnosis.options import Options
from aqnfx.errors import InputError
from aqnfx.graph.lengths import trace_for
from aqnfx.graph.program import Program
from aqnfx.passes.partition_blocks import PartitionBlocks
from aqnfx.passes.perturbing import insert
from aqnfx.passes.pipeline import Pipeline
from aqnfx.probes.data.batches import Batch
from aqnfx.probes.prepare import Prepared, load, tag
from aqnfx.probes.replay import BlockReplay
from aqnfx.probes.work import Sweep, Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a worker for a sweep is made, in this process or another: picklable where ``source`` is.

    ``source`` is a directory, a name or a module; ``ready`` what :func:`~aqnfx.diagnosis.probe_choice.prepare_probes` made
    here, of which the samples are used.
    """

    source: nn.Module | str
    ready: Prepared
    options: Options
    sweep: Sweep
    compiled: str

    @classmethod
    def of(
        cls, source: nn.Module | Program | str | Path, ready: Prepared, options: Options, sweep: Sweep, compiled: str
    ) -> Recipe:
        """Make a recipe; raises :class:`InputError` for a Program, which cannot travel."""
        if isinstance(source, Program):
            raise InputError(
                f"executor {options.executor} makes the model anew for every worker, which needs its directory or module; "
                "a Program was given"
            )
        named = str(source) if isinstance(source, (str, Path)) else source
        bare = dataclasses.replace(ready, program=cast(Any, None), tokenizer=None)
        return cls(source=named, ready=bare, options=options, sweep=sweep, compiled=compiled)

    def __call__(self, device: str | None = None) -> Worker:
        """Load, trace and instrument the model on ``device`` (default: that of the options) and return its worker."""
        options = self.options if device is None else dataclasses.replace(self.options, device=device)
        own = self.source
        model = load(own, options) if isinstance(own, str) else copy.deepcopy(own).to(options.device)
        program = tag(trace_for(model, {len(e.input_ids) for e in self.ready.encoded}), options.where)
        ready = dataclasses.replace(self.ready, program=program)
        noisy, engine, batches = instrument(ready, options, self.sweep, self.compiled)
        return Worker(noisy, engine, batches, self.sweep)


def instrument(
    ready: Prepared, options: Options, sweep: Sweep, compiled: str
) -> tuple[Program, BlockReplay, list[Batch]]:
    """Return the program with what perturbs it, the engine that runs it, and the batches in the order in which to run them."""
    perturb = insert(options.perturbation, options.where, kernel=compiled != "none")
    noisy = Pipeline([perturb, PartitionBlocks()])(ready.program)
    engine = BlockReplay(
        noisy, starts=[p.sites for p in sweep.probes], memory=options.replay_bytes, offload=options.replay_offload,
        compiled=compiled == "blocks",
    )  # fmt: skip
    batches = ready.batches(options)
    if ready.encoded[0].number is not None:
        # Short samples and long ones in turn, so that what an interrupted run has finished is no choice of lengths.
        batches = [batches[i] for i in np.random.default_rng(0).permutation(len(batches))]
    return noisy, engine, batches
