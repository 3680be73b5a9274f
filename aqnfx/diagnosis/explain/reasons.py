"""Why a site is critical: what its place in the graph and the numbers of a map say, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from aqnfx.artifacts import validate
from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.graph.coupling import TIED
from aqnfx.graph.operands import origin
from aqnfx.graph.opkinds import OpKind, base_name
from aqnfx.graph.program import Program
from aqnfx.graph.sites import Role
from aqnfx.graph.structure import Structure
from aqnfx.graph.tags import get_tag

OUTLIERS = 10.0
"""Least ratio of a channel's mean magnitude to the median one that counts as feeding outliers (moderate, in the map)."""
CONCENTRATED = 0.5
"""Least mean sum of squared probabilities of a softmax that counts as concentrated: two keys share all, or fewer."""
CONSUMERS = 3
"""Least number of readers that counts as many: query, key and value share theirs among three."""
LOUD = 0.5
"""Least RMS of what a branch adds, relative to the residual stream after it, that counts as dominating the stream."""

CREST = 30.0
"""Least ratio of the largest magnitude to the RMS that counts as outlier values (a normal distribution reaches about 5)."""
EXPONENT = 0.1
"""Least absolute error of a softmax's argument, in nats, that counts as large: probabilities change by a tenth."""

NONE_FOUND = {"reason": "no structural reason found", "number": None, "text": "no structural reason found"}


class _Activations(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)
    mean_magnitude: float | None = Field(default=None, ge=0)
    rms: float | None = Field(default=None, ge=0)
    max: float | None = Field(default=None, ge=0)


