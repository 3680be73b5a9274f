"""predict: the cost of noise at every site, channel and level at once, from forward + backward passes.

To second order KL(clean ‖ perturbed) = ½ δᵀJᵀFJδ, with J the Jacobian of the logits and F = diag(p) - ppᵀ their Fisher
matrix (Kullback and Leibler 1951; Amari 1998). For v with independent entries of mean 0 and variance 1 the vector
u = √p⊙v - p(√p·v) has covariance F, so with g the gradient of Σ logits·u at a site E (g·δ)² = δᵀJᵀFJδ: one backward
pass serves all sites. Signs instead of normal v have the same mean and less variance (Hutchinson 1990).
"""

from __future__ import annotations

import numbers
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aqnfx.errors import InputError, ModelError, ProbeError
from aqnfx.graph.operands import read_as_returned
from aqnfx.graph.opkinds import base_name
from aqnfx.graph.program import Program
from aqnfx.graph.scores import ScoreBuffers, is_parameter_row
from aqnfx.graph.sites import Site
from aqnfx.graph.tags import get_tag
from aqnfx.numerics.perturbations import perturbation
from aqnfx.probes.capture import own_rows
from aqnfx.probes.data.batches import Batch
from aqnfx.probes.forward import Forward
from aqnfx.probes.memory import peak_memory_mib
from aqnfx.probes.projection import OUTPUTS, Output, check_output, positions, projection

Array = NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predictions:
    """What one-pass probing found, from n samples and K projection draws.

    ``costs`` fp64 (S, n): per site and sample Σ (g·s)², averaged over the draws; the KL of noise of level l is l²/2 of
    it, in nats summed over the sample's ``tokens`` (n,) positions. ``sketch`` fp64 (S, D, K, n): Σ g·δ of the declared
    ``perturbations``, whose columns add up over sites; ``elements`` fp64 (S, D, n): Σ (g·δ)² over elements of
    the first draw, where it was asked for. ``channels``: site -> fp64 (2, C), mean over samples of the cost
    of each channel and its standard error (NaN where a value belongs to no sample). ``weights``: parameter -> fp64
    (batches,), Σ g² of each batch; ``offsets`` are the numbers of their first samples. ``shared``: the sites whose values
    belong to no sample; in the sketch the sum of a batch stands at its first sample. ``stored_before``: operand -> the
    output that it reads as it is, so that both together are one error and not two. ``reached`` (S,): whether a gradient
    arrived; a site without one has no differentiable path to the output. ``notes`` say what a reader has to know.
    """

    sites: tuple[Site, ...]
    kind: str
    tokens: NDArray[np.int64]
    costs: Array
    draws: int
    reached: NDArray[np.bool_]
    perturbations: tuple[str, ...] = ()
    sketch: Array | None = None
    elements: Array | None = None
    channels: Mapping[str, Array] = field(default_factory=dict)
    weights: Mapping[str, Array] = field(default_factory=dict)
    offsets: tuple[int, ...] = (0,)
    shared: frozenset[str] = frozenset()
    stored_before: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.tokens)

    @property
    def unreached(self) -> tuple[str, ...]:
        """Ids of the sites that have no differentiable path to the output."""
        return tuple(s.id for s, ok in zip(self.sites, self.reached, strict=True) if not ok)

    def rows(self, sites: Sequence[str]) -> list[int]:
        """Return the rows of ``sites``; raises :class:`ProbeError` for one that was not scored."""
        known = {site.id: row for row, site in enumerate(self.sites)}
        sites = tuple(dict.fromkeys(sites))
        missing = [site for site in sites if site not in known]
        if missing:
            raise ProbeError(f"{len(missing)} sites were not scored, first {missing[0]}; insert-score there first")
        return [known[site] for site in sites]

    def kl(self, sites: Sequence[str], level: float) -> Array:
        """Return the predicted KL of independent noise of ``level`` at all ``sites`` together, fp64 (n,): nats per sample.

        NaN where none of the sites has a differentiable path to the output. Raises :class:`InputError` for a level that is
        negative or no number.
        """
        if not 0.0 <= level < float("inf"):
            raise InputError(f"noise level {level} must be finite and not negative")
        rows = self.rows(sites)
        if not self.reached[rows].any():
            return np.full(self.samples, np.nan)
        if not perturbation(self.kind).random:
            return self.perturbed_kl(sites, self.kind, level)
        return np.asarray(0.5 * level**2 * self.costs[rows].sum(axis=0))

    def perturbed_kl(self, sites: Sequence[str], name: str, scale: float = 1.0) -> Array:
        """Return the predicted KL of the declared perturbation ``name`` at all ``sites`` together, fp64 (n,).

        The sums of the sites add up before they are squared, so interactions between sites are part of it. An operand whose
        value is stored as an output of the set already adds nothing.
        """
        if self.sketch is None or name not in self.perturbations:
            raise InputError(f"perturbation {name!r} was not declared; declared: {', '.join(self.perturbations) or 'none'}")
        rows = self.rows(sites)
        if not self.reached[rows].any():
            return np.full(self.samples, np.nan)
        chosen = {self.sites[row].id for row in rows}
        if perturbation(name).idempotent:  # a format changes nothing in what it has stored already
            chosen = {site for site in chosen if self.stored_before.get(site) not in chosen}
        table = self.sketch[:, self.perturbations.index(name)]
        kept = {site.id: row for row, site in enumerate(self.sites) if site.id in chosen}
        own = table[[row for site, row in kept.items() if site not in self.shared]].sum(axis=0)
        shared = table[[row for site, row in kept.items() if site in self.shared]].sum(axis=0)
        squares = np.square(own)
        if self.shared & chosen:
            # A sum over a batch: its own square spread over the samples, and with every sample's sum the cross term.
            # The samples' projections are independent, so terms of two samples are 0 in the mean.
            whole, weight = np.zeros_like(shared), np.zeros(self.samples)
            for first, last in zip(self.offsets, (*self.offsets[1:], self.samples), strict=True):
                whole[:, first:last] = shared[:, first : first + 1]
                weight[first:last] = self.tokens[first:last] / max(int(self.tokens[first:last].sum()), 1)
            squares = squares + weight * np.square(whole) + 2.0 * whole * own
        return np.asarray(0.5 * scale**2 * squares.mean(axis=0))

    def channel_kl(self, site: str, level: float) -> Array:
        """Return fp64 (2, C): the KL in nats per token of noise of ``level`` on each channel alone, and its standard error."""
        if site not in self.channels:
            (row,) = self.rows([site])
            if not self.reached[row]:
                raise ProbeError(f"{site} has no differentiable path to the output, so nothing is known of its channels")
            if not perturbation(self.kind).random:
                raise ProbeError(f"{self.kind} has no cost per channel: its channels interact; use perturbed_kl")
            raise ProbeError(f"{site} has no channels of fixed number, or insert-score ran with channels=false")
        return np.asarray(0.5 * level**2 * self.channels[site] * self.samples / self.tokens.sum())


