"""PlanOptions: what a plan may choose from and what it has to keep, checked before anything slow starts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StrictStr

from aqnfx.artifacts import validate
from aqnfx.errors import InputError, nearest
from aqnfx.numerics.formats import parse_format
from aqnfx.planning.menu import PARTIAL, Choice, Partial, parse_cache_menu, parse_choice, parse_menu
from aqnfx.probes.settings import RunSettings, byte_count, check_count, check_seed, one_of

COUPLE = ("none", "fused")
RULES = ("optimal", "threshold")
DEFAULT_FORMATS = {"optimal": "int4:g32,int8:g32", "threshold": "fp16,int8,int4:g32"}
"""The menu of each rule where none is given."""
THRESHOLDS = (0.15, 0.05)
"""Relative degradations above which rule threshold takes its first and its second format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions(RunSettings):
    """What to plan, beside the settings of every run; the command line's flags of the same names.

    ``formats``: the menu for weights, or weights / inputs (:func:`~aqnfx.planning.menu.parse_menu`), None: that of the rule;
    ``kv_formats`` that for keys and values, None leaves them. ``rule`` "optimal" takes exactly one goal: ``avg_bits`` per
    weight, ``bytes`` of all planned weights ("12MiB"), ``seconds`` by a latency table, or ``max_kl`` in nats per token, with
    the smallest size that keeps it; ``kv_bits`` is the budget of keys and values and needs ``kv_formats``. ``rule``
    "threshold" takes no goal, three formats from precise to coarse, and ``thresholds``: relative degradations above which a
    layer gets the first, else the second. ``count_scales`` counts scales into bits and bytes. ``modules``, ``layers`` say what
    is planned (default: every linear layer and every expert). ``keep``: glob of module names -> a choice that is not in
    question; ``floor``: layers ("0", "decoder.layers:2") -> least bits per weight without scales. ``couple`` "fused": weights
    that runtimes multiply together get one choice. ``partial``: blocks that do not divide ("refuse", "pad", "drop").
    ``active_experts`` counts experts by the share that a token uses. ``latency_table``: module or "*" -> choice -> seconds.
    ``samples`` (32) choose, ``eval_samples`` others judge, ``batch_size`` (8) of them at a time.
    Raises :class:`InputError` for values that cannot be meant.
    """

    formats: str | None = None
    kv_formats: str | None = None
    avg_bits: float | None = None
    bytes: str | int | None = None
    seconds: float | None = None
    max_kl: float | None = None
    kv_bits: float | None = None
    count_scales: bool = True
    modules: tuple[str, ...] = ()
    layers: str | None = None
    keep: Mapping[str, str] = field(default_factory=dict)
    floor: Mapping[str, float] = field(default_factory=dict)
    couple: str = "none"
    partial: Partial = "refuse"
    active_experts: bool = False
    latency_table: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rule: str = "optimal"
    thresholds: tuple[float, float] = THRESHOLDS
    refine: bool = True
    pareto: int = 0
    draws: int = 4
    samples: int = 32
    eval_samples: int = 64
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        RunSettings.__post_init__(self)
        check_seed(self.seed)
        if self.rule not in RULES:
            raise InputError(f"rule {self.rule!r} is not one of {', '.join(RULES)}{nearest(str(self.rule), RULES)}")
        if isinstance(self.modules, str) or not all(isinstance(name, str) for name in self.modules):
            raise InputError(f"modules must be a sequence of globs, found {self.modules!r}")
        for name, table in (("keep", self.keep), ("floor", self.floor)):
            wanted = str if name == "keep" else (int, float)
            if not all(isinstance(key, str) and isinstance(value, wanted) for key, value in table.items()):
                raise InputError(f"{name} maps names to {'formats' if name == 'keep' else 'bits'}, found {dict(table)!r}")
        menu, goals = self.menu, [n for n in ("avg_bits", "bytes", "seconds", "max_kl") if getattr(self, n) is not None]
        if self.rule == "optimal" and len(goals) != 1:
            said = f", found {' and '.join(goals)}" if goals else ""
            raise InputError(f"a plan needs one goal: avg_bits, bytes, seconds or max_kl{said}")
        if self.rule == "threshold" and goals:
            raise InputError(f"rule threshold has no budget; leave out {', '.join(goals)}")
        if self.rule == "threshold":
            self._check_threshold_rule(menu)
        for name in ("avg_bits", "seconds", "max_kl", "kv_bits"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be a positive number, found {value!r}")
        if (self.kv_bits is None) != (self.kv_formats is None):
            raise InputError("kv_formats and kv_bits belong together: the menu of keys and values, and its budget")
        if (self.seconds is not None) != bool(self.latency_table):
            raise InputError("seconds and a latency table belong together: the budget, and what every choice takes")
        if self.bytes is not None:
            byte_count("bytes", self.bytes)
        for name, least in (("draws", 1), ("eval_samples", 0), ("pareto", 0)):
            check_count(name, getattr(self, name), least)
        check_count("samples", self.samples + self.eval_samples)
        one_of("couple", self.couple, COUPLE)
        one_of("partial groups", self.partial, PARTIAL)
        if self.pareto == 1:
            raise InputError("pareto 1 is no frontier; give 2 budgets or more, or 0 for none")
        self.kept()
        if self.kv_formats is not None:
            parse_cache_menu(self.kv_formats)
        for layer, bits in self.floor.items():
            if not re.fullmatch(r"(?:[^:]+:)?\d+", layer):
                raise InputError(f"floor of layer {layer!r}: a layer is a number, or STACK:number")
            if not any(choice_bits(choice) >= bits for choice in menu):
                raise InputError(f"floor of layer {layer}: no format of the menu has {bits:g} bits")

    def _check_threshold_rule(self, menu: Sequence[Choice]) -> None:
        if len(menu) != 3:
            found = ", ".join(choice.text for choice in menu)
            raise InputError(f"rule threshold takes three formats, from precise to coarse; found {len(menu)}: {found}")
        bits = [choice_bits(choice) for choice in menu]
        if bits != sorted(bits, reverse=True):
            raise InputError(f"rule threshold goes from precise to coarse, found bits {', '.join(f'{b:g}' for b in bits)}")
        pair = self.thresholds
        numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in pair)
        if len(pair) != 2 or not numbers or not pair[0] > pair[1]:
            raise InputError(f"thresholds are two falling degradations, as 0.15,0.05; found {', '.join(map(str, pair))}")
        if self.kv_formats is not None:
            raise InputError("rule threshold is for linear layers; leave out the formats of keys and values")
        if self.pareto:
            raise InputError("rule threshold has no budget, so it has no plans over budgets; leave out pareto")

    @property
    def menu(self) -> tuple[Choice, ...]:
        """The choices for weights and inputs."""
        return parse_menu(DEFAULT_FORMATS[self.rule] if self.formats is None else self.formats)

    @property
    def kv_menu(self) -> tuple[Choice, ...]:
        """The choices for keys and values, none where they are left as they are."""
        return parse_cache_menu(self.kv_formats) if self.kv_formats is not None else ()

    def kept(self) -> dict[str, Choice]:
        """Return glob -> the choice that is not in question there."""
        return {pattern: parse_choice(text) for pattern, text in self.keep.items()}