class _Channels(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)
    max_ratio: float | None = Field(default=None, ge=0)
    outlier_count: int = Field(default=0, ge=0)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What reasons are read from: the structure, which sites feed which, and a map's statistics by site.

    ``scales`` has the factor between a value and the argument of the softmax that it becomes; ``error`` is the relative
    error of the perturbation at the base level.
    """

    structure: Structure
    scales: dict[str, float]
    error: float
    feeds: dict[str, tuple[str, ...]]
    readers: dict[str, tuple[str, ...]]
    activations: dict[str, _Activations]
    channels: dict[str, _Channels]

    @classmethod
    def of(cls, smap: SensitivityMap | None, program: Program, structure: Structure) -> Evidence:
        """Read the evidence, without a map that of the graph alone; :class:`ArtifactError` for statistics of the wrong kind."""
        before: dict[str, list[str]] = {}
        after: dict[str, list[str]] = {}
        for source, reader in structure.edges:
            before.setdefault(reader, []).append(source)
            after.setdefault(source, []).append(reader)
        feeds = {site: tuple(sites) for site, sites in before.items()}
        outputs = {place.node: place.site.id for place in program.places.values() if place.position is None}
        for site, place in program.places.items():
            if place.position is not None:  # an operand is fed by what computes its value
                feeder = outputs.get(origin(place.value))
                feeds[site] = () if feeder is None else (feeder,)
        return cls(
            structure=structure, scales=_softmax_scales(program, after),
            error=0.0 if smap is None else smap.base_level * smap.unit_error,
            feeds=feeds, readers={site: tuple(sites) for site, sites in after.items()},
            activations={
                entry["id"]: validate(_Activations, entry["activations"], f"sensitivity map: activations of {entry['id']!r}")
                for entry in (() if smap is None else smap.per_site)
                if entry.get("activations")
            },
            channels={
                site: validate(_Channels, found, f"sensitivity map: channels of {site!r}")
                for site, found in ({} if smap is None else smap.channels).items()
            },
        )  # fmt: skip


def _softmax_scales(program: Program, after: dict[str, list[str]]) -> dict[str, float]:
    """Site -> the factor that its value is multiplied with before a softmax takes it, for sums and multiples of it alone."""
    nodes = program.site_nodes()
    found: dict[str, float] = {}
    for site in reversed(nodes):
        for reader in after.get(site, ()):
            kind, numbers = get_tag(nodes[reader]).op, [a for a in nodes[reader].args if isinstance(a, (int, float))]
            if kind is OpKind.SOFTMAX:
                found[site] = 1.0
            elif reader in found and kind is OpKind.ADD:
                found[site] = found[reader]
            elif reader in found and kind is OpKind.MUL and len(numbers) == 1 and numbers[0]:
                divided = base_name(nodes[reader].target) in ("div", "truediv", "true_divide", "divide")
                found[site] = found[reader] * abs(1 / numbers[0] if divided else numbers[0])
    return found


def reasons(site: str, evidence: Evidence) -> list[dict[str, Any]]:
    """Return the structural reasons that the numbers support: each a ``reason``, the ``number`` behind it, and a ``text``.

    A single entry says that none was found, where none was.
    """
    finders = (_single_path, _outliers, _outlier_values, _concentrated, _exponent, _consumers, _tied, _loud)
    return [reason for find in finders for reason in find(site, evidence)] or [dict(NONE_FOUND)]


def _single_path(site: str, evidence: Evidence) -> Iterator[dict[str, Any]]:
    found = evidence.structure.site(site)
    if found.single_path:
        single = sum(s.single_path for s in evidence.structure.sites)
        yield {
            "reason": "unprotected single path", "number": single,
            "text": f"every path from the inputs to the output crosses it (as {single} of "
            f"{len(evidence.structure.sites)} sites); no residual connection goes around it",
        }  # fmt: skip


def _outliers(site: str, evidence: Evidence) -> Iterator[dict[str, Any]]:
    """Outlier channels of the value itself, or of what feeds it; the largest ratio is named."""
    found = [
        (ratio, name)
        for name in (site, *evidence.feeds.get(site, ()))
        if name in evidence.channels and (ratio := evidence.channels[name].max_ratio) is not None and ratio >= OUTLIERS
    ]
    if found:
        ratio, name = max(found)
        count = evidence.channels[name].outlier_count
        where = "its own channels" if name == site else f"{name}, which feeds it"
        yield {
            "reason": "outlier channels", "number": ratio,
            "text": f"outlier channels in {where}: {count}, the largest {ratio:.3g}× the median",
        }  # fmt: skip


def _outlier_values(site: str, evidence: Evidence) -> Iterator[dict[str, Any]]:
    """Few values far above the others; probabilities are left out, whose largest is near 1 by what they are."""
    found, sites = evidence.activations.get(site), evidence.structure
    if any(sites.site(name).op == OpKind.SOFTMAX for name in _origins(site, evidence)):
        return
    if found is None or not found.rms or found.max is None or found.max / found.rms < CREST:
        return
    crest = found.max / found.rms
    yield {
        "reason": "outlier values", "number": crest,
        "text": f"outlier values: the largest magnitude is {crest:.3g}× the RMS",
    }  # fmt: skip


def _origins(site: str, evidence: Evidence) -> tuple[str, ...]:
    """The site itself, or of an operand what computes its value."""
    return (site,) if evidence.structure.site(site).id == site else evidence.feeds.get(site, ())


def _exponent(site: str, evidence: Evidence) -> Iterator[dict[str, Any]]:
    """A softmax turns the absolute error of its argument into a relative error of its probabilities."""
    found = evidence.activations.get(site)
    if site not in evidence.scales or found is None or not found.rms:
        return
    size = found.rms * evidence.scales[site]
    if size * evidence.error >= EXPONENT:
        yield {
            "reason": "exponentiated by a softmax", "number": size * evidence.error,
            "text": f"a softmax exponentiates it: an RMS of {size:.3g} with a relative error of {evidence.error:.2g} is an"
            f" error of {size * evidence.error:.2g} in the exponent",
        }  # fmt: skip


def _concentrated(site: str, evidence: Evidence) -> Iterator[dict[str, Any]]:
    """Rows of probabilities sum to 1, so the mean of p² over the mean of p is the mean sum of squares of a row."""
    sites = evidence.structure
    near = [site, *evidence.readers.get(site, ()), *evidence.feeds.get(site, ())]
    for name in near:
        found = evidence.activations.get(name)
        if sites.site(name).op != OpKind.SOFTMAX or found is None or not found.mean_magnitude or found.rms is None:
            continue
        squares = found.rms**2 / found.mean_magnitude
        if squares >= CONCENTRATED:
            where = "it" if name == site else name
            yield {
                "reason": "concentrated softmax", "number": squares,
                "text": f"{where} is a concentrated softmax: its squared probabilities sum to {squares:.2f} in the mean,"
                f" as if {1 / squares:.2g} keys shared all",
            }  # fmt: skip
            return


def _consumers(site: str, evidence: Evidence) -> Iterator[dict[str, Any]]:
    found = evidence.structure.site(site)
    if found.fan_out >= CONSUMERS and site == found.id:  # an operand is read once
        yield {
            "reason": "shared by many consumers", "number": found.fan_out,
            "text": f"{found.fan_out} operations read its value, so each repeats its error",
        }  # fmt: skip


def _tied(site: str, evidence: Evidence) -> Iterator[dict[str, Any]]:
    if not site.endswith(f":{Role.WEIGHT}"):
        return
    for group in evidence.structure.groups:
        if group.reason == TIED and site in group.sites:
            yield {
                "reason": "tied weight", "number": len(group.sites),
                "text": f"{len(group.sites)} operations read this parameter: {group.name}",
            }  # fmt: skip


def _loud(site: str, evidence: Evidence) -> Iterator[dict[str, Any]]:
    found = evidence.structure.site(site)
    if found.residual != "write" or found.merges_at is None or site != found.id:
        return
    branch, stream = evidence.activations.get(site), evidence.activations.get(found.merges_at)
    if branch is None or stream is None or branch.rms is None or not stream.rms:
        return
    ratio = branch.rms / stream.rms
    if ratio >= LOUD:
        yield {
            "reason": "dominates the residual stream", "number": ratio,
            "text": f"what it adds to the residual stream at {found.merges_at} has {ratio:.2f}× the RMS of the sum",
        }  # fmt: skip
