"""The classical per-weight metrics: the trace of the Fisher matrix and of the Hessian, with standard errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from aqnfx.errors import InputError, ModelError, ProbeError
from aqnfx.graph.program import Program
from aqnfx.probes.data.batches import Batch
from aqnfx.probes.forward import Forward
from aqnfx.probes.predict import Predictions, Progress

Metric = Literal["fisher-trace", "hessian-trace"]
METRICS: tuple[Metric, ...] = ("fisher-trace", "hessian-trace")
SOURCES: Mapping[str, str] = {
    "fisher-trace": "trace of the Fisher matrix of the output, per token: Kirkpatrick et al. 2017 (PNAS 114), Amari 1998",
    "hessian-trace": "Hutchinson estimate of the trace of the Hessian of the mean NLL: Hutchinson 1990, Dong et al. 2020 "
    "(HAWQ-V2), Yao et al. 2020 (PyHessian)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTrace:
    """The trace for one parameter of ``size`` elements: an unbiased estimate and its standard error (None for one batch)."""

    name: str
    size: int
    value: float
    error: float | None

    def to_record(self) -> dict[str, Any]:
        """Return plain JSON values; ``mean`` is the trace per element."""
        return {"value": self.value, "error": self.error, "size": self.size, "mean": self.value / max(self.size, 1)}


def fisher_traces(predictions: Predictions, program: Program) -> tuple[WeightTrace, ...]:
    """Return the Fisher trace per token of every parameter, from predictions made with ``insert-score{weights=true}``.

    The squared gradient of a batch is unbiased for the sum over its samples, because their projections are independent.
    The standard error is over batches. Raises :class:`InputError` when no weights were scored.
    """
    if not predictions.weights:
        raise InputError("no weights were scored; use insert-score{weights=true}")
    sizes = {name: p.numel() for name, p in program.module.named_parameters()}
    tokens = np.add.reduceat(predictions.tokens.astype(np.float64), predictions.offsets)
    return tuple(_weighted(name, sizes.get(name, 0), sums, tokens) for name, sums in predictions.weights.items())


def hessian_traces(
    program: Program, forward: Forward, batches: Iterable[Batch], *, draws: int = 4, seed: int = 0,
    progress: Progress | None = None,
) -> tuple[WeightTrace, ...]:  # fmt: skip
    """Return the trace of the Hessian of the mean NLL (nats per token) for every parameter.

    Per batch and draw vᵀHv with random signs v, one double backward pass for all parameters: the blocks of different
    parameters do not mix in expectation. The standard error is over batches. Raises :class:`ModelError` where the
    graph cannot be differentiated twice (a fused attention kernel: run ``decompose-attention`` first).
    """
    batches = tuple(batches)
    if not batches or draws < 1:
        raise InputError(f"{len(batches)} batches and {draws} draws asked; both must be at least 1")
    named = {n: p for n, p in program.module.named_parameters() if p.is_floating_point()}
    wanted = {n: p.requires_grad for n, p in named.items()}
    generator = torch.Generator().manual_seed(seed)
    estimates: dict[str, list[float]] = {n: [] for n in named}
    weights: list[float] = []
    try:
        for p in named.values():
            p.requires_grad_(True)
        with torch.enable_grad():
            for number, batch in enumerate(batches):
                used, grads = _gradients(forward, batch, named)
                for draw in range(draws):
                    _products(used, grads, generator, estimates, named, last=draw + 1 == draws)
                    weights.append(float(batch.score_mask.sum()))
                    if progress is not None:
                        progress(number * draws + draw + 1, len(batches) * draws)
    finally:
        for n, p in named.items():
            p.requires_grad_(wanted[n])
    per_batch = np.array(weights)[::draws]
    return tuple(  # draws of one batch are not independent samples of the data: one term per batch
        _weighted(n, p.numel(), np.array(estimates[n]).reshape(-1, draws).mean(1) * per_batch, per_batch)
        for n, p in named.items()
    )


def _gradients(
    forward: Forward, batch: Batch, named: Mapping[str, torch.Tensor]
) -> tuple[list[str], tuple[torch.Tensor, ...]]:
    logits = forward(batch)[:, :-1]
    mask = batch.score_mask.to(logits.device)
    labels = batch.input_ids.to(logits.device)[:, 1:][mask]
    loss = torch.nn.functional.cross_entropy(logits[mask].double(), labels)
    if not loss.requires_grad or not bool(torch.isfinite(loss.detach())):
        raise ProbeError("the loss is not finite, or no gradient reaches the weights")
    grads = torch.autograd.grad(loss, list(named.values()), create_graph=True, allow_unused=True)
    used = [n for n, g in zip(named, grads, strict=True) if g is not None and g.requires_grad]
    return used, tuple(g for g in grads if g is not None and g.requires_grad)


def _products(
    used: list[str], grads: tuple[torch.Tensor, ...], generator: torch.Generator, estimates: dict[str, list[float]],
    named: Mapping[str, torch.Tensor], *, last: bool,
) -> None:  # fmt: skip
    signs = [
        torch.empty(named[n].shape).bernoulli_(0.5, generator=generator).mul_(2.0).sub_(1.0).to(named[n]) for n in used
    ]
    try:
        products = torch.autograd.grad(
            grads, [named[n] for n in used], signs, retain_graph=not last, allow_unused=True
        )
    except RuntimeError as error:
        if "derivative" not in str(error) and "not implemented" not in str(error):
            raise
        raise ModelError(
            f"the graph cannot be differentiated twice ({str(error).splitlines()[0]}); run decompose-attention before"
        ) from error
    found = {
        n: 0.0 if h is None else float((h.double() * v.double()).sum())
        for n, h, v in zip(used, products, signs, strict=True)
    }
    for n in named:
        estimates[n].append(found.get(n, 0.0))


def _weighted(name: str, size: int, sums: Any, weights: Any) -> WeightTrace:
    """Return Σ sums / Σ weights and the standard error of that ratio over its terms."""
    total = float(weights.sum())
    value = float(sums.sum()) / total if total else float("nan")
    n = len(sums)
    residuals = sums - value * weights
    error = float(np.sqrt(n / (n - 1) * np.square(residuals).sum()) / total) if n > 1 and total else None
    return WeightTrace(name=name, size=size, value=value, error=error)
