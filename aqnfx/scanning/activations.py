"""The half of a scan that needs data: what formats do to the inputs of products, and to keys and values."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aqnfx.numerics.formats import Format
from aqnfx.passes.insert_scan import InsertScan
from aqnfx.probes.data.batches import data_digest
from aqnfx.probes.data.examples import Data
from aqnfx.probes.forward import eager_forward
from aqnfx.probes.prepare import prepare
from aqnfx.probes.settings import RunSettings
from aqnfx.probes.tasks import KL
from aqnfx.scanning.activation_scan import SiteScan, scan_activations

# Without matmul here, so that a fused attention stays whole; where a model has products of its own they are scanned too.
_OPS, _ROLES = "linear|grouped_mm|conv|sdpa", "input|key|value"
_WHERE = "ops:linear|grouped_mm|conv|sdpa|matmul|bmm,roles:input|key|value|other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Records per site and format, facts per site, ranges per site id, and what is to be said of the data.

    Sites are named by their module where that has one scanned site, else by their id.
    """

    records: dict[str, dict[str, dict[str, Any]]]
    facts: dict[str, dict[str, Any]]
    ranges: dict[str, list[float]]
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)


def measure_activations(
    model: str, data: Data, formats: Mapping[str, Format], *, tokenizer: Any = None,
    progress: Callable[[int, int], None] | None = None, **options: Any,
) -> Activations:  # fmt: skip
    """Load and trace ``model``, run ``data`` through it once, and return what each format does to every operand.

    ``formats``: the texts that were asked for -> format. ``options`` are those of
    :class:`~aqnfx.probes.settings.RunSettings`. Raises subclasses of
    :class:`~aqnfx.errors.AqnfxError` for bad input.
    """
    wanted = RunSettings(**options)
    ready = prepare(model, data, wanted, where=f"ops:{_OPS},roles:{_ROLES}", task=KL.name, tokenizer=tokenizer)
    names = tuple(dict.fromkeys(fmt.name for fmt in formats.values()))
    program = InsertScan(where=_WHERE, formats=names)(ready.program)
    found = scan_activations(program, eager_forward(program), ready.batches(wanted), progress=progress)
    keys = _keys(found)
    return Activations(
        records={
            key: {text: dict(one.formats[fmt.name]) for text, fmt in formats.items()}
            for key, one in zip(keys, found, strict=True)
        },
        facts={key: {"site": one.site.id, **one.facts} for key, one in zip(keys, found, strict=True)},
        ranges={one.site.id: [one.facts["low"], one.facts["high"]] for one in found},
        notes=list(ready.notes),
        provenance={
            "path": Path(data).name if isinstance(data, (str, Path)) else "(values)", "digest": data_digest(ready.encoded),
            "samples": len(ready.encoded), "max_length": ready.longest, "device": str(ready.device),
            "dtype": program.source.get("dtype"), "pipeline": program.pipeline,
        },
    )  # fmt: skip


def _keys(found: Sequence[SiteScan]) -> list[str]:
    counts = collections.Counter(one.site.module for one in found)
    return [one.site.module if counts[one.site.module] == 1 else one.site.id for one in found]
