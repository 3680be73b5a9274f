"""predict: the cost of noise at every site, channel and level at once, from forward + backward passes.

To second order KL(clean ‖ perturbed) = ½ δᵀJᵀFJδ, with J the Jacobian of the logits and F = diag(p) - ppᵀ their Fisher
matrix (Kullback and Leibler 1951; Amari 1998). For v with independent entries of mean 0 and variance 1 the vector
u = √p⊙v - p(√p·v) has covariance F, so with g the gradient of Σ logits·u at a site E (g·δ)² = δᵀJᵀFJδ: one backward
pass serves all sites. Signs instead of normal v have the same mean and less variance (Hutchinson 1990).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from aqnfx.errors import InputError, ModelError, ProbeError
from aqnfx.graph.program import Program
from aqnfx.graph.scores import ScoreBuffers
from aqnfx.graph.sites import Site
from aqnfx.numerics.noise import NoiseKind
from aqnfx.numerics.signs import random_signs
from aqnfx.probes.capture import own_rows
from aqnfx.probes.data import Batch
from aqnfx.probes.forward import Forward
from aqnfx.probes.memory import peak_memory_mib

Array = NDArray[np.float64]
Output = Literal["categorical", "gaussian"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predictions:
    """What one-pass probing found, from n samples and K projection draws.

    ``costs`` fp64 (S, n): per site and sample Σ (g·s)², averaged over the draws; the KL of noise of level l is l²/2 of
    it, in nats summed over the sample's ``tokens`` (n,) positions. ``sketch`` fp64 (S, D, K, n): Σ g·δ of the declared
    ``perturbations``, whose columns add up over sites. ``channels``: site -> fp64 (2, C), mean over samples of the cost
    of each channel and its standard error. ``weights``: parameter -> fp64 (n,), Σ g² of its batch at the batch's first
    sample. ``reached`` (S,): whether a gradient arrived; a site without one has no path to the output.
    """

    sites: tuple[Site, ...]
    kind: str
    tokens: NDArray[np.int64]
    costs: Array
    draws: int
    reached: NDArray[np.bool_]
    perturbations: tuple[str, ...] = ()
    sketch: Array | None = None
    channels: Mapping[str, Array] = field(default_factory=dict)
    weights: Mapping[str, Array] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.tokens)

    @property
    def unreached(self) -> tuple[str, ...]:
        """Ids of the sites that have no path to the output."""
        return tuple(s.id for s, ok in zip(self.sites, self.reached, strict=True) if not ok)

    def rows(self, sites: Sequence[str]) -> list[int]:
        """Return the rows of ``sites``; raises :class:`ProbeError` for one that was not scored."""
        known = {site.id: row for row, site in enumerate(self.sites)}
        missing = [site for site in sites if site not in known]
        if missing:
            raise ProbeError(f"{len(missing)} sites were not scored, first {missing[0]}; insert-score there first")
        return [known[site] for site in sites]

    def kl(self, sites: Sequence[str], level: float) -> Array:
        """Return the predicted KL of independent noise of ``level`` at all ``sites`` together, fp64 (n,): nats per sample.

        NaN where none of the sites has a path to the output.
        """
        rows = self.rows(sites)
        if not self.reached[rows].any():
            return np.full(self.samples, np.nan)
        if self.kind == NoiseKind.BIAS:
            return self.perturbed_kl(sites, "bias", level)
        return np.asarray(0.5 * level**2 * self.costs[rows].sum(axis=0))

    def perturbed_kl(self, sites: Sequence[str], name: str, scale: float = 1.0) -> Array:
        """Return the predicted KL of the declared perturbation ``name`` at all ``sites`` together, fp64 (n,).

        The sums of the sites add up before they are squared, so interactions between sites are part of it.
        """
        if self.sketch is None or name not in self.perturbations:
            raise InputError(f"perturbation {name!r} was not declared; declared: {', '.join(self.perturbations) or 'none'}")
        together = self.sketch[self.rows(sites), self.perturbations.index(name)].sum(axis=0)
        return np.asarray(0.5 * scale**2 * np.square(together).mean(axis=0))

    def channel_kl(self, site: str, level: float) -> Array:
        """Return fp64 (2, C): the KL in nats per token of noise of ``level`` on each channel alone, and its standard error."""
        if site not in self.channels:
            raise ProbeError(f"{site} has no channels of fixed number; {len(self.channels)} sites have")
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
    if draws < 1:
        raise InputError(f"draws {draws} must be at least 1")
    batches = tuple(batches)
    if not batches:
        raise InputError("there are no samples to predict on")
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
            mask = _positions(batch, logits)
            counts = mask[: batch.size].reshape(batch.size, -1).sum(1)
            tokens[batch.row_offset : batch.row_offset + batch.size] = counts.cpu().numpy()
            for draw in range(draws):
                buffers.set_run(draw=draw, row_offset=batch.row_offset)
                u = projection(logits.detach(), mask, seed=seed, draw=draw, row_offset=batch.row_offset, output=output)
                torch.autograd.backward([logits], [u], retain_graph=draw + 1 < draws)
                if progress is not None:
                    progress(number * draws + draw + 1, len(batches) * draws)
    facts = {
        "passes": len(batches), "draws": draws, "seed": seed, "seconds": time.perf_counter() - started,
        "peak_memory_mib": peak_memory_mib(buffers.sequences.device),
    }  # fmt: skip
    return _collect(program, buffers, tokens, draws, samples, facts)


def projection(
    logits: torch.Tensor, mask: torch.Tensor, *, seed: int, draw: int, row_offset: int, output: Output = "categorical"
) -> torch.Tensor:
    """Return u with covariance F at the positions of ``mask`` (B, …) and 0 elsewhere, of the shape of ``logits`` (B, …, V)."""
    result = torch.empty_like(logits)
    width, broken = logits.shape[-1], torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
    for row in range(logits.shape[0]):
        values, chosen = logits[row].reshape(-1, width), mask[row].reshape(-1)
        wide = values if values.dtype == torch.float64 else values.to(torch.float32)
        broken[row] = (~torch.isfinite(wide).all(-1) & chosen).any()
        # Numbered by what is scored, not by where it stands: padding does not change a draw.
        numbers = chosen.cumsum(0, dtype=torch.int32) - 1
        u = random_signs(numbers, width, _draw_key(seed, draw, row_offset + row)).to(wide.dtype)
        if output == "categorical":
            p = torch.softmax(wide, dim=-1)
            u.mul_(p.sqrt())
            u.sub_(p.mul_(u.sum(-1, keepdim=True)))
        result[row] = u.masked_fill_(~chosen.unsqueeze(-1), 0.0).reshape(logits.shape[1:])
    if bool(broken.any()):
        first = row_offset + int(broken.nonzero()[0])
        raise ProbeError(f"logits are not finite at scored positions of sample {first}")
    return result


def _draw_key(seed: int, draw: int, sample: int) -> int:
    return int(np.random.SeedSequence((seed & 0xFFFFFFFF, draw, sample)).generate_state(1)[0])


def _positions(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """Return which positions of the logits count, bool (B, …) without the last dimension."""
    mask = torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    if logits.dim() == 3:  # a language model: the last position predicts nothing that is known
        mask[:, :-1] = batch.score_mask.to(logits.device)
    else:
        mask[: batch.size] = True
    return mask


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
    program: Program, buffers: ScoreBuffers, tokens: NDArray[np.int64], draws: int, samples: int, facts: dict[str, Any]
) -> Predictions:
    sites = {site.id: site for site in program.sites}
    names = [name for name in buffers.rows if name in sites]
    rows = [buffers.rows[name] for name in names]
    table = buffers.sequences[:, :draws, :samples].mean(dim=1).cpu().numpy()
    if not np.isfinite(table).all():
        broken = next(name for name, row in buffers.rows.items() if not np.isfinite(table[row]).all())
        raise ProbeError(f"the gradient is not finite at {broken}; run the model in float32")
    channels = {}
    for site, sums in buffers.channels.items():
        mean = sums[0].cpu().numpy() / (draws * samples)
        spread = np.maximum(sums[1].cpu().numpy() / (draws * samples) - mean**2, 0.0)
        # Draws of one sample are not independent of each other, so only samples count: too wide rather than too narrow.
        channels[site] = np.stack([mean, np.sqrt(spread / max(samples - 1, 1))])
    sketch = None
    if buffers.sketch is not None:
        sketch = buffers.sketch[rows, :, :draws, :samples].cpu().numpy()
        if not np.isfinite(sketch).all():
            broken = names[int(np.argwhere(~np.isfinite(sketch))[0, 0])]
            raise ProbeError(f"a declared perturbation or its gradient is not finite at {broken}; run the model in float32")
    return Predictions(
        sites=tuple(sites[name] for name in names), kind=buffers.kind, tokens=tokens, costs=table[rows], draws=draws,
        reached=buffers.hits.cpu().numpy()[rows] > 0, perturbations=buffers.perturbations, sketch=sketch,
        channels=channels, provenance=facts,
        weights={
            name.removesuffix(":weight"): table[row] for name, row in buffers.rows.items() if name.endswith(":weight")
        },
    )  # fmt: skip