def choice_bits(choice: Choice) -> float:
    """Return the bits of one weight under a choice without scales, infinite where it stays as it is."""
    return math.inf if choice.weight is None else float(parse_format(choice.weight).element.bits)


def parse_pairs(texts: Sequence[str], what: str) -> dict[str, str]:
    """Return name -> value of texts ``NAME=VALUE``; raises :class:`InputError` for any other and for names given twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise InputError(f"{what} {text!r} is not NAME=VALUE")
        if name.strip() in found:
            raise InputError(f"{what} {name.strip()!r} is given twice")
        found[name.strip()] = value.strip()
    return found


def parse_latency(record: Any, where: str) -> dict[str, dict[str, float]]:
    """Return module (or "*") -> choice -> seconds of a latency table's JSON; :class:`ArtifactError` names what is wrong."""
    checked = validate(_Latencies, record, f"{where}: latency table (module or '*' -> choice -> seconds)")
    return {module: dict(row) for module, row in checked.items()}


def _choice_name(text: str) -> str:
    try:
        return parse_choice(text).text
    except InputError as error:
        raise ValueError(str(error)) from error


_Seconds = Annotated[float, Field(strict=True, ge=0, lt=1e18)]
_Latencies = Annotated[
    dict[StrictStr, dict[Annotated[StrictStr, AfterValidator(_choice_name)], _Seconds]], Field(min_length=1)
]
