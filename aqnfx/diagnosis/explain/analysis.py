"""Static structure joined with a sensitivity map: what a site costs for what it saves, and why (``aqnfx.analysis/1``)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from aqnfx.artifacts import Schema, jsonable
from aqnfx.diagnosis.explain.error_flow import error_flow
from aqnfx.diagnosis.explain.map_of_model import TAGS, as_probed, check_interval, check_number
from aqnfx.diagnosis.explain.reasons import Evidence, reasons
from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.errors import InputError
from aqnfx.graph.flops import Sizes, input_shapes
from aqnfx.graph.lengths import recorded, serves, trace_for
from aqnfx.graph.operands import Place
from aqnfx.graph.program import Program
from aqnfx.graph.sites import Role
from aqnfx.graph.structure import BALANCE, Structure, check_options, structure
from aqnfx.graph.tags import static_size
from aqnfx.numerics.formats import parse_format

TOP = 10
BATCH, TOKENS = 1, 128


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The structure of a model and, with a map, its sensitivity; every field is a key of the record.

    ``sites`` has an entry per site of the map with a cost, most sensitive first: ``id``, ``kl`` (nats per token at the base
    level), ``ci``, ``source`` (``measured`` or ``predicted``), ``share`` of the sum over all sites, ``kl_per_gflop`` (None
    where the operation counts no FLOPs), ``bits_saved`` and ``kl_per_mbit`` (None where the map is of noise).
    ``critical`` are the first of them that stand out, each with its ``reasons``. ``groups`` are the coupling groups with the
    sum of their sites' costs. ``error_flow`` says where error enters, and whether it is amplified or absorbed.
    """

    model: dict[str, Any]
    structure: Structure
    map: dict[str, Any] = field(default_factory=dict)
    sites: list[dict[str, Any]] = field(default_factory=list)
    critical: list[dict[str, Any]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    error_flow: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def costs(self) -> dict[str, float]:
        """Return the cost (KL) per site of role output: the sum over the site and its operands, as far as the map has it."""
        found: dict[str, float] = {}
        for entry in self.sites:
            site = self.structure.site(entry["id"]).id
            found[site] = found.get(site, 0.0) + entry["kl"]
        return found

    def to_record(self) -> dict[str, Any]:
        """Return the analysis as plain JSON values."""
        cleaned: dict[str, Any] = jsonable({
            "schema": Schema.ANALYSIS, "model": self.model, "structure": self.structure.to_record(), "map": self.map,
            "sites": self.sites, "critical": self.critical, "groups": self.groups, "error_flow": self.error_flow,
            "notes": self.notes,
        })  # fmt: skip
        return cleaned


def analyze(
    model: Program | nn.Module | str | Path,
    smap: SensitivityMap | None = None,
    *,
    batch: int | None = None,
    tokens: int | None = None,
    balance: float = BALANCE,
    top: int = TOP,
    allow_missing: Sequence[str] = (),
) -> Analysis:
    """Return the static structure of ``model`` and, with a map of its sensitivity, what each site costs and why.

    ``model`` is a Program that no pass has inserted nodes into, or what :func:`aqnfx.trace` takes; one that is loaded here
    has the dtype of its checkpoint. FLOPs and bytes are of one forward pass of ``batch`` samples of ``tokens`` positions
    (default: 1 × 128, or as traced where the trace does not hold for that, or what the model takes at most) on a machine of
    ``balance`` FLOP per byte. At most ``top`` critical sites are explained. ``allow_missing`` is that of :func:`aqnfx.trace`.

    Raises :class:`ArtifactError` where the map is of another model or holds values of the wrong kind, and
    :class:`InputError` for options out of range; loading and tracing raise what :func:`aqnfx.trace` raises.
    """
    if top < 1:
        raise InputError(f"top {top} must be at least 1")
    check_options(batch=batch, tokens=tokens, balance=balance)  # before a large model is loaded in vain
    lengths = recorded({"max_length": tokens} if smap is None else smap.provenance)
    program = (
        model if isinstance(model, Program) else trace_for(model, lengths, dtype="auto", allow_missing=allow_missing)
    )
    tagged = TAGS(program) if smap is None else as_probed(program, smap)
    batch, tokens = _sizes(tagged, batch, tokens)
    found = structure(tagged, batch=batch, tokens=tokens, balance=balance)
    about = {key: value for key, value in tagged.source.items() if key != "origin"}
    notes = list(tagged.notes)
    read, held = found.parameters, about.get("parameters")
    if isinstance(held, int) and held > read:
        notes.append(f"{held - read} of the model's {held} parameters are read by no operation of this forward pass")
    if smap is None:
        return Analysis(model=about, structure=found, groups=_groups(found, {}), notes=notes)
    costs = _costs(smap)
    sites = _entries(tagged, found, smap, costs, Sizes(tagged, input_shapes(tagged, batch, tokens)))
    if smap.format is None:
        notes.append("The map is of noise, which has no bits: diagnose with --perturb FORMAT for sensitivity per bit saved.")
    evidence = Evidence.of(smap, tagged, found)
    critical = _critical(sites, evidence, top)
    if sites and not critical:
        notes.append("No site stands out: no interval lies above twice the median cost of all sites.")
    return Analysis(
        model=about, structure=found, sites=sites, critical=critical, groups=_groups(found, costs), notes=notes,
        error_flow=error_flow(smap, tagged, found, {site: cost["kl"] for site, cost in costs.items()}),
        map={
            "metric": smap.task["metric"], "samples": smap.samples, "tokens": smap.task["tokens"],
            "kind": smap.noise["kind"], "base_level": smap.base_level, "method": smap.method, "partial": smap.partial,
            "digest": smap.model.get("digest"), "sites": len(smap.per_site), "sites_with_cost": len(sites),
        },
    )  # fmt: skip


def _sizes(program: Program, batch: int | None, tokens: int | None) -> tuple[int | None, int | None]:
    """Fill in what is not given: the usual numbers, but what the trace holds for, and no more than the model takes."""
    limit = program.source.get("max_positions")
    shapes = [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder"]
    fixed = [any(isinstance(static_size(s[d]), int) for s in shapes if len(s) > d) for d in range(2)]
    usual = min(TOKENS, limit) if isinstance(limit, int) else TOKENS
    return (
        BATCH if batch is None and not fixed[0] else batch,
        usual if tokens is None and not fixed[1] and serves(program, (usual,)) else tokens,
    )


def _costs(smap: SensitivityMap) -> dict[str, dict[str, Any]]:
    """Site -> ``kl``, ``ci`` and ``source`` at the base level, measured where it was; sites without a number are left out."""
    found = {}
    for entry in smap.per_site:
        for source in ("measured", "predicted"):
            level = entry.get(source, {}).get(smap.base_key, {})
            kl, ci = level.get("kl"), level.get("ci")
            if kl is None:
                continue
            check_number(kl, f"per_site {entry['id']!r}: kl")
            check_interval(ci, f"per_site {entry['id']!r}: ci")
            found[entry["id"]] = {"kl": float(kl), "ci": ci, "source": source}
            break
    return found


def _entries(
    program: Program, found: Structure, smap: SensitivityMap, costs: Mapping[str, Mapping[str, Any]], sizes: Sizes
) -> list[dict[str, Any]]:
    total = math.fsum(cost["kl"] for cost in costs.values())
    entries = []
    for site, cost in costs.items():
        flops = found.site(site).flops
        saved = _bits_saved(program.places[site], smap.format, sizes)
        entries.append({
            "id": site, **cost, "share": cost["kl"] / total if total > 0 else None, "flops": flops,
            "kl_per_gflop": cost["kl"] / flops * 1e9 if flops else None, "bits_saved": saved,
            "kl_per_mbit": cost["kl"] / saved * 1e6 if saved else None,
        })  # fmt: skip
    return sorted(entries, key=lambda entry: -entry["kl"])


def _bits_saved(place: Place, name: str | None, sizes: Sizes) -> int | None:
    """Bits that storing the value of a site in the format saves, scales counted; None without a format."""
    if name is None:
        return None
    shape = sizes.shape(place.value)
    channels = place.channel_dim % len(shape) if place.site.role is Role.WEIGHT and shape else 0
    return 8 * sizes.nbytes(place.value) - parse_format(name).stored_bits(shape, channels)


def _critical(sites: list[dict[str, Any]], evidence: Evidence, top: int) -> list[dict[str, Any]]:
    """The sites whose interval lies above twice the median cost of all sites, and what is known about them."""
    if not sites:
        return []
    usual = statistics.median(entry["kl"] for entry in sites)
    out = []
    for entry in sites:
        low = entry["ci"][0] if entry["ci"] is not None else None
        if low is not None and low > 2 * usual and entry["kl"] > 0:
            out.append({
                "id": entry["id"], "kl": entry["kl"], "ci": entry["ci"], "source": entry["source"], "share": entry["share"],
                "times_median": entry["kl"] / usual if usual > 0 else None, "reasons": reasons(entry["id"], evidence),
            })  # fmt: skip
    return out[:top]


def _groups(found: Structure, costs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Coupling groups: bytes of their parameters, and the sum of the costs of their weights, or else of their outputs."""
    out = []
    for group in found.groups:
        members = {name for site in group.sites for name in found.site(site).parameter_names}
        weights = [costs[site]["kl"] for site in group.sites if site in costs]
        outputs = [costs[o]["kl"] for site in group.sites if (o := site.removesuffix(":weight")) in costs]
        known, of = (weights, "weights") if weights else (outputs, "outputs")
        complete = len(known) == len(group.sites)
        out.append({
            "name": group.name, "reason": group.reason, "sites": list(group.sites), "parameters": sorted(members),
            "kl_sum": math.fsum(known) if complete else None, "kl_of": of if complete else None,
        })  # fmt: skip
    return out
