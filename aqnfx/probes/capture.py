"""capture: statistics of the activations at every site, per channel, and of their gradients; neither is stored."""

from __future__ import annotations

import dataclasses
import math
import numbers
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aqnfx.errors import InputError, ProbeError, nearest
from aqnfx.graph.captures import CaptureBuffers
from aqnfx.graph.opkinds import may_be_infinite
from aqnfx.graph.program import Program
from aqnfx.graph.sites import Site
from aqnfx.ops.capture import COUNT, LARGEST, MAGNITUDE, NOISE, SMALLEST, SQUARE, ZEROS
from aqnfx.ops.capture_gradient import GRADIENT_COUNT, GRADIENT_MAGNITUDE, GRADIENT_SQUARE
from aqnfx.probes.data.batches import Batch
from aqnfx.probes.forward import Forward

Array = NDArray[np.float64]
Progress = Callable[[int, int], None]

# Ratio of a channel's mean magnitude to the median of all channels.
CRITICAL, HIGH, MODERATE = 50.0, 20.0, 10.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SiteCapture:
    """What one site accumulated: ``channels`` fp64 (5, C) and ``totals`` fp64 (2,) as in :mod:`aqnfx.ops.capture`.

    ``masked``: padded positions were left out.
    """

    channels: Array
    totals: Array
    masked: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Captures:
    """Activation statistics of ``sites`` (site id -> what was accumulated there).

    ``perturbation`` is the declared one that ``snr_db`` refers to, "" for none. ``gradients``: site id -> fp64 (3,),
    number of elements, Σ|g| and Σg²; only sites that a gradient reached.
    """

    sites: tuple[Site, ...]
    records: Mapping[str, SiteCapture]
    perturbation: str = ""
    gradients: Mapping[str, Array] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def record(self, site: str) -> SiteCapture:
        """Return what was accumulated at a site; raises :class:`ProbeError` for one that was not captured."""
        if site not in self.records:
            raise ProbeError(
                f"site {site!r} was not captured; {len(self.records)} sites were{nearest(site, self.records)}; "
                "choose it in the where of insert-capture"
            )
        return self.records[site]

    def statistics(self, site: str) -> dict[str, float | int | None]:
        """Return the statistics of all counted values of a site.

        ``mean_magnitude``, ``rms`` and ``max`` (of the magnitude) have the unit of the activation; ``sparsity`` is the
        share of exact zeros; ``dynamic_range_db`` 20·log10(max / min non-zero magnitude), None where every value is 0;
        ``snr_db`` 10·log10(Σy² / Σδ²) against the declared perturbation: None where it changes nothing or none was
        declared, -inf where it overflows; ``n`` is the number of values. Where gradients were captured and arrived,
        ``grad_magnitude`` and ``grad_rms`` are the mean of |g| and the root of the mean of g² over them.
        """
        record = self.record(site)
        channels = record.channels
        n = int(record.totals[COUNT]) * channels.shape[1]
        energy, largest, smallest = channels[SQUARE].sum(), channels[LARGEST].max(), channels[SMALLEST].min()
        found: dict[str, float | int | None] = {
            "mean_magnitude": float(channels[MAGNITUDE].sum() / n),
            "rms": math.sqrt(energy / n),
            "max": float(largest),
            "sparsity": float(channels[ZEROS].sum() / n),
            "dynamic_range_db": 20.0 * (math.log10(largest) - math.log10(smallest)) if largest > 0 else None,
            "snr_db": _snr_db(float(energy), float(record.totals[NOISE])),
            "n": n,
        }
        if (gradient := self.gradients.get(site)) is not None:
            count = gradient[GRADIENT_COUNT]
            found["grad_magnitude"] = float(gradient[GRADIENT_MAGNITUDE] / count)
            found["grad_rms"] = math.sqrt(gradient[GRADIENT_SQUARE] / count)
        return found

    def channel_magnitude(self, site: str) -> Array:
        """Return the mean magnitude of each channel, fp64 (C,); C is 1 at a site without channels of fixed number."""
        record = self.record(site)
        return np.asarray(record.channels[MAGNITUDE] / record.totals[COUNT])

    def outliers(self, site: str, threshold: float = MODERATE) -> list[dict[str, Any]]:
        """Return the channels whose mean magnitude is at least ``threshold`` times the median channel's, largest first.

        Each is ``{channel, ratio, class}`` with the class "critical" above 50, "high" from 20, "moderate" from 10, else
        "low". Where the median is 0 no ratio exists: every channel that is not 0 is listed, largest magnitude first,
        with ratio None, class "undefined" and a ``note``. Raises :class:`InputError` for a threshold that is not
        positive.
        """
        if not isinstance(threshold, numbers.Real) or not float(threshold) > 0:
            raise InputError(f"outlier threshold {threshold!r} must be a positive number; 10 is usual")
        magnitude = self.channel_magnitude(site)
        median = float(np.median(magnitude))
        order = [int(c) for c in np.argsort(-magnitude, kind="stable") if magnitude[c] > 0]
        if median == 0.0:
            note = "the median channel is 0 throughout, so there is no ratio"
            return [{"channel": c, "ratio": None, "class": "undefined", "note": note} for c in order]
        ratios = [(c, float(magnitude[c] / median)) for c in order]
        return [{"channel": c, "ratio": r, "class": outlier_class(r)} for c, r in ratios if r >= threshold]