def predict(
    program: Program,
    forward: Forward,
    batches: Iterable[Batch],
    *,
    draws: int = 4,
    seed: int = 0,
    output: Output = "categorical",
    progress: Progress | None = None,
) -> Predictions:
    """Run the score nodes of ``program`` over ``batches`` and return the predicted costs.

    ``program`` has gone through ``insert-score`` with room for the samples and ``draws``; ``forward`` runs it. All draws
    of a batch share its forward pass. ``output`` "gaussian" takes the output as the mean of a normal distribution of
    unit variance (squared error). Positions outside of the batch's score mask do not count. The draws depend on
    ``seed`` and the number of the sample, not on the batch size. Raises :class:`PassError` without score nodes,
    :class:`ModelError` when no gradient can flow, :class:`ProbeError` for logits or gradients that are not finite.
    """
    if isinstance(draws, bool) or not isinstance(draws, numbers.Integral) or draws < 1:
        raise InputError(f"draws {draws!r} must be a whole number of at least 1")
    if output not in OUTPUTS:
        raise InputError(f"output {output!r} is not one of {', '.join(OUTPUTS)}")
    if torch.is_inference_mode_enabled():
        raise ModelError("predicting needs gradients, which torch.inference_mode forbids; call it outside")
    if not isinstance(batches, Iterable):
        raise InputError(f"batches must be a sequence of batches, found one {type(batches).__name__}; put it into a list")
    batches = tuple(batches)
    if not batches:
        raise InputError("there are no samples to predict on: the batches are empty, or a generator that was used before")
    buffers = ScoreBuffers.of(program.module)
    samples = sum(batch.size for batch in batches)
    room = buffers.sequences.shape
    if draws > room[1] or samples > room[2]:
        raise ProbeError(
            f"{samples} samples and {draws} draws asked; insert-score has room for samples={room[2]} draws={room[1]}"
        )
    buffers.reset()
    started, tokens = time.perf_counter(), np.zeros(samples, dtype=np.int64)
    with _weights_frozen(program), torch.enable_grad():
        for number, given in enumerate(batches):
            batch = own_rows(given) if isinstance(given, Batch) else given
            logits = forward(batch)
            if not logits.requires_grad:
                raise ModelError(
                    "no gradient reaches the output: the model runs under torch.no_grad, detaches its activations, or no "
                    "scored site has a path to the output"
                )
            check_output(logits, output)
            mask = positions(batch, logits)
            counts = mask[: batch.size].reshape(batch.size, -1).sum(1)
            tokens[batch.row_offset : batch.row_offset + batch.size] = counts.cpu().numpy()
            for draw in range(draws):
                buffers.set_run(draw=draw, row_offset=batch.row_offset)
                u = projection(
                    logits.detach(), mask, seed=seed, draw=draw, row_offset=batch.row_offset, output=output,
                    number=getattr(batch, "number", None),
                )  # fmt: skip
                torch.autograd.backward([logits], [u], retain_graph=draw + 1 < draws)
                if progress is not None:
                    progress(number * draws + draw + 1, len(batches) * draws)
            del logits, u  # and with them what the score nodes keep, before the next batch runs
    facts = {
        "passes": len(batches), "backward_passes": len(batches) * draws, "draws": draws, "seed": seed,
        "seconds": time.perf_counter() - started,
        "peak_memory_mib": peak_memory_mib(buffers.sequences.device),
    }  # fmt: skip
    offsets = tuple(sorted(batch.row_offset for batch in batches))
    return _collect(program, buffers, tokens, draws, offsets, facts)


