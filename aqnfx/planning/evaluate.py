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
from aqnfx.graph.blocks import Block, cut
from aqnfx.graph.operands import Place
from aqnfx.graph.program import Program
from aqnfx.graph.selector import Selector
from aqnfx.graph.sites import Role
from aqnfx.graph.tags import attribute, constant, get_tag
from aqnfx.numerics.formats import parse_format, quantize
from aqnfx.numerics.stats import bootstrap_ratio, paired_difference
from aqnfx.ops.table import level_of
from aqnfx.passes.insert_fake_quant import InsertFakeQuant
from aqnfx.passes.partition_blocks import PartitionBlocks
from aqnfx.passes.pipeline import Pipeline
from aqnfx.probes.data.batches import Batch
from aqnfx.probes.replay import BlockReplay
from aqnfx.probes.tasks import KL, METRICS, Metric, Reference, Scores, reference, score

Array = NDArray[np.float64]
_REPLACED = 1 << 28  # bytes of weights that are replaced for a run
_HELD = 1 << 26  # bytes of stored weights, and of what the clean model says, that are kept
_KEPT = 1 << 28  # bytes of values between blocks that runs start from


def stored(program: Program, assignments: Mapping[str, Assignment]) -> Program:
    """Return the program with every assigned operand in its format; the program itself where nothing is assigned."""
    chosen = assigned_sites(program, assignments)
    return Pipeline(
        InsertFakeQuant(where=str(Selector(sites=tuple(sites))), format=name) for name, sites in chosen.items()
    )(program)


