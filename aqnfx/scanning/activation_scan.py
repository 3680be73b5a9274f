"""What number formats do to the values at the sites of a program, over data: run, then read the accumulators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aqnfx.errors import InputError, ProbeError
from aqnfx.graph.program import Program
from aqnfx.graph.scans import ScanBuffers
from aqnfx.graph.sites import Site
from aqnfx.numerics.format_stats import error_record
from aqnfx.ops.scan import COUNT, facts
from aqnfx.probes.capture import own_rows
from aqnfx.probes.data.batches import Batch
from aqnfx.probes.forward import Forward

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteScan:
    """What one site held: ``formats``, name -> :func:`~aqnfx.numerics.format_stats.error_record`, and
    :func:`~aqnfx.ops.scan.facts` of its values.
    """

    site: Site
    formats: Mapping[str, Mapping[str, Any]]
    facts: Mapping[str, Any]


def scan_activations(
    program: Program, forward: Forward, batches: Sequence[Batch], *, progress: Progress | None = None
) -> tuple[SiteScan, ...]:
    """Run ``batches`` through ``program``, which has scan nodes, and return what each site held, in execution order.

    What was counted before is forgotten. ``progress`` is told the batches done and their number. Raises :class:`PassError`
    without scan nodes, :class:`InputError` without batches, :class:`ProbeError` where a site held nothing, or a value that is
    not finite.
    """
    if not batches:
        raise InputError("there are no samples to scan activations on")
    buffers = ScanBuffers.of(program.module)
    buffers.reset()
    with torch.no_grad():
        for number, batch in enumerate(batches, start=1):
            forward(own_rows(batch))
            if progress is not None:
                progress(number, len(batches))
    found = []
    for site in program.all_sites:
        parts = buffers.sites.get(site.id)
        if parts is None:
            continue
        moments = parts["moments"].cpu()
        if not float(moments[COUNT]):
            raise ProbeError(f"nothing was counted at {site.id}; the samples are all padding there")
        if not (bool(moments.isfinite().all()) and bool(parts["extremes"].isfinite().all())):
            raise ProbeError(f"activations are not finite at {site.id}; run the model in float32")
        count = int(moments[COUNT])
        records = {name: error_record(sums, count) for name, sums in zip(buffers.formats, parts["sums"].cpu(), strict=True)}
        found.append(
            SiteScan(site=site, formats=records, facts=facts(moments, parts["extremes"].cpu(), parts["magnitude"].cpu()))
        )
    return tuple(found)
