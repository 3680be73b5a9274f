"""What to do about a sensitivity map: recommendations in order of priority, each with its reason and numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.diagnosis.statistics.windows import ONE_PASS

Subject = Literal["operator", "layer", "window", "run"]
ACTIONS = {
    1: "keep in fp16 or higher, validate first",
    2: "spot-check before lowering precision",
    3: "candidate for low precision",
    4: "measure again",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """One thing to do. ``priority`` 1 critical, 2 spot-check, 3 safe for low precision, 4 measure more.

    ``targets`` are operator kinds or layer labels (a window's layers together); ``degradation`` a fraction at the base
    level and ``ci`` its interval, of the worst target where there are several, ``None`` where nothing was measured.
    """

    priority: int
    subject: Subject
    targets: tuple[str, ...]
    reason: str
    degradation: float | None = None
    ci: tuple[float, float] | None = None

    @property
    def action(self) -> str:
        """What to do, in a few words."""
        return ACTIONS[self.priority]

    @property
    def what(self) -> str:
        """What it is about, in a few words: ``layers 0, 2``, ``layers 3, 4, 5 together``, ``this run``."""
        if not self.targets:
            return "this run"
        noun = "layer" if self.subject == "window" else self.subject
        together = " together" if self.subject == "window" else ""
        return f"{noun}{'s' if len(self.targets) > 1 else ''} {', '.join(self.targets)}{together}"

    def to_record(self) -> dict[str, Any]:
        """Return the recommendation as plain JSON values."""
        ci = None if self.ci is None else list(self.ci)
        words = {"action": self.action, "what": self.what}
        return asdict(self) | words | {"targets": list(self.targets), "ci": ci}


def recommend(smap: SensitivityMap) -> tuple[Recommendation, ...]:
    """Return what to do first, second and third; never empty.

    Critical operators and layers and avalanche windows come first; then what is moderate, or critical by its estimate
    but not beyond the measurement's noise, or robust with an interval that reaches beyond it; then, grouped, what is
    robust up to the high end of its interval. When nothing can be told apart from no effect, a recommendation says how
    to measure more.
    """
    found: list[Recommendation] = []
    subjects: tuple[tuple[Subject, str], ...] = (("operator", "operators"), ("layer", "layers"))
    for subject, name in subjects:
        rows = [row for row in smap.ranking.get(name, []) if not _unfounded(smap, row)]
        found += [_single(subject, row) for row in rows if _priority(row) in (1, 2)]
        found += _grouped(smap, subject, [row for row in rows if _priority(row) == 3])
    found += [item for item in map(_window, smap.windows) if item is not None]
    found += _measure_more(smap)
    return tuple(sorted(found, key=lambda item: (item.priority, -(item.degradation or 0.0))))


def _unfounded(smap: SensitivityMap, row: dict[str, Any]) -> bool:
    """Say whether a row is an estimate at a level where the predictions were seen to fail."""
    return bool(row.get("estimated") and smap.second_order_fails is not False)


def nothing_distinguishable(smap: SensitivityMap) -> bool:
    """Say whether no operator, layer or window could be told apart from no effect at the base level."""
    return not any(entry.get("distinguishable") for entry in _all_entries(smap))


def nothing_grouped(smap: SensitivityMap) -> bool:
    """Say whether no operator, layer or window was probed at all, only single sites or all of them together."""
    return not any(True for _ in _all_entries(smap))


def _all_entries(smap: SensitivityMap) -> Iterable[dict[str, Any]]:
    for name in ("operators", "layers"):
        yield from smap.ranking.get(name, [])
    yield from smap.windows


def _priority(row: dict[str, Any]) -> int | None:
    if row["degradation"] is None:
        return None
    if row["critical"]:
        return 1
    high = row["score_ci"][1]
    return 3 if row["class"] == "robust" and high is not None and high < 1.5 else 2


def _single(subject: Subject, row: dict[str, Any]) -> Recommendation:
    score, (low, high) = row["score"], row["score_ci"]
    span = "no interval" if low is None or high is None else f"interval {low:.2f} to {high:.2f}"
    if row.get("estimated"):
        reason = f"sensitivity score {score:.2f} by prediction, not measured ({span})"
    elif row["critical"]:
        reason = f"sensitivity score {score:.2f} is above 3 ({span})"
    elif row["class"] == "critical":
        reason = f"sensitivity score {score:.2f} is above 3, but the measurement does not settle it ({span})"
    elif row["class"] == "moderate":
        reason = f"sensitivity score {score:.2f} lies between 1.5 and 3 ({span})"
    else:
        reason = f"sensitivity score {score:.2f} is low, but the measurement allows more than 1.5 ({span})"
    return Recommendation(
        priority=1 if row["critical"] else 2, subject=subject, targets=(row["key"],), reason=reason,
        degradation=row["degradation"], ci=_ci(row["degradation_ci"]),
    )  # fmt: skip


def _grouped(smap: SensitivityMap, subject: Subject, rows: list[dict[str, Any]]) -> list[Recommendation]:
    if not rows:
        return []
    worst = max(rows, key=lambda row: float(row["score_ci"][1]))
    where = smap.perturbation.where(smap.base_level)
    reason = (
        f"sensitivity score below 1.5 up to the high end of every interval (worst: {worst['key']}, "
        f"{worst['score']:.2f}, up to {worst['score_ci'][1]:.2f}) {where}"
    )
    if still := [row["key"] for row in rows if row["degradation_ci"] == [0.0, 0.0] and not row.get("estimated")]:
        # An interval of zero width only says that the samples agree: effects rarer than one in n stay unseen.
        reason += f"; no change at all was seen in {', '.join(still)} on {smap.samples} samples"
    if guessed := [row["key"] for row in rows if row.get("estimated")]:
        reason += f"; {', '.join(guessed)} by prediction, not measured"
    return [
        Recommendation(
            priority=3, subject=subject, targets=tuple(row["key"] for row in rows), reason=reason,
            degradation=worst["degradation"], ci=_ci(worst["degradation_ci"]),
        )
    ]  # fmt: skip


def _window(window: dict[str, Any]) -> Recommendation | None:
    if window.get("class") not in ("avalanche", "high"):
        return None
    if window["class"] == "high":
        reason = "together these layers lose 10 to 15 %"
    elif window["distinguishable"]:
        reason = "together these layers lose more than 15 %"
    elif window.get("estimated"):
        reason = "together these layers lose more than 15 % by prediction, not measured"
    else:
        reason = "together these layers lose more than 15 % by estimate, not distinguishable from no effect"
    ratio, (low, high) = window["amplification"], window.get("amplification_ci") or (None, None)
    if ratio is not None and low is not None and high is not None:
        whole = "their prediction" if window.get("predicted_from") == ONE_PASS else "the sum of the single layers"
        # With predictions the test over all windows decides; the interval of one ratio alone does not.
        above = window.get("avalanche") if "excess_p_holm" in window else window.get("superadditive")
        verdict = "more than independent small errors" if above else "not shown to exceed independent small errors"
        reason += f"; {ratio:.2f} times {whole} ({low:.2f} to {high:.2f}): {verdict}"
    return Recommendation(
        priority=1 if window.get("avalanche") or (window["class"] == "avalanche" and window["distinguishable"]) else 2,
        subject="window",
        targets=tuple(str(layer) for layer in window["layers"]), reason=reason,
        degradation=window.get("degradation"), ci=_ci(window.get("degradation_ci")),
    )  # fmt: skip


def _measure_more(smap: SensitivityMap) -> list[Recommendation]:
    found = []
    unfounded = [row["key"] for rows in smap.ranking.values() for row in rows if _unfounded(smap, row)]
    if unfounded:
        found.append(
            f"at level {smap.base_level:g} predictions do not hold, and {', '.join(unfounded)} were only predicted: use "
            "--method measure, or a lower --base-level"
        )
    if smap.partial:
        asked = smap.task.get("samples_requested", "?")
        found.append(f"the run stopped after {smap.samples} of {asked} samples: finish it")
    if nothing_grouped(smap):
        found.append(
            "only single sites or all of them were probed: add --probes operator,layer,window for advice on groups"
        )
    elif nothing_distinguishable(smap):
        found.append(
            f"nothing is distinguishable from no effect at level {smap.base_level:g} with {smap.samples} samples and "
            f"{len(smap.seeds)} seeds: raise --samples to {max(4 * smap.samples, 64)} (halves the intervals)"
            + (", use more --seeds, or raise --levels" if smap.perturbation.graded else "")
        )
    return [Recommendation(priority=4, subject="run", targets=(), reason=reason) for reason in found]


def _ci(pair: Any) -> tuple[float, float] | None:
    return None if not pair or None in pair else (float(pair[0]), float(pair[1]))
