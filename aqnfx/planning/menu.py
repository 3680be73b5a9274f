"""The menu: what a plan can choose from, and what every choice weighs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from aqnfx.errors import InputError
from aqnfx.graph.assignments import Assignment
from aqnfx.graph.operands import Place, origin
from aqnfx.graph.program import Program
from aqnfx.graph.sites import Role
from aqnfx.graph.tags import static_size, tensor_value
from aqnfx.numerics.formats import parse_format

Partial = Literal["refuse", "pad", "drop"]
PARTIAL: tuple[Partial, ...] = ("refuse", "pad", "drop")
NATIVE_BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16}
_KEEP = "keep"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One line of a menu: its text, and the formats of weight and input, or of key and value; None: as the model has it."""

    text: str
    weight: str | None = None
    input: str | None = None
    cache: str | None = None

    def assignment(self, part: Part) -> Assignment:
        """Return the formats that a part has under this choice."""
        if part.cache:
            return Assignment(key=self.cache, value=self.cache)
        return Assignment(weight=self.weight, input=self.input)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What formats are chosen for together: one module's weight and input, or the keys and values of one attention.

    ``module`` is the name that a plan calls it by; ``sites`` are its operands by role; ``shape`` that of the weight,
    ``channel_dim`` its output channels and ``native`` the bits that the model stores a value of it in. ``share`` is the
    share of the weight that one token reads: 1 but for experts.
    """

    module: str
    layer: int | None
    stack: str | None
    sites: tuple[tuple[Role, str], ...]
    shape: tuple[int, ...]
    summed: int
    channel_dim: int
    native: int
    cache: bool = False
    share: float = 1.0

    @property
    def elements(self) -> int:
        """Number of weights."""
        return 0 if self.cache else math.prod(self.shape)

    def sites_of(self, role: Role) -> tuple[str, ...]:
        """Return the ids of the operands of one role."""
        return tuple(site for found, site in self.sites if found is role)

    def formats(self, choice: Choice) -> tuple[tuple[str, str], ...]:
        """Return (site, format) of every operand that ``choice`` stores in a format."""
        named = choice.assignment(self).formats()
        return tuple((site, named[role]) for role, site in self.sites if role in named)

    def bits(self, choice: Choice, *, scales: bool = True) -> int:
        """Return the bits of the weight under ``choice``, of keys and values per token; scales on request."""
        name = choice.cache if self.cache else choice.weight
        if name is None:
            return math.prod(self.shape) * self.native
        fmt = parse_format(name)
        if not scales:
            return math.prod(self.shape) * fmt.element.bits
        if self.summed == len(self.shape) - 1:
            return fmt.stored_bits(self.shape, self.channel_dim)
        # (…, in, out): scales run along the inputs, so count it turned.
        return fmt.stored_bits((*self.shape[:-2], self.shape[-1], self.shape[-2]), len(self.shape) - 2)


def parse_menu(texts: str | Sequence[str]) -> tuple[Choice, ...]:
    """Return the choices of a menu: ``int4:g32,int8:g32`` for weights, ``mxfp4/mxfp8_e4m3,keep`` for weights / inputs.

    ``keep`` leaves an operand as the model has it. Raises :class:`InputError` for an unknown format, and for fewer than two
    different choices, which leave nothing to choose.
    """
    names = texts.split(",") if isinstance(texts, str) else list(texts)
    found = {choice.text: choice for choice in (parse_choice(name) for name in names if name.strip())}
    if len(found) < 2:
        raise InputError(f"a menu needs two formats or more to choose from; found {', '.join(found) or 'none'}")
    return tuple(found.values())


def parse_choice(text: str) -> Choice:
    """Return the choice that ``FORMAT``, ``FORMAT/FORMAT`` or ``keep`` names; raises :class:`InputError` for another text."""
    weight, slash, given = text.partition("/")
    first, second = _format(weight), _format(given) if slash else None
    name = f"{first or _KEEP}/{second or _KEEP}" if slash else first or _KEEP
    return Choice(text=name, weight=first, input=second, cache=first)


def parse_cache_menu(texts: str) -> tuple[Choice, ...]:
    """Return the choices for keys and values; raises :class:`InputError` as :func:`parse_menu` does, and for a slash."""
    if "/" in texts:
        raise InputError(f"formats of keys and values are one per choice, found {texts!r}")
    return parse_menu(texts)


def _format(text: str) -> str | None:
    return None if text.strip() == _KEEP else parse_format(text).name


def check_groups(parts: Sequence[Part], menu: Sequence[Choice], partial: Partial) -> dict[str, tuple[Choice, ...]]:
    """Return module -> the choices that it has, as ``partial`` says of blocks that do not divide what a product sums over.

    "refuse" raises :class:`InputError` for the first, "drop" leaves the choice out for that module, "pad" lets the last
    block be shorter. Raises :class:`InputError` where that leaves a module nothing.
    """
    if partial not in PARTIAL:
        raise InputError(f"partial groups {partial!r} is not one of {', '.join(PARTIAL)}")
    found: dict[str, tuple[Choice, ...]] = {}
    for part in parts:
        width = part.shape[part.summed]
        blocks = {choice: [parse_format(n) for n in choice.assignment(part).formats().values()] for choice in menu}
        fits = tuple(c for c, formats in blocks.items() if all(not f.block or width % f.block == 0 for f in formats))
        if partial == "refuse" and len(fits) < len(menu):
            name = next(choice.text for choice in menu if choice not in fits)
            raise InputError(
                f"{name}: its blocks do not divide the {width} values that {part.module} sums over; choose another size, leave "
                "the module out, or say what to do by --partial-groups pad|drop"
            )
        found[part.module] = tuple(menu) if partial == "pad" else fits
        if not found[part.module]:
            raise InputError(
                f"no format of the menu fits the {width} values that {part.module} sums over; add one without blocks"
            )
    return found


def weight_part(program: Program, module: str, places: Sequence[Place], *, active: bool) -> Part:
    """Return the part of a module that multiplies by a weight; ``active`` counts experts by the share that a token uses."""
    weight = next(place for place in places if place.site.role is Role.WEIGHT)
    value = tensor_value(weight.value)
    assert value is not None  # operands are tensors
    shape = tuple(int(size) for size in value.shape)
    return Part(
        module=module, layer=weight.site.layer, stack=weight.site.stack,
        sites=tuple((place.site.role, place.site.id) for place in places if place.site.role in (Role.WEIGHT, Role.INPUT)),
        shape=shape, summed=weight.dim % len(shape), channel_dim=weight.channel_dim % len(shape),
        native=NATIVE_BITS.get(weight.site.dtype, 32), share=_active_share(program, weight) if active else 1.0,
    )  # fmt: skip


def cache_part(module: str, places: Sequence[Place]) -> Part | None:
    """Return the part of an attention's keys and values, of the shape (heads, width) per token; None where that is not fixed."""
    stored = [place for place in places if place.site.role in (Role.KEY, Role.VALUE)]
    shapes = [_per_token(place) for place in stored]
    if not stored or not all(shapes):
        return None
    first, shape = stored[0].site, shapes[0]
    assert shape is not None  # all are there
    return Part(
        module=module, layer=first.layer, stack=first.stack, sites=tuple((p.site.role, p.site.id) for p in stored),
        shape=shape, summed=1, channel_dim=0, native=NATIVE_BITS.get(first.dtype, 32), cache=True,
    )  # fmt: skip


def _per_token(place: Place) -> tuple[int, int] | None:
    """Return heads and width of what a cache holds per token: heads that are repeated for the product are stored once."""
    value, source = tensor_value(place.value), tensor_value(origin(place.value))
    if value is None or source is None or not isinstance(width := static_size(value.shape[place.dim]), int):
        return None
    own, whole = (
        math.prod(size for size in map(static_size, tensor.shape) if isinstance(size, int)) // width
        for tensor in (value, source)
    )
    return max(min(own, whole), 1), width


def _active_share(program: Program, weight: Place) -> float:
    """Return chosen experts / experts for the stacked weights of experts, read off the router's top-k; 1 for others."""
    value = tensor_value(weight.value)
    if value is None or value.dim() != 3:
        return 1.0
    layer = (weight.site.stack, weight.site.layer)
    for node in program.graph.nodes:
        tag = node.meta.get("aqnfx")
        if tag is None or (tag.stack, tag.layer) != layer or "topk" not in str(node.target):
            continue
        source, count = node.args[0], node.args[1]
        scores = tensor_value(source)
        if isinstance(count, int) and scores is not None and static_size(scores.shape[-1]) == value.shape[0]:
            return count / int(value.shape[0])
    return 1.0
