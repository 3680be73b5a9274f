"""Suffix replay: a run starts at the block of its first noisy site or replaced weight, from what the clean run left there."""

from __future__ import annotations

import collections
import copy
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from aqnfx.errors import ProbeError
from aqnfx.graph.blocks import Block, cut, lower, output_names, results
from aqnfx.graph.controls import NoiseControls
from aqnfx.graph.program import Program
from aqnfx.graph.tags import attribute
from aqnfx.probes.data.batches import Batch
from aqnfx.probes.forward import Forward, check_inputs, logits_of

Values = dict[str, Any]


@runtime_checkable
class Engine(Protocol):
    """How configurations of one batch are run."""

    def clean(self, batch: Batch) -> torch.Tensor:
        """Return the logits of the batch without noise; the runs that follow are of this batch."""

    def noisy(self, sites: Sequence[str]) -> torch.Tensor:
        """Return the logits with the noise that the controls say; ``sites`` are those whose level is not 0."""


class WholeGraph:
    """Runs the whole graph every time."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._batch: Batch | None = None

    def clean(self, batch: Batch) -> torch.Tensor:
        """Run the batch, all levels being 0."""
        self._batch = batch
        return self._forward(batch)

    def noisy(self, sites: Sequence[str]) -> torch.Tensor:
        """Run the batch again."""
        if self._batch is None:
            raise ProbeError("the clean run of a batch comes first")
        return self._forward(self._batch)


class BlockReplay:
    """Runs a program block by block; blocks before the first noisy one are not run again.

    The clean run keeps what crosses the boundaries at which some of ``starts``, sets of sites that are noisy together, begin, in
    at most ``memory`` bytes: where more would be needed, every second boundary is given up, and runs start earlier. ``offload``
    keeps them in the host's memory, page-locked where the values come from CUDA; copies go in the order of the device's work,
    and nothing waits for them. :meth:`beginning` is for weights and whole blocks that are replaced.

    A block has noise nodes at its noisy sites only. ``compiled`` compiles every block that stands in the model more than
    once (all of them where none does) without noise, and with noise inlined at the set of sites that most of ``starts``
    ask of it: weights and controls are inputs, so that blocks that differ in them share the code, and sizes that the
    graph leaves open are open there too. Other blocks, and other sets of sites, are not worth compiling.

    Results equal those of the whole graph, bit for bit where nothing is compiled. Raises :class:`PassError` before
    ``partition-blocks`` ran, :class:`ModelError` for a program that is no language model.
    """

    def __init__(
        self, program: Program, *, starts: Iterable[Sequence[str]] = (), memory: int | None = None, offload: bool = False,
        compiled: bool = False,
    ) -> None:  # fmt: skip
        check_inputs(program)
        self._program, self._memory, self._offload = program, memory, offload
        # The same values cross with and without noise, under the same names.
        self._clean = cut(program, noise=False)
        self._noisy = cut(program) if NoiseControls.of(program.module).sites else self._clean
        self._home = {site: place for place, block in enumerate(self._noisy) for site in block.noisy}
        self._last = {name: place for place, block in enumerate(self._noisy) for name in block.inputs}
        self._last |= dict.fromkeys(output_names(program), len(self._noisy))
        self._weights = {
            name: attribute(program.module, name).detach() for block in self._noisy for name in block.attributes
        }
        asked = [tuple(sites) for sites in starts]
        self._starts = sorted({*map(self.first, asked)} - {0})
        self._base: tuple[dict[str, torch.Tensor], dict[int, Block]] = {}, {}
        self._variants: dict[tuple[int, tuple[str, ...]], Block] = {}
        counts = collections.Counter(block.fingerprint for block in self._clean)
        repeated = {fingerprint for fingerprint, count in counts.items() if count > 1}
        self._worth = (repeated or set(counts)) if compiled else set[str]()
        self._common = self._frequent(asked)
        self._kept: dict[int, Values] = {}
        self._devices: dict[str, torch.device] = {}
        self._calls: dict[str, Callable[..., Any]] = {}
        self.compile_seconds = 0.0
        """What the first calls of compiled blocks took: compiling, and one run of each."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self._clean)

    @property
    def kept(self) -> tuple[int, ...]:
        """Places of the blocks that runs of the current batch can start at."""
        return tuple(self._kept)

    def first(self, sites: Sequence[str]) -> int:
        """Return the place of the first block that holds one of ``sites``; :class:`ProbeError` for one without noise."""
        unknown = [site for site in sites if site not in self._home]
        if unknown:
            raise ProbeError(f"{len(unknown)} sites have no noise node, first {unknown[0]}; insert noise there first")
        return min((self._home[site] for site in sites), default=0)

    def beginning(self, changes: Iterable[tuple[Collection[str], Collection[int]]], memory: int | None = None) -> BlockReplay:
        """Return what runs the same blocks from where ``changes`` begin, keeping at most ``memory`` bytes for it."""
        made = copy.copy(self)
        made._starts, made._memory = sorted({self.first_changed(*change) for change in changes} - {0}), memory
        made._base, made._kept = ({}, {}), {}
        return made

    def first_changed(self, weights: Collection[str], numbers: Collection[int] = ()) -> int:
        """Return the place of the first block that reads one of ``weights`` or has one of ``numbers``."""
        return next(
            (
                place
                for place, block in enumerate(self._clean)
                if block.number in numbers or not set(weights).isdisjoint(block.attributes)
            ),
            0,
        )

    def clean(
        self, batch: Batch, weights: Mapping[str, torch.Tensor] | None = None, blocks: Iterable[Block] = ()
    ) -> torch.Tensor:
        """Run the batch without noise nodes, and keep what later runs start from.

        With ``weights`` in place of the parameters of these names, and ``blocks``, cut from the same program with formats, in
        place of those of their numbers: :meth:`replaced` starts from them, but for what it replaces.
        """
        self._base = dict(weights or {}), {block.number: block for block in blocks}
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        names = [n.name for n in self._program.graph.nodes if n.op == "placeholder"]
        bound = self._program.bind(**{name: given[name] for name in self._program.signature.tensor_names})
        values: Values = dict(zip(names, bound, strict=True))
        self._kept, stride, copies = {0: dict(values)}, 1, dict(values)
        for place in range(len(self._clean)):
            if place in self._starts and self._starts.index(place) % stride == 0:
                self._kept[place] = self._away(values, copies) if self._offload else dict(values)
                while self._memory is not None and len(self._kept) > 1 and self.held > self._memory:
                    stride *= 2
                    gone = [p for i, p in enumerate(self._starts) if i % stride and p in self._kept]
                    # With one boundary left, none is what fits.
                    for p in gone or self._starts:
                        self._kept.pop(p, None)
                used = {name for held in self._kept.values() for name in held}
                copies = {name: value for name, value in copies.items() if name in used}
            self._step(self._stands(place), place, values)
        return self._logits(values)

    def noisy(self, sites: Sequence[str]) -> torch.Tensor:
        """Run the current batch from the last kept boundary before the first of ``sites``."""
        if not self._kept:
            raise ProbeError("the clean run of a batch comes first")
        first = self.first(sites)
        active: dict[int, list[str]] = {}
        for site in sites:
            active.setdefault(self._home[site], []).append(site)
        start, values = self._from(first)
        for place in range(start, len(self._clean)):
            block = self._with_noise(place, active[place]) if place in active else self._stands(place)
            self._step(block, place, values)
        return self._logits(values)

    def replaced(self, weights: Mapping[str, torch.Tensor], blocks: Iterable[Block] = ()) -> torch.Tensor:
        """Run the current batch without noise, with ``weights`` and ``blocks`` in place of those of :meth:`clean`."""
        if not self._kept:
            raise ProbeError("the clean run of a batch comes first")
        changed = {block.number: block for block in blocks}
        start, values = self._from(self.first_changed(weights, changed))
        for place in range(start, len(self._clean)):
            number = self._clean[place].number
            self._step(changed.get(number) or self._stands(place), place, values, weights)
        return self._logits(values)

    def _stands(self, place: int) -> Block:
        """Return the block without noise that runs at a place."""
        return self._base[1].get(self._clean[place].number, self._clean[place])

    def _from(self, first: int) -> tuple[int, Values]:
        """Return the last kept boundary at or before the block ``first``, and what crosses it."""
        start = max(place for place in self._kept if place <= first)
        return start, self._back(self._kept[start]) if self._offload and start else dict(self._kept[start])

    def _away(self, values: Values, copies: Values) -> Values:
        """Return the values with tensors copied to the host; ``copies`` holds those of earlier boundaries, and the inputs."""
        for name, value in values.items():
            if name not in copies and isinstance(value, torch.Tensor):
                pin = value.device.type == "cuda"
                self._devices[name] = value.device
                copies[name] = torch.empty_like(value, device="cpu", pin_memory=pin).copy_(value, non_blocking=pin)
        return {name: copies.get(name, value) for name, value in values.items()}

    def _back(self, values: Values) -> Values:
        """Return kept values on the devices that they came from."""
        return {
            name: value.to(self._devices[name], non_blocking=True) if name in self._devices else value
            for name, value in values.items()
        }

    def _with_noise(self, place: int, sites: Sequence[str]) -> Block:
        """Return a block with noise at ``sites`` only, lowered where that is compiled."""
        key = place, tuple(sorted(set(sites)))
        if key not in self._variants:
            clean = self._clean[place]
            (block,) = cut(self._program, noise=frozenset(sites), only=(clean.number,))
            common = self._common.get(clean.fingerprint) == block.pattern
            self._variants[key] = lower(block) if common else block
        return self._variants[key]

    def _frequent(self, starts: Sequence[tuple[str, ...]]) -> dict[str, tuple[int, ...]]:
        """Return, per distinct block, the set of noisy sites that most of its runs have."""
        place = {site: i for block in self._noisy for i, site in enumerate(block.noisy)}
        counts: dict[str, collections.Counter[tuple[int, ...]]] = {}
        for sites in starts:
            members: dict[int, list[int]] = {}
            for site in set(sites):
                members.setdefault(self._home[site], []).append(place[site])
            for home, found in ((h, f) for h, f in members.items() if self._clean[h].fingerprint in self._worth):
                counts.setdefault(self._clean[home].fingerprint, collections.Counter())[tuple(sorted(found))] += 1
        return {fingerprint: counter.most_common(1)[0][0] for fingerprint, counter in counts.items()}

    def _step(
        self, block: Block, place: int, values: Values, weights: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        known = collections.ChainMap(dict(weights or {}), self._base[0], self._weights)
        arguments = [values[name] for name in block.inputs] + [known[name] for name in block.attributes]
        arguments += block.stores.values()
        values.update(zip(block.outputs, self._call(block)(*arguments), strict=True))
        for name in [n for n in values if self._last.get(n, -1) <= place]:
            del values[name]

    def _call(self, block: Block) -> Callable[..., Any]:
        # Equal blocks share one function, so that it is compiled once.
        if block.fingerprint not in self._calls:
            compiled = block.lowered or block.fingerprint in self._worth
            call = torch.compile(block.module) if compiled else block.module
            self._calls[block.fingerprint] = call
            return self._timed(call, block) if compiled else call
        return self._calls[block.fingerprint]

    def _timed(self, call: Callable[..., Any], block: Block) -> Callable[..., Any]:
        def first(*arguments: Any) -> Any:
            started = time.perf_counter()
            for value, dims in zip(arguments, block.dynamic, strict=True):
                if dims:
                    torch._dynamo.maybe_mark_dynamic(value, dims)
            found = call(*arguments)
            self.compile_seconds += time.perf_counter() - started
            return found

        return first

    def _logits(self, values: Values) -> torch.Tensor:
        return logits_of(self._program.unflatten(results(self._program, values)))

    @property
    def held(self) -> int:
        """The bytes of the kept tensors but the inputs, shared ones once."""
        tensors = {id(v): v for place, values in self._kept.items() if place for v in values.values()
                   if isinstance(v, torch.Tensor)}  # fmt: skip
        inputs = {id(v) for v in self._kept[0].values()}
        return sum(v.numel() * v.element_size() for key, v in tensors.items() if key not in inputs)