def outlier_class(ratio: float) -> str:
    """Return the class of a ratio to the median: "critical" above 50, "high" from 20, "moderate" from 10, else "low"."""
    if ratio > CRITICAL:
        return "critical"
    return "high" if ratio >= HIGH else "moderate" if ratio >= MODERATE else "low"


def _snr_db(energy: float, noise: float) -> float | None:
    if energy == 0.0 or noise == 0.0:
        return None
    if not math.isfinite(noise):
        return -math.inf
    return 10.0 * (math.log10(energy) - math.log10(noise))


def capture(
    program: Program, forward: Forward, batches: Sequence[Batch], *, progress: Progress | None = None
) -> Captures:
    """Run ``batches`` through ``program``, which has capture nodes, and return their statistics.

    What was accumulated before is forgotten. ``forward`` runs the program; rows at and beyond a batch's ``size`` are
    cut off, so they do not count anywhere. ``progress`` is called with the batches done and their number. Raises
    :class:`PassError` without capture nodes, :class:`InputError` without batches, and what :func:`collect` raises.
    """
    if not batches:
        raise InputError("there are no samples to capture on")
    CaptureBuffers.of(program.module).reset()
    started = time.perf_counter()
    with torch.no_grad():
        for number, batch in enumerate(batches, start=1):
            forward(own_rows(batch))
            if progress is not None:
                progress(number, len(batches))
    samples = sum(batch.size for batch in batches)
    return collect(program, passes=len(batches), samples=samples, seconds=time.perf_counter() - started)


def own_rows(batch: Batch) -> Batch:
    """Return the batch without the rows that only fill its shape."""
    if batch.size == len(batch.input_ids):
        return batch
    tensors = ("input_ids", "attention_mask", "score_mask", "answer_mask")
    cut = {name: value[: batch.size] for name in tensors if (value := getattr(batch, name)) is not None}
    return dataclasses.replace(batch, **cut)


def collect(program: Program, **facts: Any) -> Captures:
    """Return what the capture nodes of ``program`` have accumulated so far, with ``facts`` as provenance.

    A sum or selection that holds infinities or the least finite number, as an added mask leaves them, is left out.
    Raises :class:`PassError` without capture nodes, :class:`ProbeError` where a site counted nothing or met another
    value or gradient that is not finite.
    """
    buffers, ops = CaptureBuffers.of(program.module), {site.id: site for site in program.all_sites}
    records = {}
    for site, pair in buffers.sites.items():
        channels, totals = (tensor.detach().to("cpu", copy=True).numpy() for tensor in pair)
        if totals[COUNT] == 0:
            raise ProbeError(
                f"nothing was counted at {site}; run the program on samples that are not all padding first"
            )
        broken = np.flatnonzero(~np.isfinite(channels[:SMALLEST]).all(axis=0))
        masked = broken.size or channels[LARGEST].max() >= torch.finfo(getattr(torch, ops[site].dtype)).max / 2
        if masked and may_be_infinite(ops[site].op, ops[site].region):
            continue  # a mask was added to it: its infinities, or least finite numbers, are meant
        if broken.size:
            raise ProbeError(
                f"activations are not finite at {site}, in {broken.size} of {channels.shape[1]} channels, first "
                f"{broken[0]}; run the model in float32, and look for the first such site with insert-capture"
            )
        records[site] = SiteCapture(channels=channels, totals=totals, masked=site in buffers.masked)
    gradients = {site: tensor.to("cpu", copy=True).numpy() for site, tensor in buffers.gradients.items()}
    if broken_sites := [site for site, sums in gradients.items() if not np.isfinite(sums).all()]:
        raise ProbeError(f"the gradient is not finite at {broken_sites[0]}; run the model in float32")
    return Captures(
        sites=tuple(site for site in program.all_sites if site.id in records or site.id in gradients), records=records,
        perturbation=buffers.perturbation, provenance=facts,
        gradients={site: sums for site, sums in gradients.items() if sums[GRADIENT_COUNT] > 0},
    )  # fmt: skip
