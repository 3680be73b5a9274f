"""Selectors: a text that chooses sites by layer, operator kind, module, region, role or id."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from aqnfx.errors import SelectorError, nearest
from aqnfx.graph.operands import PRODUCTS
from aqnfx.graph.opkinds import OP_SETS, OpKind
from aqnfx.graph.sites import REGIONS, Role, Site

_FIELDS = ("layers", "ops", "modules", "regions", "roles", "sites")
AUTO = "auto"
_RANGE = re.compile(r"^(?:(?P<stack>[^:]+):)?(?P<low>\d+)(?:-(?P<high>\d+))?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector:
    """Which sites: every field that is set must match; the values of one field are alternatives.

    Text form: ``layers:0-4|7,ops:linear|softmax,modules:*.mlp.*,regions:attention,roles:weight,sites:ID``. ``ops`` also takes the
    sets ``core`` (linear, matmul, bmm), ``extended`` (core + softmax, silu, gelu, norms) and ``all``; a layer may be
    prefixed by its stack (``layers:decoder.block:0-3``), ``layers:none`` is what lies outside of all blocks. ``roles``
    (default ``output``) also takes ``auto``: what low-precision hardware stores, which is the operands of products and
    the outputs of all other operations; a site that is named by its id needs no role. Sites that
    depend on positions and masks alone (region ``position``) match only when named by region, module or id, or by
    ``ops:all``.
    """

    layers: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    nothing: bool = False  # an empty list was given: it selects no site

    def __post_init__(self) -> None:
        known = [*OP_SETS, *(str(k) for k in OpKind)]
        for op in self.ops:
            if op not in known:
                raise SelectorError(f"unknown operator kind {op!r}; known: {', '.join(known)}{nearest(op, known)}")
        for region in self.regions:
            if region not in REGIONS:
                raise SelectorError(f"unknown region {region!r}; known: {', '.join(REGIONS)}")
        for role in self.roles:
            if role not in (roles := (*map(str, Role), AUTO)):
                raise SelectorError(f"unknown role {role!r}; known: {', '.join(roles)}{nearest(role, roles)}")
        for layer in self.layers:
            match = _RANGE.match(layer)
            if layer != "none" and not match:
                raise SelectorError(f"layers:{layer!r} is not a number, a range like 0-4, STACK:0-4, or 'none'")
            if match and match["high"] and int(match["high"]) < int(match["low"]):
                raise SelectorError(f"layers:{layer} is an empty range; write {match['high']}-{match['low']}")

    @classmethod
    def parse(cls, text: str) -> Selector:
        """Parse the text form; raises :class:`SelectorError` naming the part that is not understood."""
        fields: dict[str, Any] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            key, colon, values = part.partition(":")
            if not colon or key not in _FIELDS:
                raise SelectorError(f"selector part {part!r} is not FIELD:VALUE with FIELD one of {', '.join(_FIELDS)}")
            chosen = tuple(v.strip() for v in values.split("|") if v.strip())
            if not chosen:
                raise SelectorError(f"selector part {part!r} names nothing after the colon")
            fields[key] = fields.get(key, ()) + chosen
        if not fields:
            raise SelectorError("the selector is empty; write for example ops:core or layers:0-4")
        return cls(**fields)

    def __str__(self) -> str:
        if self.nothing:
            return "nothing"
        return ",".join(f"{f}:{'|'.join(getattr(self, f))}" for f in _FIELDS if getattr(self, f))

    def kinds(self) -> frozenset[OpKind]:
        """Return the operator kinds that may match; all of them when ``ops`` is not set."""
        if not self.ops:
            return frozenset(OpKind)
        return frozenset().union(*(OP_SETS.get(op) or {OpKind(op)} for op in self.ops))

    def matches(self, site: Site) -> bool:
        """Return whether ``site`` is selected."""
        if self.nothing:
            return False
        if site.region == "position" and not (
            "position" in self.regions or self.modules or self.sites or "all" in self.ops
        ):
            return False
        return (
            (not self.ops or site.op in self.kinds())
            and (not self.layers or any(_layer_matches(pattern, site) for pattern in self.layers))
            and (not self.modules or any(fnmatch.fnmatchcase(site.module, pattern) for pattern in self.modules))
            and (not self.regions or site.region in self.regions)
            and self._plays(site)
            and (not self.sites or site.id in self.sites)
        )

    def _plays(self, site: Site) -> bool:
        if not self.roles:
            return site.role is Role.OUTPUT or bool(self.sites)
        operand = site.role is not Role.OUTPUT
        return site.role in self.roles or (AUTO in self.roles and operand == (site.op in PRODUCTS))

    @property
    def reaches_operands(self) -> bool:
        """Whether operands may be among what is selected; if not, looking at the outputs of operations is enough."""
        return bool(self.roles or self.sites)

    def select(self, sites: Sequence[Site], layers: Sequence[tuple[str, int]]) -> tuple[Site, ...]:
        """Return those of ``sites`` that match, in their order; ``layers`` are the (stack, index) pairs that there are.

        Raises :class:`SelectorError` when a layer or site is named that is not there; an empty match of names that exist is
        returned as an empty tuple.
        """
        known = {site.id for site in sites} if self.sites else set()
        for site in self.sites:
            if site not in known:
                raise SelectorError(f"unknown site {site!r} among {len(known)}{nearest(site, known)}")
        check_layers(self, layers)
        return tuple(site for site in sites if self.matches(site))


def _layer_matches(pattern: str, site: Site) -> bool:
    if pattern == "none":
        return site.layer is None
    match = _RANGE.match(pattern)
    if match is None or site.layer is None or (match["stack"] and match["stack"] != site.stack):
        return False
    return int(match["low"]) <= site.layer <= int(match["high"] or match["low"])


def check_layers(selector: Selector, layers: Sequence[tuple[str, int]]) -> None:
    """Raise :class:`SelectorError` where ``selector`` names a layer that is not among ``layers``, (stack, index) pairs."""
    for pattern in selector.layers:
        _check_layer(pattern, layers)


def _check_layer(pattern: str, layers: Sequence[tuple[str, int]]) -> None:
    match = _RANGE.match(pattern)
    if match is None:
        return
    indices = [index for stack, index in layers if match["stack"] in (None, stack)]
    if not indices:
        stacks = sorted({stack for stack, _ in layers})
        raise SelectorError(f"layers:{pattern}: the model has the layer stacks {', '.join(stacks) or '(none)'}")
    if int(match["high"] or match["low"]) > max(indices):
        raise SelectorError(f"layers:{pattern} is out of range; the model has layers {min(indices)}-{max(indices)}")


def selector_from(
    *,
    where: str | None = None,
    layers: Iterable[int | str] | None = None,
    ops: Iterable[str] | str | None = None,
    modules: Iterable[str] | str | None = None,
    sites: Iterable[str] | str | None = None,
) -> Selector | None:
    """Return a selector from its text or from Python values, None when nothing is given; what is empty selects nothing."""

    def texts(values: Iterable[Any] | str) -> tuple[str, ...]:
        return (values,) if isinstance(values, str) else tuple(str(v) for v in values)

    if where is not None:
        return Selector.parse(where) if where.strip() else Selector(nothing=True)
    given = {"layers": layers, "ops": ops, "modules": modules, "sites": sites}
    chosen: dict[str, Any] = {name: texts(values) for name, values in given.items() if values is not None}
    return Selector(**chosen, nothing=not all(chosen.values())) if chosen else None