@contextmanager
def _weights_frozen(program: Program) -> Iterator[None]:
    """Compute no gradient of any weight inside of the block: the score nodes do not need them."""
    wanted = [p for p in program.module.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _collect(
    program: Program, buffers: ScoreBuffers, tokens: NDArray[np.int64], draws: int, offsets: tuple[int, ...],
    facts: dict[str, Any],
) -> Predictions:  # fmt: skip
    samples = len(tokens)
    sites = {site.id: site for site in program.all_sites}
    names = [name for name in buffers.rows if name in sites]
    rows = [buffers.rows[name] for name in names]
    table = buffers.sequences[:, :draws, :samples].mean(dim=1).cpu().numpy()
    if not np.isfinite(table).all():
        broken = next(name for name, row in buffers.rows.items() if not np.isfinite(table[row]).all())
        raise ProbeError(f"the value or the gradient is not finite at {broken}{_in_half(program)}")
    reached = buffers.hits.cpu().numpy() > 0
    weights = {
        name.removesuffix(":weight"): table[row, list(offsets)]
        for name, row in buffers.rows.items()
        if is_parameter_row(name)
    }
    for row in (buffers.rows[name] for name in names if name in buffers.shared):
        table[row] = _spread(table[row], tokens, offsets)
    channels = {}
    for site, sums in buffers.channels.items():
        if not reached[buffers.rows[site]]:
            continue
        mean = sums[0].cpu().numpy() / (draws * samples)
        spread = np.maximum(sums[1].cpu().numpy() / (draws * samples) - mean**2, 0.0)
        # Draws of one sample are not independent of each other, so only samples count: too wide rather than too narrow.
        channels[site] = np.stack([mean, np.sqrt(spread / max(samples - 1, 1))])
        if site in buffers.shared:
            channels[site][1] = np.nan
    sketch = None
    if buffers.sketch is not None:
        sketch = buffers.sketch[rows, :, :draws, :samples].cpu().numpy()
        if not np.isfinite(sketch).all():
            broken = names[int(np.argwhere(~np.isfinite(sketch))[0, 0])]
            raise ProbeError(
                f"a declared perturbation ({', '.join(buffers.perturbations)}) or its gradient is not finite at {broken}: "
                f"the values are beyond the format's range, or the model's own{_in_half(program)}"
            )
    elements = None if buffers.elements is None else buffers.elements[rows, :, :samples].cpu().numpy()
    return Predictions(
        sites=tuple(sites[name] for name in names), kind=buffers.kind, tokens=tokens, costs=table[rows], draws=draws,
        reached=reached[rows], perturbations=buffers.perturbations, sketch=sketch, elements=elements, channels=channels,
        provenance=facts, weights=weights, offsets=offsets, shared=frozenset(names) & buffers.shared,
        stored_before=read_as_returned(program.places), notes=_notes(program, set(names)),
    )  # fmt: skip


def _in_half(program: Program) -> str:
    """Return the advice that helps in half precision, and only there."""
    dtypes = {p.dtype for p in program.module.parameters() if p.is_floating_point()}
    return "; run the model in float32" if dtypes - {torch.float32, torch.float64} else ""


def _spread(sums: Array, tokens: NDArray[np.int64], offsets: tuple[int, ...]) -> Array:
    """Return the sums of whole batches, each at its first sample, spread over the batch's samples by their tokens."""
    result = np.zeros_like(sums)
    for first, last in zip(offsets, (*offsets[1:], len(sums)), strict=True):
        share = tokens[first:last] / max(int(tokens[first:last].sum()), 1)
        result[first:last] = sums[first] * share
    return result


def _notes(program: Program, scored: set[str]) -> tuple[str, ...]:
    """Say what the gradients of the scored sites do not see."""
    after: set[torch.fx.Node] = set()
    cuts, routed = [], False
    nodes = {place.node for site, place in program.places.items() if site in scored}
    for node in program.graph.nodes:
        if node in nodes or any(n in after for n in node.all_input_nodes):
            after.add(node)
            name = base_name(node.target)
            if name in ("detach", "lift_fresh_copy") and node.users:
                cuts.append(get_tag(node).module)
            routed = routed or name in ("topk", "argmax", "sort")
    notes = []
    if cuts:
        notes.append(f"The model detaches values in {cuts[0] or 'its forward'}: no gradient sees what goes that way.")
    if routed:
        notes.append(
            "Values choose by rank in this model (routed experts): noise that changes a choice has no derivative, and its "
            "cost is not part of any prediction."
        )
    return tuple(notes)
