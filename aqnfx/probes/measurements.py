"""What a measuring run leaves behind: per-sample scores of every probe, level and seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from aqnfx.graph.sites import Site
from aqnfx.probes.capture import Captures
from aqnfx.probes.predict import Predictions
from aqnfx.probes.traces import WeightTrace

ProbeKind = Literal["operator", "layer", "window", "site", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A set of sites that are perturbed together.

    ``key`` names it within its kind: the operator kind (``"linear"``), the layer label (``"3"``, or ``"decoder.block:3"``
    where a model has several stacks), the window (``"2-4"``), the site id, or ``"all"``. ``layers`` holds the labels of
    the layers that it covers, in order (empty for operator and all probes); ``sites`` the site ids.
    """

    kind: ProbeKind
    key: str
    sites: tuple[str, ...]
    layers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """Scores of ``P`` probes × ``L`` levels × ``K`` seeds over ``n`` samples, paired with the clean run.

    ``tokens`` (n,) int64: scored positions per sample. ``clean["nll"]`` (n,): summed negative log-likelihood in nats;
    ``clean["exact_match"]`` (n,): 0 or 1, present only where the data has answers. ``scores[metric]`` has shape (P, L,
    K, n): ``"kl"`` and ``"nll"`` are sums over the sample's scored positions in nats, ``"top1"`` is the number of
    positions whose argmax equals the clean one, ``"exact_match"`` 0 or 1. ``seeds`` and ``levels`` are in the order of
    the axes. ``complete`` is false when the run was interrupted: then ``n`` is what was finished of
    ``samples_requested``, and ``numbers`` (n,) says which samples these are (None: the first). Where ``predictions``
    stood first, ``planned`` holds the probes that the map reports, of which only some were measured, and ``confirmed``
    a measurement of one probe at one level each: at its predicted critical threshold. Runs that failed have NaN scores
    and a line in ``errors``. ``captures`` holds activation statistics, ``weights`` the classical metric
    ``weight_metric`` of every parameter.
    """

    probes: tuple[Probe, ...]
    levels: tuple[float, ...]
    seeds: tuple[int, ...]
    base_level: float
    task: str
    noise_kind: str
    tokens: NDArray[np.int64]
    clean: dict[str, NDArray[np.float64]]
    scores: dict[str, NDArray[np.float64]]
    sites: tuple[Site, ...]
    samples_requested: int
    complete: bool
    provenance: dict[str, Any] = field(default_factory=dict)
    predictions: Predictions | None = None
    planned: tuple[Probe, ...] = ()
    captures: Captures | None = None
    confirmed: tuple[Measurements, ...] = ()
    weight_metric: str | None = None
    weights: tuple[WeightTrace, ...] = ()
    errors: tuple[str, ...] = ()
    numbers: NDArray[np.int64] | None = None

    @property
    def samples(self) -> int:
        """Number of samples that were scored under every configuration."""
        return int(self.tokens.shape[0])

    @property
    def places(self) -> NDArray[np.int64]:
        """The places of the samples among those asked for, int64 (n,)."""
        return np.arange(self.samples) if self.numbers is None else self.numbers

    def __post_init__(self) -> None:
        want = (len(self.probes), len(self.levels), len(self.seeds), self.samples)
        for metric, values in self.scores.items():
            if values.shape != want:
                raise ValueError(f"scores[{metric!r}] has shape {values.shape}, expected {want}")
        for metric, values in self.clean.items():
            if values.shape != (self.samples,):
                raise ValueError(f"clean[{metric!r}] has shape {values.shape}, expected {(self.samples,)}")
