"""Measuring plans: the model as assignments store it against the clean one, on samples that chose nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Node

from aqnfx.errors import ProbeError
from aqnfx.graph.assignments import Assignment, assigned_sites
from aqnfx.graph.operands import Place
from aqnfx.graph.program import Program
from aqnfx.graph.sites import Role
from aqnfx.graph.tags import attribute
from aqnfx.numerics.formats import parse_format, quantize
from aqnfx.numerics.stats import bootstrap_ratio, paired_difference
from aqnfx.passes.pipeline import Pipeline
from aqnfx.probes.data import Batch
from aqnfx.probes.forward import Forward, eager_forward
from aqnfx.probes.replay import BlockReplay
from aqnfx.probes.tasks import Scores, reference, score

Array = NDArray[np.float64]
_REPLACED = 1 << 28  # bytes of weights that are replaced for a run
_HELD = 1 << 26  # bytes of stored weights that are kept from batch to batch
_KEPT = 1 << 28  # bytes of values between blocks that runs start from


def stored(program: Program, assignments: Mapping[str, Assignment]) -> Program:
    """Return the program with every assigned operand in its format; the program itself where nothing is assigned."""
    return _with_nodes(program, assigned_sites(program, assignments))


def _with_nodes(program: Program, chosen: Mapping[str, Sequence[str]]) -> Program:
    passes = [f'insert-fake-quant{{where="sites:{"|".join(sites)}" format={name}}}' for name, sites in chosen.items()]
    return Pipeline.parse(",".join(passes))(program) if passes else program


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Runs:
    """How plans are run: by weights that are replaced (parameter -> its place and format), or by a graph with nodes."""

    replay: BlockReplay | None
    weights: Mapping[str, Mapping[str, tuple[Place, str]]]
    forwards: Mapping[str, Forward]
    program: Program
    held: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program, plans: Mapping[str, Mapping[str, Assignment]], base: str | None = None) -> _Runs:
        """Replace weights where that says all of a plan, and they are 256 MiB at the most: it needs no graph of its own."""
        free = _private_weights(program)
        weights, forwards = {}, {}
        for name, assignments in plans.items():
            chosen = assigned_sites(program, assignments)
            sites = [(site, fmt) for fmt, named in chosen.items() for site in named]
            found = {free[site]: (program.places[site], fmt) for site, fmt in sites if site in free}
            if len(found) == len(sites) and sum(attribute(program.module, target).nbytes for target in found) <= _REPLACED:
                weights[name] = found
            else:
                forwards[name] = eager_forward(_with_nodes(program, chosen))
        replay = None
        if weights:
            blocks = program if program.ran("partition-blocks") else Pipeline.parse("partition-blocks")(program)
            known = {} if base is None else weights.get(base, {})
            starts = [
                tuple(target for target in {**found, **known} if found.get(target) != known.get(target))
                for found in weights.values()
            ]
            replay = BlockReplay(blocks, weights=[names for names in starts if names], memory=_KEPT)
        return cls(replay=replay, weights=weights, forwards=forwards, program=program)

    def clean(self, batch: Batch) -> torch.Tensor:
        """Run the model as it is; the plans that follow are of this batch."""
        return eager_forward(self.program)(batch) if self.replay is None else self.replay.clean(batch)

    def stored(self, name: str, batch: Batch) -> torch.Tensor:
        """Run the model as a plan stores it."""
        if name in self.forwards:
            return self.forwards[name](batch)
        assert self.replay is not None  # made for the plans that are not in forwards
        return self.replay.replaced({
            target: self._weight(target, place, fmt) for target, (place, fmt) in self.weights[name].items()
        })  # fmt: skip

    def switched(self, base: str, name: str) -> torch.Tensor:
        """Run the model as a plan stores it, where what was run before is ``base``: from the first weight that differs."""
        assert self.replay is not None  # made for the plans that are not in forwards
        before, after = self.weights[base], self.weights[name]
        other = [target for target in {**before, **after} if before.get(target) != after.get(target)]
        return self.replay.replaced({
            target: self._weight(target, *after[target]) if target in after else attribute(self.program.module, target).detach()
            for target in other
        })  # fmt: skip

    def based(self, base: str, batch: Batch) -> torch.Tensor:
        """Run the model as the plan ``base`` stores it; :meth:`switched` runs of this batch follow."""
        assert self.replay is not None  # made for the plans that are not in forwards
        return self.replay.clean(batch, {
            target: self._weight(target, place, fmt) for target, (place, fmt) in self.weights[base].items()
        })  # fmt: skip

    def _weight(self, target: str, place: Place, fmt: str) -> torch.Tensor:
        """Return a weight as a format stores it, kept for the batches that follow while there is room."""
        if (target, fmt) in self.held:
            return self.held[target, fmt]
        value = attribute(self.program.module, target).detach()
        made = quantize(value, parse_format(fmt), dim=place.dim, channel_dim=place.channel_dim)
        if made.nbytes + sum(tensor.nbytes for tensor in self.held.values()) <= _HELD:
            self.held[target, fmt] = made
        return made


def _private_weights(program: Program) -> dict[str, str]:
    """Return site of a weight -> name of its parameter, for those that nothing but one product reads."""
    readers: dict[str, set[Node]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), set()).update(node.users)
    return {
        site: str(place.value.target)
        for site, place in program.places.items()
        if place.site.role is Role.WEIGHT and place.value.op == "get_attr" and readers[str(place.value.target)] == {place.node}
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """Per-sample scores of one set of assignments and of the clean model, and the scored ``tokens`` (n,)."""

    scores: Scores
    clean: Scores
    tokens: Array

    @property
    def kl(self) -> float:
        """KL(clean ‖ stored) in nats per token."""
        return float(self.scores["kl"].sum() / self.tokens.sum())

    def record(self, *, seed: int = 0) -> dict[str, Any]:
        """Return ``kl``, ``nll_increase``, ``top1_agreement`` and, with answers, ``exact_match``, with 95 % intervals."""
        found = {
            "samples": len(self.tokens), "tokens": int(self.tokens.sum()),
            "kl": bootstrap_ratio(self.scores["kl"], self.tokens, seed=seed).to_record(),
            "nll": float(self.scores["nll"].sum() / self.tokens.sum()),
            "clean_nll": float(self.clean["nll"].sum() / self.tokens.sum()),
            "nll_increase": paired_difference(self.scores["nll"], self.clean["nll"], self.tokens, seed=seed).to_record(),
            "top1_agreement": bootstrap_ratio(self.scores["top1"], self.tokens, seed=seed).to_record(),
        }  # fmt: skip
        if "exact_match" in self.scores:
            have = np.isfinite(self.clean["exact_match"])
            one = np.where(have, 1.0, 0.0)
            after, before = (np.where(have, table["exact_match"], 0.0) for table in (self.scores, self.clean))
            found["exact_match"] = bootstrap_ratio(after, one, seed=seed).to_record()
            found["clean_exact_match"] = bootstrap_ratio(before, one, seed=seed).to_record()
            found["exact_match_change"] = paired_difference(after, before, one, seed=seed).to_record()
        return found


def measure_plans(
    program: Program, batches: Sequence[Batch], plans: Mapping[str, Mapping[str, Assignment]], *,
    base: str | None = None, progress: Callable[[int, int], None] | None = None,
) -> dict[str, Measured]:  # fmt: skip
    """Return the scores of the model as each of ``plans`` stores it, by the plan's name.

    Every batch is run clean once and then by every plan, so that what is kept does not grow with the data; a plan of weights
    alone is run from the first block that it changes, or that differs from the plan ``base``. Results are those of
    :func:`stored`, bit for bit. ``progress`` is told the runs done and their number. Raises :class:`ProbeError` where logits
    are not finite.
    """
    runs, total = _Runs.of(program, plans, base), len(batches) * (len(plans) + 1)
    if runs.forwards:
        base = None
    order = sorted(plans, key=lambda name: base is not None and name != base)  # the base first
    clean: list[Scores] = []
    found: dict[str, list[Scores]] = {name: [] for name in plans}
    done = 0
    with torch.no_grad():
        for batch in batches:
            known, scores = reference(batch, runs.clean(batch))
            clean.append(scores)
            done += 1
            for name in order:
                if base is None:
                    logits = runs.stored(name, batch)
                else:
                    logits = runs.based(name, batch) if name == base else runs.switched(base, name)
                found[name].append(score(known, logits))
                done += 1
                if progress is not None:
                    progress(done, total)
    tokens = np.concatenate([_tokens(batch) for batch in batches]) if batches else np.zeros(0)
    return {name: Measured(scores=_joined(parts), clean=_joined(clean), tokens=tokens) for name, parts in found.items()}


def _tokens(batch: Batch) -> Array:
    return batch.score_mask[: batch.size].sum(1).cpu().numpy().astype(np.float64)


def _joined(parts: Sequence[Scores]) -> Scores:
    if not parts:
        raise ProbeError("there are no samples to measure a plan on")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
