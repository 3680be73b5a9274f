"""The migration plan: what to validate first, what to spot-check and what to lower at once, when a model changes its precision.

It reads the classes and verdicts that a sensitivity map holds, and divergences that were seen elsewhere, such as between two
implementations of a layer; it computes no number of its own.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aqnfx.diagnosis.advice.divergences import SIGNIFICANT, Target, check_thresholds, locate
from aqnfx.diagnosis.explain.map_of_model import check_interval, check_number
from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.errors import ArtifactError, InputError
from aqnfx.graph.program import Program
from aqnfx.numerics.metrics import MODERATE_SCORE

Subject = Literal["operator", "layer", "window", "module"]
Kind = Literal["operator", "layer"]
ACTIONS = {1: "validate first in fp16", 2: "spot-check in bf16", 3: "standard int8"}
SUBJECTS: tuple[Subject, ...] = ("window", "layer", "operator", "module")


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A number that supports a reason, as the map has it: its ``name`` there, value, and interval where there is one."""

    name: str
    value: float
    ci: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why something has its priority: the ``priority`` that it asks for, a sentence, and the numbers behind it.

    ``noise_free``: the numbers cannot be told apart from those of a run without noise.
    """

    priority: int
    text: str
    numbers: tuple[Number, ...] = ()
    noise_free: bool = False


UNKNOWN = Reason(priority=2, text="the map has no number for it alone")


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationStep:
    """One line of a migration plan: the ``priority`` (1, 2 or 3) of an operator kind, a layer, a window or a module.

    ``targets``: an operator kind, layer labels (those of a window together) or a module. ``reasons``: the strongest first.
    """

    priority: int
    subject: Subject
    targets: tuple[str, ...]
    reasons: tuple[Reason, ...]

    @property
    def action(self) -> str:
        """What to do, in a few words."""
        return ACTIONS[self.priority]

    @property
    def what(self) -> str:
        """What it is about, in a few words: ``layer 2``, ``layers 3, 4, 5 together``, ``operator softmax``."""
        if self.subject == "window":
            return f"layers {', '.join(self.targets)} together"
        return f"{self.subject} {', '.join(self.targets)}"

    def to_record(self) -> dict[str, Any]:
        """Return the step as plain JSON values."""
        return {"action": self.action, "what": self.what} | dataclasses.asdict(self)


def migration_plan(
    smap: SensitivityMap | Mapping[str, Any], divergences: Mapping[str, float] | None = None, *,
    thresholds: tuple[float, float] = SIGNIFICANT, program: Program | None = None,
) -> tuple[MigrationStep, ...]:  # fmt: skip
    """Return every operator kind, layer and notable window of a map with its priority, the most urgent first.

    Priority 1: critical, or of the critical class; an avalanche window; a divergence above ``thresholds[0]``. Priority 2: of
    the moderate class, or robust but with an interval that reaches into it, or not known by itself; a window that loses 5 % or
    more; a layer of a window of priority 1; a divergence above ``thresholds[1]``. Priority 3: the rest.

    ``divergences``: relative errors by site id, layer label or module
    (:func:`~aqnfx.diagnosis.advice.divergences.parse_divergences`); one inside of a layer counts for that layer. ``program``: the
    tagged model, whose other modules may then be named, too. Raises :class:`InputError` for unknown names and for a map with
    nothing to list, :class:`ArtifactError` for a map that contradicts itself.
    """
    smap = smap if isinstance(smap, SensitivityMap) else SensitivityMap.from_record(smap)
    check_thresholds(thresholds)
    found: dict[tuple[Subject, tuple[str, ...]], list[Reason]] = {}
    kinds: tuple[tuple[Kind, Mapping[str, float | None], Sequence[int | str]], ...] = (
        ("operator", smap.per_operator, smap.critical_ops), ("layer", smap.per_layer, smap.critical_layers),
    )  # fmt: skip
    for kind, table, critical in kinds:
        named = {str(key) for key in critical}
        if unknown := sorted(named - set(table)):
            raise ArtifactError(f"sensitivity map: critical {kind} {unknown[0]!r} is none of its {kind}s")
        for key in table:
            found[kind, (key,)] = [_single(smap, kind, key, key in named)]
    windows: dict[str, dict[int, list[tuple[str, ...]]]] = defaultdict(dict)
    for window in smap.windows:
        layers, reason = tuple(map(str, window["layers"])), _window(smap, window)
        if reason is None:
            continue
        found.setdefault(("window", layers), []).append(reason)
        for layer in layers:
            windows[layer].setdefault(reason.priority, []).append(layers)
    for layer, members in windows.items():
        found.setdefault(("layer", (layer,)), [UNKNOWN]).extend(_member(priority, members[priority]) for priority in members)
    for name, error in (divergences or {}).items():
        target = locate(name, smap, program)
        found.setdefault(_subject(target), [UNKNOWN]).append(_divergence(name, target, error, thresholds))
    if not found:
        raise InputError(
            "the sensitivity map has no operator, layer or window to list; diagnose with --probes operator,layer,window"
        )
    steps = [_step(subject, targets, reasons) for (subject, targets), reasons in found.items()]
    return tuple(sorted(steps, key=lambda step: (step.priority, SUBJECTS.index(step.subject), -_size(step))))


def _step(subject: Subject, targets: tuple[str, ...], reasons: Sequence[Reason]) -> MigrationStep:
    ordered = sorted(reasons, key=lambda reason: reason.priority)
    return MigrationStep(priority=ordered[0].priority, subject=subject, targets=targets, reasons=tuple(ordered))


def _size(step: MigrationStep) -> float:
    numbers = [number for reason in step.reasons for number in reason.numbers]
    return max((number.value for number in numbers if number.name == "degradation"), default=0.0)


def _single(smap: SensitivityMap, kind: Kind, key: str, critical: bool) -> Reason:
    """Read one operator's or layer's record at the base level."""
    record, where = smap.at_base(kind, key), f"{kind} {key!r}"
    degradation, score = _number(record, "degradation", where), _number(record, "score", where)
    label, numbers = record.get("class"), tuple(number for number in (degradation, score) if number is not None)
    if degradation is None or score is None or label not in ("critical", "moderate", "robust"):
        text = "critical, without a score" if critical else "the map has no score at its base level"
        return Reason(priority=1 if critical else 2, text=text, numbers=numbers)
    estimated = bool(record.get("estimated"))
    free = _noise_free(degradation, record, estimated)
    doubt = _doubt(smap, degradation, estimated, free)
    priority, text = _verdict(smap, critical, str(label), score, bool(doubt), estimated)
    return Reason(priority=priority, text=f"{text}{doubt}", numbers=numbers, noise_free=free)


def _verdict(
    smap: SensitivityMap, critical: bool, label: str, score: Number, doubtful: bool, estimated: bool
) -> tuple[int, str]:
    if critical:
        return 1, "critical"
    if estimated and smap.second_order_fails is not False:
        return 2, "of no known class, as predictions do not hold at this level"
    if label == "critical":
        return 1, "of class critical" + ("" if doubtful else ", which the measurement does not settle")
    if label == "moderate":
        return 2, "of class moderate"
    if score.ci is None:
        return 2, "of class robust"
    if score.ci[1] >= MODERATE_SCORE:
        return 2, "of class robust, with an interval that reaches into moderate"
    return 3, "of class robust up to the high end of its interval"


def _window(smap: SensitivityMap, window: Mapping[str, Any]) -> Reason | None:
    """Read a window; None where it is robust, or says nothing."""
    layers = list(window["layers"])
    where = f"window {str(layers)[:80]}"
    if not layers:
        raise ArtifactError("sensitivity map: a window has no layers")
    avalanche = layers in [list(found) for found in smap.avalanche_points]
    degradation = _number(window, "degradation", where)
    label = window.get("class")
    if not avalanche and (degradation is None or label not in ("avalanche", "high", "moderate")):
        return None
    ratio = _number({"amplification": window["amplification"]} | dict(window), "amplification", where)
    numbers = tuple(number for number in (degradation, ratio) if number is not None)
    estimated = bool(window.get("estimated"))
    free = degradation is not None and _noise_free(degradation, window, estimated)
    doubt = "" if degradation is None else _doubt(smap, degradation, estimated, free)
    if avalanche:
        text = "an avalanche window"
    elif label == "avalanche":
        # The word is kept for windows that the map calls one; see docs/guide.md.
        text = "together they lose more than 15 %"
    else:
        text = f"together they lose {'10 to 15' if label == 'high' else '5 to 10'} %"
    first = avalanche or (label == "avalanche" and bool(window.get("distinguishable")))
    return Reason(priority=1 if first else 2, text=f"{text}{doubt}", numbers=numbers, noise_free=free)


def _member(priority: int, windows: Sequence[tuple[str, ...]]) -> Reason:
    # A window's loss may be that of one of its layers alone, so the others are looked at, and not held back with it.
    names = ", ".join(f"{layers[0]} to {layers[-1]}" for layers in windows)
    return Reason(priority=2 if priority == 1 else 3, text=f"in a window of priority {priority}: {names}")


def _subject(target: Target) -> tuple[Subject, tuple[str, ...]]:
    return ("layer", (target.layer,)) if target.layer is not None else ("module", (target.module,))


def _divergence(name: str, target: Target, error: float, thresholds: tuple[float, float]) -> Reason:
    high, low = thresholds
    of = "" if _subject(target)[1] == (name,) else f" at {name}"
    said = f"above {high:g}" if error > high else f"above {low:g}" if error > low else f"not above {low:g}"
    priority = 1 if error > high else 2 if error > low else 3
    return Reason(priority=priority, text=f"diverges{of}, {said}", numbers=(Number(name="relative error", value=error),))


def _number(record: Mapping[str, Any], name: str, where: str) -> Number | None:
    value = record.get(name)
    if value is None:
        return None
    check_number(value, f"{name} of {where}")
    ci = check_interval(record.get(f"{name}_ci"), f"{name}_ci of {where}")
    return Number(name=name, value=float(value), ci=ci)


def _noise_free(degradation: Number, record: Mapping[str, Any], estimated: bool) -> bool:
    """Say whether nothing was shown: the interval includes zero, or the test over all entries does not reject it."""
    within = degradation.ci is None or degradation.ci[0] <= 0.0 <= degradation.ci[1]
    return within or (not estimated and record.get("distinguishable") is False)


def _doubt(smap: SensitivityMap, degradation: Number, estimated: bool, free: bool) -> str:
    """What the numbers do not show, as the end of a sentence."""
    found = "; by prediction, not measured" if estimated else ""
    if degradation.ci is None:
        return f"{found}; the map has no interval"
    if not estimated and degradation.ci == (0.0, 0.0):
        # Zero width only says that the samples agree: what is rarer than one in n stays unseen.
        return f"; no change at all was seen on {smap.samples} samples: not distinguishable from noise-free"
    if not free:
        return found
    # An interval of one entry alone may miss zero by chance where there are many: the map's test counts them all.
    counted = "" if degradation.ci[0] <= 0.0 <= degradation.ci[1] else " when all comparisons are counted"
    return f"{found}; not distinguishable from noise-free{counted}"