Sites = tuple[tuple[str, str], ...]
"""Sites and their formats, in execution order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """What a plan changes: weights that are replaced (parameter -> place and format), and nodes (number of a block -> sites)."""

    weights: Mapping[str, tuple[Place, str]]
    nodes: Mapping[int, Sites]

    @classmethod
    def of(cls, program: Program, assignments: Mapping[str, Assignment], free: Mapping[str, str]) -> _Stored:
        """Replace the weights of the sites ``free`` where they are 256 MiB at the most; all else is a node."""
        sites = {site: fmt for fmt, named in assigned_sites(program, assignments).items() for site in named}
        weights = {free[site]: (program.places[site], fmt) for site, fmt in sites.items() if site in free}
        if sum(attribute(program.module, target).nbytes for target in weights) > _REPLACED:
            weights = {}
        nodes: dict[int, list[tuple[str, str]]] = {}
        for site in program.places:
            if site in sites and free.get(site) not in weights:
                nodes.setdefault(get_tag(program.places[site].node).block or 0, []).append((site, sites[site]))
        return cls(weights=weights, nodes={number: tuple(found) for number, found in nodes.items()})

    def apart(self, base: _Stored) -> tuple[list[str], list[int]]:
        """Return the weights and the blocks in which this differs from ``base``."""
        return (
            [target for target in {**self.weights, **base.weights} if self.weights.get(target) != base.weights.get(target)],
            [number for number in {**self.nodes, **base.nodes} if self.nodes.get(number) != base.nodes.get(number)],
        )


_NOTHING = _Stored(weights={}, nodes={})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Runs:
    """How plans are run: from the first block that they change, with weights replaced and blocks that have nodes."""

    program: Program
    replay: BlockReplay
    plans: Mapping[str, _Stored]
    blocks: Mapping[int, Block]
    base: str | None
    held: dict[tuple[str, str], torch.Tensor]

    @classmethod
    def of(
        cls, program: Program, replay: BlockReplay, plans: Mapping[str, Mapping[str, Assignment]], base: str | None,
        held: dict[tuple[str, str], torch.Tensor], blocks: dict[int, Block],
    ) -> _Runs:  # fmt: skip
        """Make what runs ``plans``; with ``base`` the others start where they differ from that plan.

        ``held``: stored weights; ``blocks``: those with formats. Both grow by what is missing.
        """
        free = _private_weights(program)
        found = {name: _Stored.of(program, assignments, free) for name, assignments in plans.items()}
        before = _NOTHING if base is None else found[base]
        starts = [plan.apart(_NOTHING if name == base else before) for name, plan in found.items()]
        wanted: dict[int, dict[str, str]] = {number: {} for _, numbers in starts for number in numbers}
        for plan in found.values():
            for number, sites in plan.nodes.items():
                wanted.setdefault(number, {}).update(dict.fromkeys((site for site, _ in sites), ""))
        for number, slots in wanted.items():
            known = blocks[number].stores if number in blocks else None
            if known is None or not slots.keys() <= known.keys():
                slots |= dict.fromkeys(known or (), "")
                (blocks[number],) = cut(program, noise=False, only=(number,), formats=slots)
        return cls(
            program=program, replay=replay.beginning(starts, memory=_KEPT), plans=found, blocks=blocks, base=base, held=held
        )

    def stored(self, name: str, batch: Batch) -> torch.Tensor:
        """Run the model as a plan stores it: the plan ``base`` first, and the others from where they differ from it."""
        plan, base = self.plans[name], _NOTHING if self.base in (None, name) else self.plans[str(self.base)]
        targets, numbers = plan.apart(base)
        weights = {
            target: self._weight(target, *plan.weights[target])
            if target in plan.weights
            else attribute(self.program.module, target).detach()
            for target in targets
        }
        blocks = [self.blocks[number].storing(dict(plan.nodes.get(number, ()))) for number in numbers]
        return self.replay.clean(batch, weights, blocks) if name == self.base else self.replay.replaced(weights, blocks)

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
        and list(place.node.args).count(place.value) == 1
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
        return float(self.scores[KL.name].sum() / self.tokens.sum())

    def record(self, *, seed: int = 0) -> dict[str, Any]:
        """Return every metric with its 95 % interval; of those that the clean model has too, its value and the change."""
        found: dict[str, Any] = {"samples": len(self.tokens), "tokens": int(self.tokens.sum())}
        for name, metric in METRICS.items():
            if name in self.scores:
                found |= self._answers(metric, seed) if metric.answers else self._per_token(metric, seed)
        return found

    def _per_token(self, metric: Metric, seed: int) -> dict[str, Any]:
        name = metric.name
        if metric.clean != "measured":
            return {metric.reported: bootstrap_ratio(self.scores[name], self.tokens, seed=seed).to_record()}
        return {
            name: float(self.scores[name].sum() / self.tokens.sum()),
            f"clean_{name}": float(self.clean[name].sum() / self.tokens.sum()),
            metric.change: paired_difference(self.scores[name], self.clean[name], self.tokens, seed=seed).to_record(),
        }

    def _answers(self, metric: Metric, seed: int) -> dict[str, Any]:
        name = metric.name
        have = np.isfinite(self.clean[name])
        one = np.where(have, 1.0, 0.0)
        after, before = (np.where(have, table[name], 0.0) for table in (self.scores, self.clean))
        return {
            name: bootstrap_ratio(after, one, seed=seed).to_record(),
            f"clean_{name}": bootstrap_ratio(before, one, seed=seed).to_record(),
            metric.change: paired_difference(after, before, one, seed=seed).to_record(),
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluator:
    """Measures plans on one set of samples. From one measurement to the next it keeps what that needs again: the blocks of the
    model and, while there is room, what the clean model says and weights as formats store them.
    """

    program: Program
    batches: Sequence[Batch]
    _replay: BlockReplay
    _clean: dict[int, tuple[Reference, Scores]] = field(default_factory=dict)
    _weights: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    _blocks: dict[int, Block] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program, batches: Sequence[Batch]) -> Evaluator:
        """Measure on ``batches``; ``program`` has gone through ``tag-ops``.

        Raises :class:`ProbeError` for a program whose noise, or formats with a level, are on: blocks are run without them.
        """
        switched = ((node, level) for node in program.graph.nodes if (level := level_of(node)) is not None)
        if on := next((node for node, level in switched if bool((constant(program.module, level) != 0).any())), None):
            raise ProbeError(f"{get_tag(on).site} has noise, or a format with a level, that is on; plans are measured without")
        if not program.ran("partition-blocks"):
            program = PartitionBlocks()(program)
        return cls(program=program, batches=batches, _replay=BlockReplay(program))

    def measure(
        self, plans: Mapping[str, Mapping[str, Assignment]], *, base: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Measured]:  # fmt: skip
        """Return the scores of the model as each of ``plans`` stores it, by the plan's name.

        Every batch is run clean once and then by every plan, so that what is kept does not grow with the data. A plan is run
        from the first block that it changes, or in which it differs from the plan ``base``; with ``base`` a batch whose clean
        scores are known is not run clean again. Results are those of :func:`stored`, bit for bit. ``progress`` is told the runs
        done and their number. Raises :class:`ProbeError` where logits are not finite.
        """
        runs = _Runs.of(self.program, self._replay, plans, base, self._weights, self._blocks)
        total = len(self.batches) * (len(plans) + 1)
        asked = {(target, fmt) for plan in runs.plans.values() for target, (_, fmt) in plan.weights.items()}
        for gone in self._weights.keys() - asked:  # room for what is stored now
            del self._weights[gone]
        order = sorted(plans, key=lambda name: base is not None and name != base)  # the base first
        clean: list[Scores] = []
        found: dict[str, list[Scores]] = {name: [] for name in plans}
        done = 0
        with torch.no_grad():
            for number, batch in enumerate(self.batches):
                known, scores = self._reference(number, None if base is None else self._clean.get(number), runs)
                clean.append(scores)
                done += 1
                for name in order:
                    found[name].append(score(known, runs.stored(name, batch)))
                    done += 1
                    if progress is not None:
                        progress(done, total)
        tokens = np.concatenate([_tokens(batch) for batch in self.batches]) if self.batches else np.zeros(0)
        return {name: Measured(scores=_joined(parts), clean=_joined(clean), tokens=tokens) for name, parts in found.items()}

    def _reference(self, number: int, known: tuple[Reference, Scores] | None, runs: _Runs) -> tuple[Reference, Scores]:
        """Return what the clean model says of a batch, if need be by running it, which the runs that follow may start from."""
        if known is not None:
            return known
        made = reference(self.batches[number], runs.replay.clean(self.batches[number]))
        if number not in self._clean and made[0].nbytes + sum(kept.nbytes for kept, _ in self._clean.values()) <= _HELD:
            self._clean[number] = made
        return made


def measure_plans(
    program: Program, batches: Sequence[Batch], plans: Mapping[str, Mapping[str, Assignment]], *,
    base: str | None = None, progress: Callable[[int, int], None] | None = None,
) -> dict[str, Measured]:  # fmt: skip
    """Return the scores of the model as each of ``plans`` stores it, by the plan's name; see :meth:`Evaluator.measure`."""
    return Evaluator.of(program, batches).measure(plans, base=base, progress=progress)


def _tokens(batch: Batch) -> Array:
    return batch.score_mask[: batch.size].sum(1).cpu().numpy().astype(np.float64)


def _joined(parts: Sequence[Scores]) -> Scores:
    if not parts:
        raise ProbeError("there are no samples to measure a plan on")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
